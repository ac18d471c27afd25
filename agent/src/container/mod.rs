//! Containers: what the agent knows of each, and the calls on them.
//!
//! A container's calls are ordered by its lock: what changes it as a whole (create, start,
//! remove) holds it alone, processes are added beside each other. Nothing takes it to
//! look, to wait or to signal, so no call can be kept from ending a container. Containers
//! share no lock that is held across a wait.
//!
//! * [`spec`]: the specification, completed with what only the guest knows.
//! * [`rootfs`]: the mounts of a root file system.
//! * [`volumes`]: what else is mounted, and disks.
//! * [`user_namespace`]: what is different in a pod with a user namespace.
//! * [`cgroup`], [`limits`], [`device_policy`]: the control group, its limits and what
//!   devices it may use.
//! * [`apparmor`]: the profile that its processes run under.
//! * [`create`], [`start`], [`exec`], [`signal`], [`update`], [`remove`]: one call each.

mod apparmor;
pub mod cgroup;
mod create;
mod cwd;
pub mod device_policy;
mod exec;
mod guest_devices;
mod image_volumes;
mod limits;
mod mount_points;
mod remove;
mod rootfs;
mod signal;
mod spec;
mod start;
mod update;
mod user_namespace;
mod volumes;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libcontainer::oci_spec::runtime::Process as ProcessSpec;
use tokio::sync::RwLock;

use crate::error::{Error, Result};
use crate::process::{Outcome, Process};
use crate::stats::layer::Layer;
use cgroup::Cgroup;
pub use rootfs::{mount_at, unmount_at};

/// One container.
#[derive(Debug)]
pub struct Container {
    /// Its name, checked.
    pub id: String,
    /// PCI slots it holds.
    slots: Vec<u32>,
    cgroup: Cgroup,
    /// How much its upper layer takes.
    pub layer: Layer,
    order: Arc<RwLock<()>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    init: Option<Arc<Init>>,
    execs: HashMap<String, ExecState>,
    /// Groups of execs that are forgotten, in which something that they left behind may still run.
    left: Vec<Cgroup>,
}

/// How far a container has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    #[default]
    Creating,
    Created,
    /// Its process is being told to start.
    Starting,
    /// It was; whether it still runs, the process knows.
    Started,
    Removing,
}

/// A container's own process and what the calls after creation need.
#[derive(Debug)]
struct Init {
    process: Arc<Process>,
    /// Tells whether the process became its command. Taken by start.
    status: Mutex<Option<OwnedFd>>,
    /// Pattern for further processes.
    spec: ProcessSpec,
    /// File with the system call filter, if there is one.
    seccomp: Option<PathBuf>,
}

/// How far a further process has come.
#[derive(Debug)]
enum ExecState {
    /// It is being started.
    Starting,
    /// It is, and was forgotten meanwhile: it is to be killed as soon as it is there.
    Abandoned,
    /// It was started.
    Started(Arc<Exec>),
}

/// A further process, and the control group for it and all that it starts.
#[derive(Debug)]
struct Exec {
    process: Arc<Process>,
    group: Cgroup,
}

/// What a container is doing, for a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Waits to be started.
    Created,
    /// Its process runs.
    Running,
    /// Its process has ended.
    Exited(Outcome),
}

impl Container {
    /// One that is about to be created.
    pub fn new(id: String, slots: Vec<u32>, cgroup: Cgroup) -> Self {
        Self { id, slots, cgroup, layer: Layer::default(), order: Arc::default(), state: Mutex::default() }
    }

    /// PCI slots it holds.
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// Directory of its control group.
    pub fn cgroup_path(&self) -> &Path {
        self.cgroup.path()
    }

    /// Ids of all its processes.
    pub fn processes(&self) -> Vec<i32> {
        self.cgroup.processes()
    }

    /// Its own process; nothing while it is being created.
    pub fn process(&self) -> Option<Arc<Process>> {
        self.lock().init.as_ref().map(|init| init.process.clone())
    }

    /// What it is doing; nothing while it is being created.
    pub fn status(&self) -> Option<Status> {
        let state = self.lock();
        let process = &state.init.as_ref()?.process;
        Some(match (process.outcome(), state.phase) {
            (Some(outcome), _) => Status::Exited(outcome),
            (None, Phase::Creating | Phase::Created) => Status::Created,
            (None, _) => Status::Running,
        })
    }

    /// Whether its start is under way: it counts as running meanwhile.
    pub fn starting(&self) -> bool {
        self.lock().phase == Phase::Starting
    }

    /// Names of its exec processes, ended ones and those that are being started included.
    pub fn exec_ids(&self) -> Vec<String> {
        self.lock().execs.keys().cloned().collect()
    }

    /// The process of that name; an empty name means the container's own.
    pub fn find(&self, exec: &str) -> Result<Arc<Process>> {
        if exec.is_empty() {
            return self.process().ok_or_else(|| Error::NoContainer(self.id.clone()));
        }
        Ok(self.find_exec(exec)?.process.clone())
    }

    fn find_exec(&self, exec: &str) -> Result<Arc<Exec>> {
        match self.lock().execs.get(exec) {
            Some(ExecState::Started(found)) => Ok(found.clone()),
            _ => Err(Error::NoExec { container: self.id.clone(), exec: exec.to_owned() }),
        }
    }

    /// Kills all of its processes. Blocks, for as long as the kernel is busy with control groups.
    fn kill(&self) -> Result<()> {
        {
            let state = self.lock();
            let execs = state.execs.values().filter_map(|exec| match exec {
                ExecState::Started(exec) => Some(&exec.process),
                ExecState::Starting | ExecState::Abandoned => None,
            });
            state.init.iter().map(|init| &init.process).chain(execs).for_each(|process| process.to_be_killed());
        }
        self.cgroup.kill()
    }

    /// Removes a group of an exec that is forgotten, as soon as nothing is left in it, and those of earlier ones. Blocks.
    fn leave(&self, group: Cgroup) {
        let mut left = std::mem::take(&mut self.lock().left);
        left.push(group);
        left.retain(|group| !group.remove_if_empty());
        self.lock().left.append(&mut left);
    }

    fn init(&self) -> Result<Arc<Init>> {
        self.lock().init.clone().ok_or_else(|| Error::NoContainer(self.id.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Checks that a name given by the host can be a file's name.
fn check_id(field: &'static str, id: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if id.is_empty() || id.len() > 64 || !id.bytes().all(allowed) || id == "." || id == ".." {
        return Err(Error::invalid(field, format!("{id:?} is not 1 to 64 of [A-Za-z0-9_.-]")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_cannot_leave_their_directory() {
        for bad in ["", ".", "..", "a/b", "/", "a\0", "a b", "é", &"x".repeat(65)] {
            assert!(check_id("container_id", bad).is_err(), "{bad:?}");
        }
        for good in ["a", "...", "0-_.Z", &"f".repeat(64)] {
            assert!(check_id("container_id", good).is_ok(), "{good:?}");
        }
    }
}
