//! What a daemon does first: adopts the pods that run, records the end of those that do
//! not, and removes what a crash has left without an owner.

use std::collections::HashSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nacelle_network::{Network, Pod};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::task::JoinSet;

use crate::cgroup::Cgroup;
use crate::container::Container;
use crate::events::Events;
use crate::layout::{Layout, PodPaths};
use crate::model::SandboxState;
use crate::record::{self, ContainerRecord, SandboxRecord};
use crate::sandbox::Sandbox;
use crate::templates::Templates;
use crate::{Error, Result};

/// Returns the sandboxes that are there after all of this.
pub async fn restore(
    templates: &Templates,
    network: &Network,
    events: &Events,
    layout: &Layout,
) -> Result<Vec<Arc<Sandbox>>> {
    let mut records = Vec::new();
    for id in names(&layout.pods_root())? {
        let paths = layout.pod(&id);
        match record::read::<SandboxRecord>(&paths.record()) {
            Ok(record) if record.id == id && record.state != SandboxState::Creating => records.push((paths, record)),
            Ok(_) => tracing::warn!(sandbox = id, "half made when the last daemon ended: removing it"),
            Err(error) => tracing::warn!(sandbox = id, %error, "removing a sandbox without a usable record"),
        }
    }
    let owned: HashSet<String> = records.iter().map(|(_, record)| record.id.clone()).collect();
    let orphans = remove_unowned(network, layout, &owned).await;
    let mut tasks = JoinSet::new();
    for (paths, record) in records {
        let (templates, network, events) = (templates.clone(), network.clone(), events.clone());
        tasks.spawn(async move { restore_one(templates, network, events, paths, record).await });
    }
    let mut sandboxes = Vec::new();
    while let Some(done) = tasks.join_next().await {
        sandboxes.push(done.map_err(|e| Error::Internal(e.to_string()))??);
    }
    let running = sandboxes.iter().filter(|s| s.state() == SandboxState::Ready).count();
    if !sandboxes.is_empty() || orphans > 0 {
        tracing::info!(running, ended = sandboxes.len() - running, orphans, "pods taken over");
    }
    Ok(sandboxes)
}

async fn restore_one(
    templates: Templates,
    network: Network,
    events: Events,
    paths: PodPaths,
    record: SandboxRecord,
) -> Result<Arc<Sandbox>> {
    let id = record.id.clone();
    let state = record.state;
    let containers = containers(&paths)?;
    let sandbox = Sandbox::new(templates, network, events, paths, record);
    if state == SandboxState::Ready {
        match sandbox.adopt(containers.clone()).await {
            Ok(()) => return Ok(sandbox),
            Err(error) => tracing::warn!(sandbox = id, %error, "not adopted"),
        }
    }
    sandbox.restore_ended(containers, "the guest ended while no daemon was there")?;
    Ok(sandbox)
}

/// The containers on record; a damaged record costs that container only.
fn containers(paths: &PodPaths) -> Result<Vec<Arc<Container>>> {
    let mut containers = Vec::new();
    for name in names(&paths.containers())? {
        let path = paths.containers().join(&name);
        if path.extension().is_none_or(|extension| extension != "json") {
            // A replacement that was never finished.
            let _ = fs::remove_file(&path);
            continue;
        }
        match record::read::<ContainerRecord>(&path) {
            Ok(record) => containers.push(Container::restore(path, record)),
            Err(error) => {
                tracing::warn!(%error, "removing a container without a usable record");
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
    }
    Ok(containers)
}

/// Removes processes, networks, cgroups and directories that belong to no recorded sandbox
/// and returns how many sandboxes they were of.
async fn remove_unowned(network: &Network, layout: &Layout, owned: &HashSet<String>) -> usize {
    let mut orphans = HashSet::new();
    for (pid, id) in vmm_processes(&layout.pods_run()) {
        if !owned.contains(&id) {
            kill(pid);
            orphans.insert(id);
        }
    }
    for directory in [layout.pods_root(), layout.pods_run()] {
        orphans.extend(names(&directory).unwrap_or_default().into_iter().filter(|id| !owned.contains(id)));
    }
    for id in &orphans {
        let paths = layout.pod(id);
        let parent = record::read::<SandboxRecord>(&paths.record()).map(|r| r.config.cgroup_parent).unwrap_or_default();
        let cgroup = Cgroup::named(&parent, id).and_then(|cgroup| cgroup.remove());
        if let Err(error) = cgroup {
            tracing::warn!(sandbox = %id, %error, "cgroup not removed");
        }
        let pod = Pod { id: id.clone(), ..Pod::default() };
        let detached = network.detach(pod, paths.network()).await;
        if let Err(error) = &detached {
            tracing::warn!(sandbox = %id, %error, "network not removed: it is tried again at the next start");
        }
        let kept = detached.is_err().then_some(&paths.root);
        for path in [&paths.run, &paths.root].into_iter().filter(|path| Some(*path) != kept) {
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "not removed");
                }
                _ => {}
            }
        }
    }
    orphans.len()
}

/// Every VMM whose configuration lies under `pods`, with its sandbox's id.
fn vmm_processes(pods: &Path) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    for name in names(Path::new("/proc")).unwrap_or_default() {
        let Ok(pid) = name.parse::<u32>() else { continue };
        let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let mut words = command.split(|byte| *byte == 0).skip(1);
        if words.next() != Some(b"vmm") || words.next() != Some(b"--config") {
            continue;
        }
        let Some(path) = words.next().map(|word| PathBuf::from(std::ffi::OsStr::from_bytes(word))) else { continue };
        if let Some(id) = path.strip_prefix(pods).ok().and_then(Path::parent).and_then(Path::to_str) {
            found.push((pid, id.to_owned()));
        }
    }
    found
}

/// Kills a process and waits until it is gone.
fn kill(pid: u32) {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return };
    let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
    let mut wait = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
    let _ = rustix::event::poll(&mut wait, Some(&limit));
}

/// Names in a directory; none if it does not exist.
fn names(directory: &Path) -> Result<Vec<String>> {
    match fs::read_dir(directory) {
        Ok(entries) => {
            Ok(entries.filter_map(std::io::Result::ok).filter_map(|e| e.file_name().into_string().ok()).collect())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::io("read directory", directory)(error)),
    }
}
