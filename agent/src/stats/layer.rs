//! How much of the scratch disk an upper layer takes: its files, counted.
//!
//! Counting takes time that grows with the number of files, and a container may have any
//! number of them. So a count is used again for [`REUSE`] times as long as it took to make,
//! which bounds what counting costs of a processor; one that takes longer than a call may
//! goes on in the background, and its predecessor is the answer meanwhile.
//!
//! The container changes the tree while it is walked. No link is followed and every
//! directory is opened relative to its parent, so the walk cannot be led out of the layer.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nacelle_proto::agent::v1::LayerUsage;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, statat};

/// How long a call waits for counts.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// For how many times its own cost a count is used again.
const REUSE: u32 = 20;
/// For how long at most.
const REUSE_LIMIT: Duration = Duration::from_secs(60);
/// How deep a tree is looked into: each level holds a descriptor open.
const DEPTH_LIMIT: usize = 1024;
/// How many files of several names are told apart from each other's names; further ones
/// count by each name.
const LINKED_LIMIT: usize = 1 << 16;

/// The count of one layer.
#[derive(Debug, Default)]
pub struct Layer {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    counted: Condvar,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Count>,
    counting: bool,
}

#[derive(Debug, Clone, Copy)]
struct Count {
    usage: LayerUsage,
    /// When it is to be made anew.
    expires: Instant,
}

impl Layer {
    /// The usage of the layer at `root`; none if it is not known until `deadline`.
    pub fn measure(&self, root: &Path, deadline: Instant) -> Option<LayerUsage> {
        let mut state = self.shared.lock();
        if let Some(count) = state.last.filter(|count| Instant::now() < count.expires) {
            return Some(count.usage);
        }
        if !state.counting {
            let (shared, root) = (self.shared.clone(), root.to_owned());
            let spawned = std::thread::Builder::new().name("layer".into()).spawn(move || shared.count(&root));
            state.counting = spawned.is_ok();
        }
        while state.counting {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.shared.counted.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.last.map(|count| count.usage)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, root: &Path) {
        let begun = Instant::now();
        let usage = count(root);
        let ended = Instant::now();
        let mut state = self.lock();
        state.counting = false;
        if let Ok(usage) = usage {
            let expires = ended + ((ended - begun) * REUSE).min(REUSE_LIMIT);
            state.last = Some(Count { usage, expires });
        }
        self.counted.notify_all();
    }
}

/// Counts what is below `root`, a file of several names once.
fn count(root: &Path) -> rustix::io::Result<LayerUsage> {
    let mut usage = LayerUsage::default();
    let mut linked = HashSet::new();
    let mut stack = vec![open(rustix::fs::CWD, root)?];
    while let Some(directory) = stack.last_mut() {
        let Some(Ok(entry)) = directory.read() else {
            stack.pop();
            continue;
        };
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let Ok(fd) = directory.fd() else { continue };
        // It may have gone since.
        let Ok(stat) = statat(fd, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !is_directory && stat.st_nlink > 1 {
            if linked.contains(&stat.st_ino) {
                continue;
            }
            if linked.len() < LINKED_LIMIT {
                linked.insert(stat.st_ino);
            }
        }
        usage.inodes = usage.inodes.saturating_add(1);
        usage.bytes = usage.bytes.saturating_add(u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512));
        if is_directory
            && stack.len() < DEPTH_LIMIT
            && let Some(Ok(child)) = stack.last().and_then(|parent| parent.fd().ok()).map(|fd| open(fd, name))
        {
            stack.push(child);
        }
    }
    Ok(usage)
}

fn open(parent: impl std::os::fd::AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<Dir> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd: OwnedFd = openat(parent, name, flags, Mode::empty())?;
    Dir::new(fd)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[test]
    fn every_file_counts_once_and_links_lead_nowhere() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("upper");
        let outside = directory.path().join("outside");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("large"), vec![1; 1 << 20]).unwrap();
        fs::write(root.join("a/file"), vec![1; 64 << 10]).unwrap();
        fs::hard_link(root.join("a/file"), root.join("a/b/same")).unwrap();
        std::os::unix::fs::symlink(&outside, root.join("out")).unwrap();
        let usage = count(&root).unwrap();
        // a, a/b, the file, the link.
        assert_eq!(usage.inodes, 4);
        assert!((64 << 10..128 << 10).contains(&usage.bytes), "{usage:?}");
        assert!(count(&directory.path().join("none")).is_err());
    }

    #[test]
    fn a_count_is_made_again_when_it_has_expired() {
        let directory = tempfile::tempdir().unwrap();
        let layer = Layer::default();
        assert_eq!(layer.measure(directory.path(), soon()), Some(LayerUsage::default()));
        fs::write(directory.path().join("file"), "x").unwrap();
        let until = soon();
        while layer.measure(directory.path(), soon()).unwrap().inodes == 0 {
            assert!(Instant::now() < until, "never counted again");
        }
        assert_eq!(Layer::default().measure(&directory.path().join("none"), soon()), None);
    }

    #[test]
    fn a_tree_deeper_than_the_limit_ends_the_walk_there() {
        let directory = tempfile::tempdir().unwrap();
        let mut path = directory.path().to_owned();
        for _ in 0..DEPTH_LIMIT + 5 {
            path.push("d");
            // Longer than a path may be, in the end: made step by step.
            if fs::create_dir(&path).is_err() {
                break;
            }
        }
        let usage = count(directory.path()).unwrap();
        assert!(usage.inodes >= 1000, "{usage:?}");
    }
}
