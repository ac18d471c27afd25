//! Unix sockets, connected to by what was looked up instead of by name.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use tokio::net::UnixStream;

/// A unix socket in the file system, held: whatever gets its name later, this one is connected to.
#[derive(Debug)]
pub struct Socket {
    /// By `O_PATH`.
    fd: OwnedFd,
}

impl Socket {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// What a client connects to that takes a path, of whatever type of socket. It leads to this socket for as long as
    /// `self` lives, in this process only, and is short enough however long the socket's own path is.
    pub fn address(&self) -> PathBuf {
        super::own(&self.fd)
    }
}

/// Connects to a stream socket. Does not wait for a listener that takes nobody.
///
/// # Errors
/// If nobody listens, or too many wait to be taken.
pub async fn connect_to(socket: &Socket) -> io::Result<UnixStream> {
    UnixStream::connect(socket.address()).await
}
