//! The agent's side.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::message::{self, Reply, Request};
use crate::error::{Error, Result};
use crate::fd;
use crate::paths::Paths;
use crate::patience::scaled;
use crate::reaper::{ExitWatch, Reaper, ended};

/// How long a helper may work. It mounts and clones; a minute means that it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running helper. Dropped before [`Helper::release`], it undoes what it has built.
#[derive(Debug)]
pub struct Helper {
    control: AsyncFd<File>,
    pidfd: OwnedFd,
    exit: ExitWatch,
    action: &'static str,
}

/// What a helper has built: a process that is still the helper's child.
#[derive(Debug)]
pub struct Built {
    /// Id of the process.
    pub pid: i32,
    /// Master side of its terminal, if it has one.
    pub terminal: Option<OwnedFd>,
}

impl Helper {
    /// Runs a helper that is to do what `action` says in messages. On the runtime's own thread, although that waits until
    /// the program is executed: the reaper, which is there, must not reap it before it is registered.
    pub fn spawn(paths: &Paths, reaper: &Reaper, action: &'static str) -> Result<Self> {
        let failed = || Error::system("run the helper");
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|error| failed()(io::Error::from(error)))?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(|error| failed()(io::Error::from(error)))?;
        // No wait for it here: the reaper collects every child.
        let child = Command::new(&paths.executable)
            .arg(super::ARGUMENT)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Error::path("run", &paths.executable))?;
        let pid = i32::try_from(child.id()).unwrap_or(0);
        let exit = reaper.register(pid);
        let pidfd = open_pidfd(pid)?;
        let control = fd::watch(ours.into(), Interest::READABLE).map_err(failed())?;
        Ok(Self { control, pidfd, exit, action })
    }

    /// Hands over the request and waits for the process to exist.
    pub async fn build(&mut self, request: &Request, fds: &[OwnedFd]) -> Result<Built> {
        let action = self.action;
        let failed = |reason: String| Error::Helper { action, reason };
        message::send(self.control.as_fd(), request, &message::borrow(fds))
            .map_err(|error| failed(format!("the helper takes no request: {error}")))?;

        let mut exit = self.exit.clone();
        let answer = async {
            tokio::select! {
                biased;
                answer = self.control.async_io(Interest::READABLE, |socket| message::receive::<Reply>(socket.as_fd())) => answer,
                // It answers before it ends, unless it crashes.
                exit = ended(&mut exit) => message::receive(self.control.as_fd())
                    .map_err(|_| io::Error::other(format!("the helper ended with {}", exit.code))),
            }
        };
        let patience = scaled(PATIENCE);
        match timeout(patience, answer).await {
            Ok(Ok((Reply::Ready { pid }, terminal))) => Ok(Built { pid, terminal: terminal.into_iter().next() }),
            Ok(Ok((Reply::Failed { reason }, _))) => Err(failed(reason)),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => {
                let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
                Err(Error::Timeout(format!("the helper did not {action} within {} s", patience.as_secs())))
            }
        }
    }

    /// Lets the helper end, upon which its process becomes the agent's child. The reaper
    /// must know the process by now.
    pub fn release(self) -> Result<()> {
        let action = self.action;
        message::send(self.control.as_fd(), &(), &[])
            .map_err(|error| Error::Helper { action, reason: format!("the helper is gone: {error}") })
    }
}

/// A handle on a process that cannot come to mean another one. The process must be this
/// process's child, or a child of a helper that has not been released.
pub fn open_pidfd(pid: i32) -> Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or_else(|| Error::State(format!("{pid} is no process id")))?;
    pidfd_open(pid, PidfdFlags::empty()).map_err(Error::system("open a process"))
}
