//! What a daemon finds when it starts: the pods on record, and what no record owns.
//!
//! Looking changes nothing. What is ours is known by evidence that nobody else can make: a directory below ours that is
//! called by an id, the process that its VMM wrote down there before it did anything for its guest, the control group
//! named by its record. What cannot be told is kept, listed, and looked at again.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};

use crate::beneath::Directory;
use crate::container::Container;
use crate::id::{is_id, is_template};
use crate::layout::{Layout, PodPaths};
use crate::model::SandboxState;
use crate::record::{self, ContainerRecord, ProcessId, SandboxRecord, Unusable, sketch_container, sketch_sandbox};
use crate::sandbox::{Means, Sandbox};
use crate::{Error, Result, vm};

/// The longest file with a VMM's process.
const PROCESS_LIMIT: u64 = 256;

/// What is there.
#[derive(Debug, Default)]
pub struct Found {
    /// Pods on record, those whose records cannot be used included.
    pub sandboxes: Vec<Arc<Sandbox>>,
    /// Ids of pods that were half made when the last daemon ended, or half removed.
    pub unowned: Vec<String>,
    /// Names of templates that were being made.
    pub templates: Vec<String>,
}

/// Looks. Blocks.
///
/// # Errors
/// The directories of pods cannot be listed: then nothing can be said of any.
pub fn look(means: &Means, layout: &Layout) -> Result<Found> {
    let mut found = Found::default();
    for id in names(&layout.pods_root())? {
        if !is_id(&id) {
            tracing::warn!(target: "nacelle::recovery", path = %layout.pods_root().join(&id).display(), "not ours: left alone");
            continue;
        }
        match look_at(means, layout.pod(&id), &id)? {
            Some(sandbox) => found.sandboxes.push(sandbox),
            None => found.unowned.push(id),
        }
    }
    for name in names(&layout.pods_run())? {
        if is_template(&name) {
            found.templates.push(name);
        } else if is_id(&name) && !layout.pod(&name).root.exists() {
            match look_at(means, layout.pod(&name), &name)? {
                Some(sandbox) => found.sandboxes.push(sandbox),
                None => found.unowned.push(name),
            }
        }
    }
    Ok(found)
}

/// The pod of this id as its record says; none if nobody was told its id, or it is no more.
pub fn look_at(means: &Means, paths: PodPaths, id: &str) -> Result<Option<Arc<Sandbox>>> {
    let means = means.clone();
    let why = match record::read::<SandboxRecord>(&paths.record(), id) {
        Ok(record) if record.state == SandboxState::Creating => return Ok(None),
        Ok(record) => {
            return match containers(&paths, id) {
                Ok(containers) => Ok(Some(Sandbox::restored(means, paths, record, containers))),
                // As unreadable as its own record.
                Err(error) => {
                    let why = Unusable::Unreadable(std::io::Error::other(error.to_string()));
                    let sketch = sketch_sandbox(&paths.record(), id);
                    Ok(Some(Sandbox::kept(means, paths, sketch, why, Vec::new())))
                }
            };
        }
        Err(Unusable::Absent) if !matches!(process_of_vmm(&paths), Ok(Some(process)) if runs(&process)) => {
            return Ok(None);
        }
        Err(why) => why,
    };
    let mut sketch = sketch_sandbox(&paths.record(), id);
    // What its record says of its end counts for nothing: what runs, runs.
    if let Some(process) = sketch.vmm.clone().or_else(|| process_of_vmm(&paths).ok().flatten()) {
        sketch.state = if runs(&process) { SandboxState::Ready } else { SandboxState::NotReady };
        sketch.vmm = Some(process);
    }
    // Nobody can work with a pod of which only an id is known; it can be stopped and removed.
    if matches!(why, Unusable::Torn(_) | Unusable::Absent) {
        sketch.state = SandboxState::NotReady;
    }
    sketch.message = why.to_string();
    tracing::error!(target: "nacelle::recovery", sandbox = id, error = %why, "kept as it is");
    let containers = containers(&paths, id).unwrap_or_default();
    Ok(Some(Sandbox::kept(means, paths, sketch, why, containers)))
}

/// Whether a process runs, as far as can be told.
fn runs(process: &ProcessId) -> bool {
    !matches!(process.hold(), Ok(None))
}

/// The containers on record. One whose record cannot be used is kept as far as it is known.
fn containers(paths: &PodPaths, sandbox_id: &str) -> Result<Vec<Arc<Container>>> {
    let mut containers = Vec::new();
    for name in names(&paths.containers())? {
        let Some(id) = name.strip_suffix(".json").filter(|id| is_id(id)) else { continue };
        let path = paths.containers().join(&name);
        match record::read::<ContainerRecord>(&path, id) {
            Ok(record) => containers.push(Container::restore(path, record)),
            Err(Unusable::Absent) => {}
            Err(why) => {
                tracing::error!(target: "nacelle::recovery", sandbox = sandbox_id, container = id, error = %why, "kept as it is");
                let sketch = sketch_container(&path, id, sandbox_id);
                containers.push(Container::kept(path, sketch, why));
            }
        }
    }
    Ok(containers)
}

/// The process that a VMM wrote into its run directory; none if none did.
///
/// # Errors
/// It cannot be read.
pub fn process_of_vmm(paths: &PodPaths) -> Result<Option<ProcessId>> {
    if !paths.vmm_process().exists() {
        return Ok(None);
    }
    let text = Directory::open(&paths.run)?.read(paths.vmm_process().file_name().unwrap_or_default(), PROCESS_LIMIT)?;
    let identity = nacelle_vmm::identity::Identity::parse(&text).ok();
    Ok(identity.map(|identity| ProcessId {
        pid: identity.pid,
        start_time: identity.start_time,
        boot_id: identity.boot_id,
    }))
}

/// Ends the VMM of a run directory, if there is one: as its control socket lets it, and by its process. Blocks.
///
/// # Errors
/// It does not go.
pub fn end_vmm(paths: &PodPaths, limit: Duration) -> Result<()> {
    if paths.control().exists() {
        // One of the first release did not write its process down.
        let _ = vm::stop(paths.run.clone(), limit);
    }
    let Some(process) = process_of_vmm(paths)? else { return Ok(()) };
    end_process(&process, limit)
}

/// Ends a process and waits until it is gone. Blocks.
pub fn end_process(process: &ProcessId, limit: Duration) -> Result<()> {
    let failed = || Error::io("take hold of the VMM by", format!("/proc/{}", process.pid));
    let Some(pidfd) = process.hold().map_err(failed())? else { return Ok(()) };
    let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    let mut wait = [PollFd::new(&pidfd, PollFlags::IN)];
    let within = Timespec { tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
    match poll(&mut wait, Some(&within)) {
        Ok(0) => {
            Err(Error::Deadline { action: format!("the end of VMM process {} after SIGKILL", process.pid), limit })
        }
        _ => Ok(()),
    }
}

/// Names in a directory; none if it does not exist.
///
/// # Errors
/// Not all of them can be told.
pub fn names(directory: &Path) -> Result<Vec<String>> {
    let failed = || Error::io("read directory", directory);
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed())?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(failed())?.file_name().into_string());
    }
    Ok(names)
}
