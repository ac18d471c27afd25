//! The end of a cgroup: what is in it is killed, and it is removed.

use std::fs;
use std::io;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::time::Instant;

use super::Cgroup;
use crate::{Error, Result};

/// How often a busy cgroup is tried again.
const AGAIN: Duration = Duration::from_millis(5);
/// Processes that an error names.
const NAMED: usize = 8;

impl Cgroup {
    /// The processes in it; none if it does not exist. Nobody else than who may write to the
    /// hierarchy can put one there.
    pub fn processes(&self) -> Vec<u32> {
        let list = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        list.lines().filter_map(|line| line.trim().parse().ok()).filter(|pid| *pid != 0).collect()
    }

    /// Kills what is in it and removes it, for as long as `limit`. Nothing happens if it does
    /// not exist. May be tried again.
    ///
    /// # Errors
    /// A process in it does not end: it waits in the kernel for a disk, say. Or the host does
    /// not let go of the cgroup.
    pub async fn remove_within(&self, limit: Duration) -> Result<()> {
        let begun = Instant::now();
        while !self.try_remove()? {
            if begun.elapsed() >= limit {
                return Err(self.busy(limit));
            }
            tokio::time::sleep(AGAIN).await;
        }
        Ok(())
    }

    /// Whether it is gone. Killed processes leave it when they are reaped, which their pidfds
    /// tell nobody here.
    fn try_remove(&self) -> Result<bool> {
        match fs::remove_dir(&self.path) {
            Ok(()) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(Error::io("remove cgroup", &self.path)(error)),
        }
        // What ends a process that was made meanwhile, too. Since Linux 5.14.
        if fs::write(self.path.join("cgroup.kill"), "1").is_err() {
            self.kill_each();
        }
        Ok(false)
    }

    /// Kills the processes in it one by one.
    fn kill_each(&self) {
        for pid in self.processes() {
            let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { continue };
            let Ok(pidfd) = rustix::process::pidfd_open(raw, PidfdFlags::empty()) else { continue };
            // Only now is the number pinned: does it still stand for a process in here?
            if self.processes().contains(&pid) {
                let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
            }
        }
    }

    fn busy(&self, limit: Duration) -> Error {
        let processes = self.processes();
        let named: Vec<_> = processes.iter().take(NAMED).map(ToString::to_string).collect();
        let more = if processes.len() > NAMED { ", …" } else { "" };
        let path = self.path.display();
        let action = match named.as_slice() {
            [] => format!("removing cgroup {path}, which the kernel calls busy,"),
            _ => format!("the end of killed processes {}{more} in cgroup {path}", named.join(", ")),
        };
        Error::Deadline { action, limit }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// A cgroup of a test's own, wherever this machine has its hierarchy; it need not have
    /// controllers.
    fn cgroup(name: &str) -> Cgroup {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let kinds = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let hierarchy = kinds.filter(|words| words[2] == "cgroup2").map(|words| words[1].to_owned()).next();
        let hierarchy = hierarchy.expect("a cgroup v2 hierarchy, which a systemd of this decade mounts");
        let path = std::path::Path::new(&hierarchy).join(format!("nacelle-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("this test needs root");
        Cgroup { path }
    }

    fn sleeper(cgroup: &Cgroup) -> Child {
        let mut command = Command::new("sleep");
        command.arg("1000");
        cgroup.hold(&mut command).unwrap();
        command.spawn().unwrap()
    }

    #[tokio::test]
    async fn what_is_in_it_is_known_killed_and_gone() {
        let cgroup = cgroup("remove");
        assert_eq!(cgroup.processes(), [0_u32; 0]);
        let mut child = sleeper(&cgroup);
        assert_eq!(cgroup.processes(), [child.id()]);
        // Reaped by somebody else, as a VMM is.
        let reaped = tokio::task::spawn_blocking(move || child.wait().unwrap());
        cgroup.remove_within(Duration::from_secs(10)).await.unwrap();
        assert!(!cgroup.exists() && !reaped.await.unwrap().success());
        cgroup.remove_within(Duration::ZERO).await.unwrap();
    }

    #[tokio::test]
    async fn what_does_not_end_is_named_after_a_bounded_time() {
        let cgroup = cgroup("busy");
        let mut child = sleeper(&cgroup);
        // A directory in it keeps it busy whatever is killed.
        let inner = cgroup.path.join("inner");
        fs::create_dir(&inner).unwrap();
        let error = cgroup.remove_within(Duration::from_millis(20)).await.unwrap_err().to_string();
        assert!(error.contains(&cgroup.path.display().to_string()), "{error}");
        child.wait().unwrap();
        fs::remove_dir(&inner).unwrap();
        cgroup.remove_within(Duration::from_secs(10)).await.unwrap();
    }

    #[tokio::test]
    async fn a_kernel_without_cgroup_kill_kills_one_by_one() {
        let cgroup = cgroup("each");
        let mut children = [sleeper(&cgroup), sleeper(&cgroup)];
        cgroup.kill_each();
        for child in &mut children {
            assert!(!child.wait().unwrap().success());
        }
        cgroup.remove_within(Duration::from_secs(10)).await.unwrap();
        let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
        cgroup.kill_each();
        assert!(other.try_wait().unwrap().is_none(), "what is not in it lives");
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
