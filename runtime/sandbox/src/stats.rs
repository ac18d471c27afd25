//! What pods use at present.
//!
//! A container's figures are its control group's in the guest. A pod's are those of its
//! control group on the host, in which its VMM runs: the guest with all that is in it, its
//! kernel and its agent, and the VMM itself. So the pod uses more than its containers do, and
//! that is what it takes from the node.
//!
//! One call to a guest brings the figures of all of its containers. Guests are asked side by
//! side, and one that does not answer in time costs its own figures only.

mod host;
mod rate;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nacelle_proto::agent::v1 as api;
use nacelle_proto::agent::v1::{ContainerUsage, FilesystemUsage, GroupUsage, InterfaceUsage};
use tokio::task::JoinSet;

use crate::clock;
use crate::manager::Manager;
use crate::model::{ContainerState, ContainerStatus, SandboxState, SandboxStatus};
use crate::sandbox::Sandbox;
use crate::{Error, Result, replies};
use rate::Rate;

/// How long a guest may take, before the configuration's factor: less than for a call that
/// changes something, since whoever lists pods waits for the slowest.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a pod uses.
#[derive(Debug, Clone)]
pub struct SandboxStats {
    /// The pod.
    pub status: SandboxStatus,
    /// When it was read, in nanoseconds since the Unix epoch.
    pub at: i64,
    /// All of it, as the host sees it.
    pub host: GroupUsage,
    /// Nanoseconds of CPU time a second of that; none until there are two readings.
    pub nano_cores: Option<u64>,
    /// Its containers together, as the guest sees them.
    pub guest: GroupUsage,
    /// Its interfaces, the default one first.
    pub interfaces: Vec<InterfaceUsage>,
    /// The file system with its containers' writable layers.
    pub scratch: Option<FilesystemUsage>,
    /// Directory on the host's file system that those layers lie on in the end.
    pub directory: PathBuf,
    /// Those of its containers that run.
    pub containers: Vec<ContainerStats>,
}

/// What a container uses.
#[derive(Debug, Clone)]
pub struct ContainerStats {
    /// The container.
    pub status: ContainerStatus,
    /// As its guest sees it.
    pub usage: ContainerUsage,
    /// Nanoseconds of CPU time a second; none until there are two readings.
    pub nano_cores: Option<u64>,
}

/// What all pods take of a file system of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskUsage {
    /// A directory on that file system.
    pub directory: PathBuf,
    /// Bytes allocated.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

/// The readings that rates are made of.
#[derive(Debug, Default)]
pub struct Rates {
    pod: Mutex<Rate>,
    containers: Mutex<HashMap<String, Rate>>,
}

impl Manager {
    /// What those pods use that are wanted and ready. One whose guest does not answer is left
    /// out. `processes` asks for what processes have open, too, which takes longer.
    pub async fn stats(&self, wanted: impl Fn(&SandboxStatus) -> bool, processes: bool) -> Vec<SandboxStats> {
        let mut calls = JoinSet::new();
        for sandbox in self.all_sandboxes() {
            let status = sandbox.status();
            if status.state == SandboxState::Ready && wanted(&status) {
                calls.spawn(async move { (sandbox.stats(processes).await, status.id) });
            }
        }
        let mut found = Vec::new();
        while let Some(done) = calls.join_next().await {
            match done {
                Ok((Ok(stats), _)) => found.push(stats),
                // It may have been stopped meanwhile.
                Ok((Err(error), id)) => tracing::warn!(sandbox = id, %error, "left out of the statistics"),
                Err(error) => tracing::error!(%error, "statistics of a pod ended abnormally"),
            }
        }
        found.sort_by(|a, b| a.status.id.cmp(&b.status.id));
        found
    }

    /// What one pod uses.
    ///
    /// # Errors
    /// There is none, or it is not ready, or its guest does not answer.
    pub async fn sandbox_stats(&self, id: &str) -> Result<SandboxStats> {
        self.require_sandbox(id)?.stats(false).await
    }

    /// What one container uses, and the pod it is in.
    ///
    /// # Errors
    /// There is none, or it does not run, or its guest does not answer.
    pub async fn container_stats(&self, id: &str) -> Result<(SandboxStats, ContainerStats)> {
        let (sandbox, container) = self.require_container(id)?;
        container.require(ContainerState::Running, "tell what it uses")?;
        let mut stats = sandbox.stats(false).await?;
        let place = stats.containers.iter().position(|found| found.status.id == container.id);
        // It ended while its guest was asked.
        let ended = || Error::State {
            thing: format!("container {}", container.id),
            state: "exited".into(),
            action: "tell what it uses",
        };
        let found = stats.containers.swap_remove(place.ok_or_else(ended)?);
        Ok((stats, found))
    }

    /// What the pods' writable disks and records take of the host's file system. Blocks.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn disk_usage(&self) -> Result<DiskUsage> {
        let directory = self.pods_directory();
        let mut usage = DiskUsage { directory: directory.clone(), bytes: 0, inodes: 0 };
        let mut pending = vec![directory];
        while let Some(path) = pending.pop() {
            // What is not there any more takes nothing.
            let Ok(metadata) = path.symlink_metadata() else { continue };
            usage.inodes += 1;
            usage.bytes = usage.bytes.saturating_add(metadata.blocks().saturating_mul(512));
            if metadata.is_dir() {
                match fs::read_dir(&path) {
                    Ok(entries) => pending.extend(entries.flatten().map(|entry| entry.path())),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(Error::io("read directory", &path)(error)),
                }
            }
        }
        Ok(usage)
    }
}

impl Sandbox {
    /// Asks the guest and the host.
    pub async fn stats(&self, processes: bool) -> Result<SandboxStats> {
        let status = self.status();
        if status.state != SandboxState::Ready {
            let thing = format!("sandbox {}", self.id);
            return Err(Error::State { thing, state: "not ready".into(), action: "tell what it uses" });
        }
        let config = self.configuration();
        let limit = PATIENCE.mul_f64(config.timeout_scale).min(config.call_deadline());
        // Somebody asks it already until it answers.
        if !self.agent().answers() {
            return Err(Error::Deadline { action: "an answer of the guest".into(), limit });
        }
        let mut client = self.agent().client();
        let asked = tokio::time::timeout(limit, client.stats(api::StatsRequest { processes }));
        let action = "read what the pod uses";
        let answer = match asked.await {
            Ok(Ok(answer)) => replies::stats(answer.into_inner()),
            Ok(Err(refusal)) => return Err(crate::agent::error(action, &refusal)),
            Err(_) => return Err(Error::Deadline { action: action.into(), limit }),
        };
        let (cgroup, pid) = (self.cgroup()?, status.vmm_pid);
        let host = tokio::task::spawn_blocking(move || host::usage(&cgroup, pid))
            .await
            .map_err(|e| Error::Internal(e.to_string()))?;
        let rates = self.rates();
        let nano_cores = rates.pod.lock().unwrap_or_else(PoisonError::into_inner).of(&host);
        let containers = self.running_containers(answer.containers, rates);
        Ok(SandboxStats {
            directory: self.pods_directory(),
            status,
            at: clock::now(),
            host,
            nano_cores,
            guest: answer.pod.unwrap_or_default(),
            interfaces: answer.interfaces,
            scratch: answer.scratch,
            containers,
        })
    }

    /// Brings the guest's answer together with what is known of its containers. What it says
    /// of others is not heard.
    fn running_containers(&self, usages: Vec<ContainerUsage>, rates: &Rates) -> Vec<ContainerStats> {
        let mut usages: HashMap<_, _> = usages.into_iter().map(|usage| (usage.container_id.clone(), usage)).collect();
        let mut before = rates.containers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = HashMap::new();
        let mut found = Vec::new();
        for container in self.containers() {
            let status = self.container_status(&container);
            if status.state != ContainerState::Running {
                continue;
            }
            let Some(usage) = usages.remove(&status.id) else { continue };
            let mut rate = before.remove(&status.id).unwrap_or_default();
            let nano_cores = usage.group.as_ref().and_then(|group| rate.of(group));
            now.insert(status.id.clone(), rate);
            found.push(ContainerStats { status, usage, nano_cores });
        }
        *before = now;
        found
    }
}
