//! A process of a container, from the moment it exists until nobody asks for it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use tokio::sync::watch;

use crate::container::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::helper::client::open_pidfd;
use crate::reaper::{Exit, ExitWatch, Reaper, ended};
use crate::stdio::streams::Streams;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Its exit.
    pub exit: Exit,
    /// Whether the out-of-memory killer struck in its container while it ran.
    pub oom_killed: bool,
}

/// A process and its streams.
#[derive(Debug)]
pub struct Process {
    /// Id in the guest's own PID namespace.
    pub pid: i32,
    /// Its standard streams.
    pub streams: Arc<Streams>,
    pidfd: OwnedFd,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Process {
    /// Follows the process `pid` in `cgroup` to its end. It must still be the child of the
    /// helper that made it. If `leader`, the rest of the group is killed when it ends.
    pub fn follow(pid: i32, streams: Arc<Streams>, cgroup: Cgroup, leader: bool, reaper: &Reaper) -> Result<Arc<Self>> {
        let pidfd = open_pidfd(pid)?;
        let (sender, outcome) = watch::channel(None);
        let oom_kills = cgroup.oom_kills();
        tokio::spawn(follow(reaper.register(pid), cgroup, oom_kills, leader, sender));
        Ok(Arc::new(Self { pid, streams, pidfd, outcome }))
    }

    /// How it ended, if it has.
    pub fn outcome(&self) -> Option<Outcome> {
        *self.outcome.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Result<Outcome> {
        let mut outcome = self.outcome.clone();
        let outcome = outcome.wait_for(Option::is_some).await.map(|outcome| *outcome);
        outcome.ok().flatten().ok_or_else(|| Error::State("the agent is going down".into()))
    }

    /// Sends a signal, 1 to 64. Without effect on a process that has ended; an error of kind
    /// `PermissionDenied` from one whose AppArmor profile does not let it take signals.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let none: *const libc::siginfo_t = std::ptr::null();
        // SAFETY: the call takes a descriptor we own, two integers and a null pointer,
        // which stands for the default details of a signal.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.as_raw_fd(), signal, none, 0) };
        let error = io::Error::last_os_error();
        if result == 0 || error.raw_os_error() == Some(libc::ESRCH) {
            return Ok(());
        }
        Err(error)
    }
}

async fn follow(
    mut exit: ExitWatch,
    cgroup: Cgroup,
    oom_kills: u64,
    leader: bool,
    outcome: watch::Sender<Option<Outcome>>,
) {
    let exit = ended(&mut exit).await;
    let oom_killed = cgroup.oom_kills() > oom_kills;
    if leader {
        // The kernel does so where the container has a PID namespace of its own.
        let _ = cgroup.kill();
    }
    let _ = outcome.send(Some(Outcome { exit, oom_killed }));
}
