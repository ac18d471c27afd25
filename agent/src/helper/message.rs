//! What agent and helper say to each other.
//!
//! One datagram a message: JSON, and descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use libcontainer::oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::json;

/// Most descriptors beside one message.
const FD_LIMIT: usize = 4;
/// Longest message, in bytes.
const LIMIT: usize = 16 << 10;

/// What the helper shall build. Beside it come the descriptors: the pipe that tells of
/// the execution, then standard input, output and error unless there is a terminal.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// A container, up to the start of its process.
    Create(Create),
    /// A further process in a running container.
    Exec(Box<Tenant>),
}

/// A container to build.
#[derive(Debug, Serialize, Deserialize)]
pub struct Create {
    /// Its id.
    pub id: String,
    /// Directory with its config.json.
    pub bundle: PathBuf,
    /// Directory for libcontainer's state.
    pub state: PathBuf,
    /// Whether it gets a terminal.
    pub terminal: bool,
}

/// A process to start in a container.
#[derive(Debug, Serialize, Deserialize)]
pub struct Tenant {
    /// The container's id.
    pub id: String,
    /// Directory with the container's config.json.
    pub bundle: PathBuf,
    /// Process id of the container's own process.
    pub pid: i32,
    /// A directory for this process alone, with its process.json.
    pub directory: PathBuf,
    /// Whether it gets a terminal.
    pub terminal: bool,
    /// The control group below the container's that it is for, by its name.
    pub group: String,
    /// What libcontainer leaves out.
    pub late: Option<Late>,
    /// The user namespace of the container, if it is not the guest's.
    pub inside: Option<Inside>,
}

/// A user namespace that the helper itself enters: libcontainer takes the first process of a
/// container into one, and leaves further processes in that of the helper.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Inside {
    /// File that stands for it.
    pub namespace: PathBuf,
    /// User and group outside that are its root.
    pub root: (u32, u32),
    /// Directory of the process's control group, which cannot be joined from inside.
    pub cgroup: PathBuf,
    /// The process's own adjustment of the out-of-memory score, which may not be lowered from
    /// inside.
    pub oom_score_adj: Option<i32>,
}

/// What a process in a running container lacks when libcontainer is done with it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Late {
    /// File with the system call filter, which libcontainer applies to a container's own
    /// process only.
    pub seccomp: PathBuf,
    /// The capabilities to be left with: to set a filter the process may need some more.
    pub capabilities: Option<LinuxCapabilities>,
}

/// The helper's answer. Beside `Ready` comes the terminal's master side, if there is one.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The process exists.
    Ready {
        /// Its id in the agent's PID namespace.
        pid: i32,
    },
    /// Nothing was built.
    Failed {
        /// Why.
        reason: String,
    },
}

/// Written to the status pipe by a process that could not become its command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecFailure {
    /// The command, or the file it was found as.
    pub path: String,
    /// Why it cannot be executed.
    pub reason: String,
    /// Whether the command is to blame, and not the system around it.
    pub command: bool,
}

/// Loads a system call filter.
pub fn read_filter(path: &std::path::Path) -> io::Result<LinuxSeccomp> {
    json::read_file(std::fs::File::open(path)?)
}

/// Sends one message.
pub fn send<M: Serialize>(socket: BorrowedFd<'_>, message: &M, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > LIMIT || fds.len() > FD_LIMIT {
        return Err(io::Error::other("the message is too long"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FD_LIMIT))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    // Without a signal: the other side may be gone.
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one message; an error of kind `UnexpectedEof` if the other side is gone.
pub fn receive<M: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<(M, Vec<OwnedFd>)> {
    let mut bytes = vec![0; LIMIT];
    let (count, fds) = receive_bytes(socket, &mut bytes)?;
    let message = serde_json::from_slice(bytes.get(..count).unwrap_or_default())?;
    Ok((message, fds))
}

/// Receives the one descriptor that comes beside a few bytes of no meaning.
pub fn receive_fd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let (_, fds) = receive_bytes(socket, &mut [0; 64])?;
    fds.into_iter().next().ok_or_else(|| io::Error::other("no descriptor came with the message"))
}

fn receive_bytes(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FD_LIMIT))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let fds = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::other("the message was cut short"));
    }
    Ok((received.bytes, fds))
}

/// Borrows descriptors for [`send`].
pub fn borrow(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn descriptors_travel_with_their_message() {
        let (here, there) = pair();
        let (read, write) = rustix::pipe::pipe().unwrap();
        send(here.as_fd(), &Reply::Ready { pid: 7 }, &[write.as_fd()]).unwrap();
        drop(write);
        let (reply, fds): (Reply, _) = receive(there.as_fd()).unwrap();
        assert!(matches!(reply, Reply::Ready { pid: 7 }));
        let [fd] = <[OwnedFd; 1]>::try_from(fds).unwrap();
        std::fs::File::from(fd).write_all(b"hello").unwrap();
        let mut seen = String::new();
        std::fs::File::from(read).read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "hello");
    }

    #[test]
    fn a_hang_up_is_told_apart_from_a_message() {
        let (here, there) = pair();
        drop(here);
        assert_eq!(receive::<Reply>(there.as_fd()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_message_that_would_be_cut_is_refused_by_its_sender() {
        let (here, _there) = pair();
        assert!(send(here.as_fd(), &Reply::Failed { reason: "x".repeat(LIMIT) }, &[]).is_err());
    }
}
