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
mod limits;
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
    execs: HashMap<String, Option<Arc<Process>>>,
}

/// How far a container has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    #[default]
    Creating,
    Created,
    /// Its process was told to start; whether it still runs, the process knows.
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
    fn new(id: String, slots: Vec<u32>, cgroup: Cgroup) -> Self {
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

    /// Names of its exec processes, ended ones included.
    pub fn exec_ids(&self) -> Vec<String> {
        self.lock().execs.keys().cloned().collect()
    }

    /// The process of that name; an empty name means the container's own.
    pub fn find(&self, exec: &str) -> Result<Arc<Process>> {
        if exec.is_empty() {
            return self.process().ok_or_else(|| Error::NoContainer(self.id.clone()));
        }
        let found = self.lock().execs.get(exec).cloned().flatten();
        found.ok_or_else(|| Error::NoExec { container: self.id.clone(), exec: exec.to_owned() })
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
