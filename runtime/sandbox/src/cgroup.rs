//! The pod's cgroup on the host (cgroup v2): holds the VMM, named by the sandbox id.
//!
//! Where the host has no writable cgroup v2 hierarchy a pod runs without one; limits from
//! outside then do not apply, and `nacelle check` says so.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

const HIERARCHY: &str = "/sys/fs/cgroup";
const PREFIX: &str = "nacelle-";
/// Parent of pods whose caller named none.
const DEFAULT_PARENT: &str = "nacelle";

/// One pod's cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup of a sandbox under `parent` (as the kubelet names it, empty for
    /// the default), or returns none where there is no cgroup v2.
    pub fn create(parent: &str, sandbox_id: &str) -> Result<Option<Self>> {
        if !available() {
            return Ok(None);
        }
        let cgroup = Self::named(parent, sandbox_id)?;
        fs::create_dir_all(&cgroup.path).map_err(Error::io("create cgroup", &cgroup.path))?;
        Ok(Some(cgroup))
    }

    /// The cgroup that [`Cgroup::create`] would make, whether it is there or not.
    pub fn named(parent: &str, sandbox_id: &str) -> Result<Self> {
        let parent = if parent.is_empty() { DEFAULT_PARENT } else { parent.trim_start_matches('/') };
        if parent.split('/').any(|part| part == ".." || part == ".") {
            return Err(Error::Invalid(format!("cgroup_parent {parent:?} must not contain . or ..")));
        }
        Ok(Self { path: Path::new(HIERARCHY).join(parent).join(format!("{PREFIX}{sandbox_id}")) })
    }

    /// Moves a process in.
    pub fn add(&self, pid: u32) -> Result<()> {
        let path = self.path.join("cgroup.procs");
        fs::write(&path, pid.to_string()).map_err(Error::io("write", &path))
    }

    /// Kills what is in it and removes it. Nothing happens if it does not exist.
    pub fn remove(&self) -> Result<()> {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        // Killed processes leave the cgroup when they are reaped, which their pidfds tell
        // nobody here: a busy cgroup is tried again for a little while.
        let mut attempts = 0;
        loop {
            match fs::remove_dir(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempts < 200 => {
                    attempts += 1;
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                Err(error) => return Err(Error::io("remove cgroup", &self.path)(error)),
            }
        }
    }
}

/// Whether there is a cgroup v2 hierarchy that we may write to.
fn available() -> bool {
    Path::new(HIERARCHY).join("cgroup.controllers").exists()
        && rustix::fs::access(HIERARCHY, rustix::fs::Access::WRITE_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_stay_inside_the_hierarchy() {
        assert!(Cgroup::named("/kubepods/../..", "ab").is_err());
        let cgroup = Cgroup::named("/kubepods/burstable/pod1", "ab").unwrap();
        assert_eq!(cgroup.path, Path::new("/sys/fs/cgroup/kubepods/burstable/pod1/nacelle-ab"));
        assert_eq!(Cgroup::named("", "ab").unwrap().path, Path::new("/sys/fs/cgroup/nacelle/nacelle-ab"));
    }
}
