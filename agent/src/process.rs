//! A process of a container, from the moment it exists until nobody asks for it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use crate::container::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::helper::client::open_pidfd;
use crate::log::{self, Level};
use crate::reaper::{Exit, ExitWatch, Reaper, ended};
use crate::stdio::streams::Streams;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Its exit.
    pub exit: Exit,
    /// Whether it was the out-of-memory killer that ended it.
    pub oom_killed: bool,
}

/// A process and its streams.
#[derive(Debug)]
pub struct Process {
    /// Id in the guest's own PID namespace.
    pub pid: i32,
    /// Its standard streams.
    pub streams: Arc<Streams>,
    /// Whether the agent has sent it SIGKILL.
    killed: Arc<AtomicBool>,
    pidfd: OwnedFd,
    outcome: watch::Receiver<Option<Outcome>>,
}

/// What a process is to its container.
#[derive(Debug, Clone)]
pub enum Role {
    /// Its own process, in its control group, the rest of which is killed when this ends.
    Init(Cgroup),
    /// A further one in the container with this control group.
    Exec(Cgroup),
}

impl Role {
    fn container(&self) -> &Cgroup {
        match self {
            Self::Init(container) | Self::Exec(container) => container,
        }
    }
}

impl Process {
    /// Follows the process `pid` to its end. It must still be the child of the helper that
    /// made it.
    pub fn follow(pid: i32, streams: Arc<Streams>, role: &Role, reaper: &Reaper) -> Result<Arc<Self>> {
        let pidfd = open_pidfd(pid)?;
        let (sender, outcome) = watch::channel(None);
        let oom_kills = role.container().oom_kills();
        let killed = Arc::new(AtomicBool::new(false));
        tokio::spawn(follow(reaper.register(pid), role.clone(), oom_kills, killed.clone(), sender));
        Ok(Arc::new(Self { pid, streams, killed, pidfd, outcome }))
    }

    /// The agent is about to send it SIGKILL, by whatever means.
    pub fn to_be_killed(&self) {
        self.killed.store(true, Ordering::Relaxed);
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
        if signal == libc::SIGKILL {
            self.to_be_killed();
        }
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
    role: Role,
    oom_kills: u64,
    killed: Arc<AtomicBool>,
    outcome: watch::Sender<Option<Outcome>>,
) {
    let exit = ended(&mut exit).await;
    // Not by the container's own group alone: its process may have moved to one that it made below.
    let struck = role.container().oom_kills() > oom_kills;
    let oom_killed = struck && exit.signal == Some(libc::SIGKILL) && !killed.load(Ordering::Relaxed);
    if let Role::Init(cgroup) = role {
        if struck {
            let whom = if oom_killed { "its own process" } else { "a process" };
            log::line(Level::Error, &format!("{} was out of memory: {whom} was killed", cgroup.path().display()));
        }
        // The kernel does so where the container has a PID namespace of its own. Nobody is told of the end before.
        let _ = tokio::task::spawn_blocking(move || cgroup.kill()).await;
    }
    let _ = outcome.send(Some(Outcome { exit, oom_killed }));
}
