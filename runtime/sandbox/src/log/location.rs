//! Where a log lies, and whom that path is trusted.
//!
//! A log's path is the pod's log directory (the kubelet's: `/var/log/pods/<namespace>_<name>_<uid>`) and a name in it
//! (`<container>/<attempt>.log`). Who says so is trusted; who can change what lies there is not. A pod that has a volume of
//! `/var/log`, or of anything below, can replace every component below by a link, a named pipe or an endless file, and to the
//! host it is root: a link's owner tells nothing. On the other hand `/var/log`, `/var/log/pods` or the directory that holds them
//! may well be a link that an administrator made to another disk, and the kubelet follows it.
//!
//! So the line is drawn by position. Links are followed up to the directory that the pod's log directory is *in*, and nowhere
//! from the log directory's own name on. That this is enough comes from that name, which is the pod's alone: whoever turns
//! `/var/log/pods` elsewhere finds this program looking there for a directory of this pod's name and, in it, one of the
//! container's, neither of them a link. Only the kubelet makes those (by the same link), or this program, or the pod itself
//! where it can write anyway. What is nobody's log is neither read, written nor cut.

use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::beneath::Directory;
use crate::{Error, Result};

/// Mode of a directory that is made because a log is to lie in it.
const MADE: u32 = 0o755;

/// The path of a log: the part that is trusted, and the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The directory that the pod's log directory is in. Links in it are followed.
    trusted: PathBuf,
    /// From the pod's log directory to the directory of the log. No links in it are.
    below: PathBuf,
    /// Name of the log's file.
    file: PathBuf,
}

impl Location {
    /// The log `path` of a container whose log is called `name` in its pod's log directory.
    ///
    /// # Errors
    /// If `path` does not end with `name`, or that is no name below a directory.
    pub fn new(path: &Path, name: &Path) -> Result<Self> {
        let wrong = || Error::Invalid(format!("{} is no log {} of a pod", path.display(), name.display()));
        let name: PathBuf = name.components().filter(|part| *part != Component::CurDir).collect();
        let upwards = |path: &Path| path.components().any(|part| part == Component::ParentDir);
        if !path.is_absolute() || upwards(&name) || !path.ends_with(&name) {
            return Err(wrong());
        }
        let directory = path.ancestors().nth(name.components().count()).ok_or_else(wrong)?;
        let inner = name.parent().ok_or_else(wrong)?;
        let (trusted, below) = match (directory.parent(), directory.file_name()) {
            (Some(parent), Some(own)) => (parent, Path::new(own).join(inner)),
            _ => (directory, inner.to_owned()),
        };
        let file = name.file_name().ok_or_else(wrong)?.into();
        Ok(Self { trusted: trusted.into(), below, file })
    }

    /// The whole path.
    pub fn path(&self) -> PathBuf {
        self.trusted.join(&self.below).join(&self.file)
    }

    /// The name of the file in its directory.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The directory of the log as it is now, made where it is missing.
    ///
    /// # Errors
    /// If there is a link or anything else on the way.
    pub fn directory(&self) -> Result<Directory> {
        fs::create_dir_all(&self.trusted).map_err(Error::io("create log directory", &self.trusted))?;
        let trusted = Directory::open(&self.trusted)?;
        if self.below == Path::new("") {
            return Ok(trusted);
        }
        trusted.create_directories(&self.below, MADE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_drawn_above_the_pods_directory() {
        for (path, name, trusted, below) in [
            ("/var/log/pods/a_b_c/web/0.log", "web/0.log", "/var/log/pods", "a_b_c/web"),
            ("/var/log/pods/a_b_c/web/./0.log", "./web/./0.log", "/var/log/pods", "a_b_c/web"),
            ("/tmp/logs/0.log", "0.log", "/tmp", "logs"),
            ("/logs/0.log", "0.log", "/", "logs"),
            ("/web/0.log", "web/0.log", "/", "web"),
        ] {
            let location = Location::new(Path::new(path), Path::new(name)).unwrap();
            let parts = (location.trusted.as_path(), location.below.as_path(), location.file());
            assert_eq!(parts, (Path::new(trusted), Path::new(below), Path::new("0.log")), "{path}");
            assert_eq!(location.path(), Path::new(path));
        }
    }

    #[test]
    fn what_is_no_log_of_the_pod_is_refused() {
        for (path, name) in [
            ("/var/log/pods/a_b_c/web/0.log", "other/0.log"),
            ("/var/log/pods/a_b_c/../0.log", "../0.log"),
            ("/etc/passwd", "/etc/passwd"),
            ("logs/0.log", "0.log"),
            ("/var/log", ""),
            ("/", "."),
        ] {
            assert!(Location::new(Path::new(path), Path::new(name)).is_err(), "{path} {name}");
        }
    }
}
