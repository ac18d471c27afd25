//! The lock of all networks of the host: joining and leaving share it, GC has it alone.
//!
//! `nacelle run` and several daemons may have pods on the same networks, whatever their directories. So it lies in
//! one place for all, and nobody but root can open it: who can, can hold it.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::cancel::Cancel;
use crate::{Error, Result};

/// Where it is, unless a test has its own.
pub const LOCK: &str = "/run/nacelle-cni.lock";
/// Between two tries: there is no way to wait for such a lock that has an end.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));
/// Holders that are named in an error.
const NAMED: usize = 5;

/// How it is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// By whoever adds a pod to a network or takes it off.
    Shared,
    /// By whoever says which pods there are.
    Alone,
}

/// Held until it is dropped.
#[derive(Debug)]
pub struct Held {
    _file: File,
}

/// Takes the lock. Blocks, at most as long as `limit`.
///
/// # Errors
/// It is held by others for too long, `cancel` was asked for, or it is no file of ours alone.
pub fn take(path: &Path, how: How, limit: Duration, cancel: Option<&Cancel>) -> Result<Held> {
    let deadline = Instant::now() + limit;
    let mut pause = PAUSES.0;
    loop {
        let file = open(path)?;
        let operation = match how {
            How::Shared => FlockOperation::NonBlockingLockShared,
            How::Alone => FlockOperation::NonBlockingLockExclusive,
        };
        match flock(&file, operation) {
            Ok(()) if still_there(path, &file) => return Ok(Held { _file: file }),
            // Somebody has removed it meanwhile.
            Ok(()) | Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::path("lock", path)(error)),
        }
        if cancel.is_some_and(Cancel::asked) {
            return Err(Error::Cancelled);
        }
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(Error::Locked { path: path.into(), limit, holders: holders(&file) });
        }
        thread::sleep(pause.min(rest));
        pause = (pause * 2).min(PAUSES.1);
    }
}

fn open(path: &Path) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(path)
        .map_err(Error::path("open the lock", path))?;
    let found = file.metadata().map_err(Error::path("look at the lock", path))?;
    let own = found.uid() == rustix::process::geteuid().as_raw() && found.permissions().mode() & 0o077 == 0;
    if !found.is_file() || !own {
        let words = "it must be a file that nobody but its owner, the user of nacelle, can open: remove it";
        return Err(Error::path("use the lock", path)(std::io::Error::other(words)));
    }
    Ok(file)
}

fn still_there(path: &Path, file: &File) -> bool {
    let (Ok(named), Ok(held)) = (fs::symlink_metadata(path), file.metadata()) else { return false };
    (named.dev(), named.ino()) == (held.dev(), held.ino())
}

/// Who holds a lock on the file, in words.
fn holders(file: &File) -> String {
    let Ok(found) = file.metadata() else { return "nobody knows whom".into() };
    let device = found.dev();
    let name = format!("{:02x}:{:02x}:{}", rustix::fs::major(device), rustix::fs::minor(device), found.ino());
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let of_file = locks.lines().filter_map(|line| {
        // NUMBER: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF; "->" stands before one that waits.
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        (words.get(1) == Some(&"FLOCK") && words.get(5) == Some(&name.as_str())).then(|| words.get(4).copied())?
    });
    let named: Vec<_> = of_file
        .take(NAMED)
        .map(|pid| {
            let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("process {pid} ({})", command.trim())
        })
        .collect();
    if named.is_empty() { "a process that cannot be seen from here".into() } else { named.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_share_it_or_one_has_it_and_who_waits_too_long_is_told_for_whom() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let now = Duration::ZERO;
        let shared = [take(&path, How::Shared, now, None).unwrap(), take(&path, How::Shared, now, None).unwrap()];
        let error = take(&path, How::Alone, Duration::from_millis(20), None).unwrap_err().to_string();
        for word in [path.to_str().unwrap(), &format!("process {} (", std::process::id()), "20ms"] {
            assert!(error.contains(word), "no {word:?} in {error}");
        }
        drop(shared);
        let alone = take(&path, How::Alone, now, None).unwrap();
        take(&path, How::Shared, now, None).unwrap_err();
        let cancel = Cancel::new().unwrap();
        cancel.ask();
        let error = take(&path, How::Shared, Duration::from_secs(1000), Some(&cancel)).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        // Removed, it is another's no longer.
        fs::remove_file(&path).unwrap();
        take(&path, How::Shared, now, None).unwrap();
        drop(alone);
    }

    #[test]
    fn it_is_nobody_else_s() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        drop(take(&path, How::Shared, Duration::ZERO, None).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = take(&path, How::Shared, Duration::ZERO, None).unwrap_err().to_string();
        assert!(error.contains("remove it"), "{error}");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &link).unwrap();
        take(&link, How::Shared, Duration::ZERO, None).unwrap_err();
        assert!(!directory.path().join("elsewhere").exists());
    }
}
