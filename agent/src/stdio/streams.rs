//! All standard streams of one process.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, Uid, fchown, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{Winsize, tcsetwinsize};

use super::input::Input;
use super::output::Output;
use crate::error::{Error, Result};

/// The agent's ends of a process's standard streams.
#[derive(Debug)]
pub struct Streams {
    /// Nothing if the process has no input the host may write to.
    pub stdin: Option<Arc<Input>>,
    /// Standard output, or the terminal's.
    pub stdout: Arc<Output>,
    /// Nothing if there is a terminal.
    pub stderr: Option<Arc<Output>>,
    terminal: Option<OwnedFd>,
}

impl Streams {
    /// Streams by pipes, and the process's ends of them: input, output, error. They
    /// belong to `uid`, so that the process may open /dev/stdout again.
    pub fn pipes(stdin: bool, uid: u32) -> Result<(Self, [OwnedFd; 3])> {
        let (input, child_input) = if stdin {
            let (child, ours) = pipe(uid)?;
            set_nonblocking(&ours)?;
            (Some(Input::new(ours, false).map_err(Error::system("watch a pipe"))?), child)
        } else {
            let null = File::open("/dev/null").map_err(Error::path("open", "/dev/null"))?;
            (None, null.into())
        };
        let output = || -> Result<_> {
            let (ours, child) = pipe(uid)?;
            set_nonblocking(&ours)?;
            Ok((Output::start(ours).map_err(Error::system("watch a pipe"))?, child))
        };
        let (stdout, child_stdout) = output()?;
        let (stderr, child_stderr) = output()?;
        let streams = Self { stdin: input, stdout, stderr: Some(stderr), terminal: None };
        Ok((streams, [child_input, child_stdout, child_stderr]))
    }

    /// Streams by the terminal behind `master`, which belongs to `uid` from then on.
    pub fn terminal(master: OwnedFd, stdin: bool, uid: u32) -> Result<Self> {
        own_terminal(&master, uid)?;
        set_nonblocking(&master)?;
        let copy = || master.try_clone().map_err(Error::system("duplicate a terminal"));
        let input = match stdin {
            true => Some(Input::new(copy()?, true).map_err(Error::system("watch a terminal"))?),
            false => None,
        };
        let stdout = Output::start(copy()?).map_err(Error::system("watch a terminal"))?;
        Ok(Self { stdin: input, stdout, stderr: None, terminal: Some(master) })
    }

    /// Sets the terminal's size; the kernel tells the process by SIGWINCH.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let Some(terminal) = &self.terminal else {
            return Err(Error::State("the process has no terminal".into()));
        };
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(terminal, size).map_err(Error::system("set a terminal's size"))
    }
}

/// A pipe that belongs to `uid`: reading end, writing end.
fn pipe(uid: u32) -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(Error::system("make a pipe"))?;
    fchown(&read, Some(Uid::from_raw(uid)), None).map_err(Error::system("give a pipe to its user"))?;
    Ok((read, write))
}

/// Affects the agent's end only: the two ends of a pipe, and the two sides of a terminal,
/// are separate open files.
fn set_nonblocking(fd: &OwnedFd) -> Result<()> {
    fcntl_getfl(fd)
        .and_then(|flags| fcntl_setfl(fd, flags | OFlags::NONBLOCK))
        .map_err(Error::system("make a stream non-blocking"))
}

fn own_terminal(master: &OwnedFd, uid: u32) -> Result<()> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the request takes an integer and returns a new descriptor or -1.
    let peer = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    if peer < 0 {
        return Err(Error::system("open the other side of a terminal")(std::io::Error::last_os_error()));
    }
    // SAFETY: the kernel just made this descriptor for us.
    let peer = unsafe { OwnedFd::from_raw_fd(peer) };
    match fchown(&peer, Some(Uid::from_raw(uid)), None) {
        // A user the container's user namespace does not map keeps working on the open
        // descriptor.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(error) => Err(Error::system("give a terminal to its user")(error)),
    }
}

/// Opens /dev/null for reading and writing.
pub fn null() -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/null")
}
