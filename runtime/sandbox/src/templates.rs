//! Guests to be cloned: of each size that pods often have, one that has booted and has no pod.
//!
//! A guest without a pod is like any other of its size. So one is booted until its agent is
//! ready, saved, and from then on a pod's VMM goes on from there instead of booting: it shares
//! the memory that it does not write to with all others.
//!
//! A size is saved when a pod asks for it a second time, that of pods without limits when the
//! daemon starts; who asks meanwhile waits. What is saved is kept in a directory that outlives
//! the daemon, by a name that says what it was made of: another kernel, agent, program or boot
//! of the host, and it is of no use. Nothing depends on it: a guest that cannot be cloned boots.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nacelle_proto::agent::v1 as api;
use nacelle_vmm::config::{SavedFiles, Start};
use rustix::fs::{FlockOperation, flock, statvfs};
use tokio::sync::Mutex as Turn;

use crate::agent::Agent;
use crate::handlers::GuestKind;
use crate::id;
use crate::layout::{Layout, PodPaths};
use crate::sizing::GuestSize;
use crate::vm::Vm;
use crate::{Error, GuestConfig, ManagerConfig, Result, oom};

/// After a failure, guests boot for this long before it is tried again.
const RETRY: Duration = Duration::from_secs(600);
/// Of a file system, this part stays free for others: what is in a tmpfs is the host's memory, and
/// /run is also systemd's.
const RESERVE: u64 = 4;
/// What a guest touches until its agent is ready, beside the descriptors of its pages; generous.
const TOUCHED_MIB: u64 = 96;
/// Ends the name of what is being made.
const UNFINISHED: &str = "new";
/// Kinds of guests of which it is known that they were asked for.
const KINDS: usize = 1024;

/// All templates of a host. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Templates {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Arc<ManagerConfig>,
    layout: Layout,
    /// What was asked for, by the name of its template.
    kinds: Mutex<BTreeMap<String, Arc<Kind>>>,
}

/// What is known of one kind of guests.
#[derive(Debug, Default)]
struct Kind {
    /// Held by who makes its template; when it was in vain.
    turn: Turn<Option<Instant>>,
}

impl Templates {
    /// Those in the configured directory. What a daemon that was killed left unfinished is
    /// removed.
    pub fn open(config: Arc<ManagerConfig>, layout: Layout) -> Self {
        let templates = Self { shared: Arc::new(Shared { config, layout, kinds: Mutex::default() }) };
        templates.tidy();
        templates
    }

    /// How guests are made.
    pub fn config(&self) -> &Arc<ManagerConfig> {
        &self.shared.config
    }

    fn directory(&self) -> &Path {
        &self.shared.config.guest.template_directory
    }

    /// What a pod with such a guest starts from.
    pub async fn origin(&self, kind: &GuestKind) -> Start {
        let Some(name) = self.name(kind) else { return Start::Boot };
        if let Some(start) = self.find(&name) {
            return start;
        }
        match self.asked_before(&name) {
            Some(entry) => self.make(kind, &name, &entry).await,
            None => Start::Boot,
        }
    }

    /// Has the templates of these made that there are none of, one after the other. Returns at once.
    pub fn prepare(&self, kinds: Vec<GuestKind>) {
        let missing = |kind: &GuestKind| self.name(kind).filter(|name| self.find(name).is_none());
        let mut missing: Vec<_> = kinds.into_iter().filter_map(|kind| Some((missing(&kind)?, kind))).collect();
        missing.truncate(self.config().guest.templates.into());
        // So that the first pod waits for it.
        missing.iter().for_each(|(name, _)| drop(self.asked_before(name)));
        let templates = self.clone();
        tokio::spawn(async move {
            for (_, kind) in missing {
                templates.origin(&kind).await;
            }
        });
    }

    /// Removes the template of such guests: it is of no use.
    pub fn forget(&self, kind: &GuestKind) {
        if let Some(name) = self.name(kind) {
            remove(&self.directory().join(name));
        }
    }

    /// The kind of this name, if it is not the first time that somebody asks for it.
    fn asked_before(&self, name: &str) -> Option<Arc<Kind>> {
        let mut kinds = self.shared.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kinds.get(name) {
            return Some(known.clone());
        }
        if kinds.len() >= KINDS {
            kinds.clear();
        }
        kinds.insert(name.to_owned(), Arc::default());
        None
    }

    /// The template of this name, if there is one, which is now the one used last.
    fn find(&self, name: &str) -> Option<Start> {
        let directory = self.directory().join(name);
        File::open(&directory).and_then(|open| open.set_modified(SystemTime::now())).ok()?;
        Some(Start::Clone(files(&directory)))
    }

    /// Makes the template of such guests, by this name, if nobody else has made it meanwhile.
    async fn make(&self, kind: &GuestKind, name: &str, entry: &Kind) -> Start {
        let mut failed = entry.turn.lock().await;
        if let Some(start) = self.find(name) {
            return start;
        }
        if failed.is_some_and(|when| when.elapsed() < RETRY) {
            return Start::Boot;
        }
        match self.boot_and_save(kind, name).await {
            Ok(()) => {
                self.tidy();
                *failed = None;
                self.find(name).unwrap_or(Start::Boot)
            }
            Err(error) => {
                *failed = Some(Instant::now());
                let size = kind.size;
                tracing::warn!(?size, %error, "no template for guests of this size: they boot");
                Start::Boot
            }
        }
    }

    async fn boot_and_save(&self, kind: &GuestKind, name: &str) -> Result<()> {
        let size = kind.size;
        let directory = self.directory();
        fs::create_dir_all(directory).map_err(Error::io("create directory", directory))?;
        check_space(directory, size)?;
        // Below the pods', where a sweep finds what is of no pod.
        let id = id::new_template()?;
        let paths = self.shared.layout.pod(&id);
        let work = Work { run: paths.run.clone(), saved: directory.join(format!("{name}.{id}.{UNFINISHED}")) };
        for path in [&work.run, &work.saved] {
            // What all clones have in memory is nobody else's to read.
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o700).create(path).map_err(Error::io("create directory", path))?;
        }
        // Released by the kernel if this process is killed.
        let lock = File::open(&work.saved).map_err(Error::io("open", &work.saved))?;
        let _ = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        let begun = Instant::now();
        self.save(&id, &paths, kind, &work.saved).await?;
        let made = directory.join(name);
        match fs::rename(&work.saved, &made) {
            // Another daemon was faster.
            Err(_) if made.exists() => {}
            result => result.map_err(Error::io("rename", &work.saved))?,
        }
        tracing::info!(memory_mib = size.memory_mib, vcpus = size.vcpus, took = ?begun.elapsed(), "guests are cloned");
        Ok(())
    }

    async fn save(&self, id: &str, paths: &PodPaths, kind: &GuestKind, saved: &Path) -> Result<()> {
        let config = self.config();
        let (vm, sign) = Vm::spawn(config, id, paths, kind, Start::Template(files(saved)), None, oom::NEUTRAL).await?;
        let made = async {
            vm.ready(sign, config.boot_deadline()).await?;
            // What it takes to answer a call is in memory from then on.
            let agent = Agent::new(paths.vsock(), config.call_deadline(), config.unknown_after());
            let mut client = agent.client();
            agent.call("ask a template", client.info(api::InfoRequest {})).await?;
            vm.save().await
        };
        let made = made.await;
        vm.kill().await?;
        made
    }

    /// Removes what was used longest ago of what is too many, and what was left unfinished.
    fn tidy(&self) {
        let directory = self.directory();
        let Ok(entries) = fs::read_dir(directory) else { return };
        let mut kept = Vec::new();
        for entry in entries.filter_map(std::io::Result::ok) {
            let path = entry.path();
            let unfinished = path.extension().is_some_and(|extension| extension == UNFINISHED);
            if unfinished {
                let alone =
                    File::open(&path).is_ok_and(|open| flock(&open, FlockOperation::NonBlockingLockExclusive).is_ok());
                if alone {
                    remove(&path);
                }
            } else {
                kept.push((entry.metadata().and_then(|data| data.modified()).ok(), path));
            }
        }
        kept.sort();
        let extra = kept.len().saturating_sub(self.config().guest.templates.into());
        kept.iter().take(extra).for_each(|(_, path)| remove(path));
    }

    /// Of a template's directory; none if guests of this kind are not cloned, or cannot be made.
    fn name(&self, kind: &GuestKind) -> Option<String> {
        let GuestKind { guest, size } = kind;
        if guest.templates == 0 || self.config().guest.templates == 0 {
            return None;
        }
        let generation = self.generation(guest).ok()?;
        Some(format!("{generation}-{}-{}", size.memory_mib, size.vcpus))
    }

    /// Stands for everything a template of any size is made of.
    fn generation(&self, guest: &GuestConfig) -> Result<String> {
        let config = self.config();
        let mut hasher = DefaultHasher::new();
        for path in [&config.program, &guest.kernel, &guest.initramfs] {
            let data = fs::metadata(path).map_err(Error::io("look at", path))?;
            (data.dev(), data.ino(), data.size(), data.mtime(), data.mtime_nsec()).hash(&mut hasher);
        }
        config.guest_command_line(guest).hash(&mut hasher);
        // Processors and clocks are those of one boot of the host.
        fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default().hash(&mut hasher);
        Ok(format!("{:016x}", hasher.finish()))
    }
}

/// The directories of a template that is being made. Removed when dropped.
struct Work {
    run: PathBuf,
    saved: PathBuf,
}

impl Drop for Work {
    fn drop(&mut self) {
        [&self.run, &self.saved].into_iter().for_each(|path| remove(path));
    }
}

fn files(directory: &Path) -> SavedFiles {
    SavedFiles { memory: directory.join("memory"), state: directory.join("state") }
}

/// Removes a directory with files. Machines that started from them keep their memory.
fn remove(directory: &Path) {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %directory.display(), %error, "not removed");
        }
        _ => {}
    }
}

/// What a template of this size takes of its file system at most, in MiB, before anybody clones
/// it: what a guest has touched when its agent is ready. Its VMM can go no further.
fn needed_mib(size: GuestSize) -> u64 {
    // Page descriptors and hash tables, and what kernel, initramfs and agent have written in huge pages.
    (TOUCHED_MIB + size.memory_mib / 45).min(size.memory_mib)
}

/// A template that does not fit would take the space that others need, and end with its VMM. Those
/// that were removed count for as long as a clone has their memory.
fn check_space(directory: &Path, size: GuestSize) -> Result<()> {
    let needed = needed_mib(size);
    let status = statvfs(directory).map_err(|error| Error::io("look at", directory)(error.into()))?;
    let mib = |blocks: u64| blocks.saturating_mul(status.f_frsize) >> 20;
    check_room(directory, mib(status.f_bavail), mib(status.f_blocks), needed)
}

fn check_room(directory: &Path, free: u64, total: u64, needed: u64) -> Result<()> {
    let reserve = total / RESERVE;
    if free < needed.saturating_add(reserve) {
        return Err(Error::Exhausted(format!(
            "{} has {free} MiB left, of which {reserve} are kept for others, and a template may need {needed}: make \
             room, configure guest.template_directory, or set guest.templates to 0",
            directory.display()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_leaves_a_quarter_of_its_file_system_to_others() {
        let room = |free, needed| check_room(Path::new("/run/t"), free, 4000, needed);
        room(1100, 100).unwrap();
        let error = room(1099, 100).unwrap_err().to_string();
        assert!(error.contains("1099 MiB left, of which 1000 are kept"), "{error}");
        assert!(error.contains("/run/t") && error.contains("guest.template_directory"), "{error}");
        check_space(Path::new("/proc/self/no-such-directory"), GuestSize { memory_mib: 1, vcpus: 1 }).unwrap_err();
    }

    #[test]
    fn a_larger_guest_touches_more() {
        let needed = |memory_mib| needed_mib(GuestSize { memory_mib, vcpus: 1 });
        assert_eq!((needed(64), needed(256), needed(64 << 10)), (64, 101, 1552));
    }
}
