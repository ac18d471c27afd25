//! The host's side: unix sockets, and the line a client asks for a guest port with.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{AtFlags, CWD, unlinkat};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, recv, send,
    socket_with,
};

use crate::config::MachineConfig;

/// The longest path of a unix socket in bytes.
const PATH_LIMIT: usize = 107;
/// The longest line a client may ask with: `CONNECT 4294967295\n`.
const LINE_LIMIT: usize = 19;

/// Why there is no vsock device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The socket of some port could not be named.
    #[error("vsock socket path {path} is too long: with `_<port>` after it, it has to stay below 108 bytes")]
    PathTooLong {
        /// The device's socket.
        path: PathBuf,
    },
    /// The device's socket could not be made.
    #[error("cannot listen on vsock socket {path}: it must not exist yet, and its directory must")]
    Listen {
        /// The device's socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The process has no file descriptor left.
    #[error("cannot set up the events of the vsock device")]
    Events(#[source] io::Error),
}

/// The socket on which the host reaches the guest. It is removed with the device.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Makes the socket at `path`, which must not exist.
    ///
    /// # Errors
    /// See [`VsockError`].
    pub fn new(path: &Path) -> Result<Self, VsockError> {
        if MachineConfig::vsock_listener(path, u32::MAX).as_os_str().as_bytes().len() > PATH_LIMIT {
            return Err(VsockError::PathTooLong { path: path.to_owned() });
        }
        let socket = UnixListener::bind(path);
        let socket = socket.map_err(|source| VsockError::Listen { path: path.to_owned(), source })?;
        let listener = Self { socket, path: path.to_owned() };
        listener.socket.set_nonblocking(true).map_err(VsockError::Events)?;
        Ok(listener)
    }

    /// The next client, without waiting for one.
    pub fn accept(&self) -> io::Result<UnixStream> {
        Ok(accept_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?.into())
    }

    /// Connects to whoever listens for the guest's connections to `port`, without waiting
    /// for room in its backlog.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&stream, &SocketAddrUnix::new(MachineConfig::vsock_listener(&self.path, port))?)?;
        Ok(stream.into())
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Whoever removed it first had the same in mind.
        let _ = unlinkat(CWD, &self.path, AtFlags::empty());
    }
}

/// A client that did not say yet which port it wants.
#[derive(Debug)]
pub struct Handshake {
    pub stream: UnixStream,
    pub deadline: Instant,
}

/// How far a client got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The line is not complete.
    Waiting,
    /// It wants this guest port.
    Port(u32),
    /// It left, or said something else.
    Failed,
}

impl Handshake {
    /// Reads the client's line, and not a byte more: what follows is for the guest.
    pub fn advance(&self) -> Progress {
        let mut line = [0; LINE_LIMIT];
        let seen = match recv(&self.stream, &mut line, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Progress::Failed,
            Ok((seen, _)) => seen,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Progress::Waiting,
            Err(_) => return Progress::Failed,
        };
        let seen = line.get(..seen).unwrap_or(&line);
        let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
            return if seen.len() == LINE_LIMIT { Progress::Failed } else { Progress::Waiting };
        };
        let port = seen.get(..end).and_then(parse_connect);
        // The bytes are there, so this takes all of them and does not wait.
        let taken = recv(&self.stream, &mut line[..=end], RecvFlags::DONTWAIT);
        match (port, taken) {
            (Some(port), Ok((taken, _))) if taken == end + 1 => Progress::Port(port),
            _ => Progress::Failed,
        }
    }
}

/// The port of `CONNECT <port>`.
fn parse_connect(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    // `parse` alone would take a sign.
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Tells a client that the guest accepted.
pub fn confirm(stream: &UnixStream, port: u32) -> io::Result<()> {
    let line = format!("OK {port}\n");
    // It is the first that is sent, so there is room.
    let sent = send(stream, line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;

    use super::*;

    fn handshake() -> (Handshake, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Handshake { stream: ours, deadline: Instant::now() }, theirs)
    }

    #[test]
    fn a_line_in_pieces_is_read_and_nothing_after_it() {
        let (mut handshake, mut client) = handshake();
        assert_eq!(handshake.advance(), Progress::Waiting);
        for piece in ["CONN", "ECT 10", "24"] {
            client.write_all(piece.as_bytes()).unwrap();
            assert_eq!(handshake.advance(), Progress::Waiting);
        }
        client.write_all(b"\nhello").unwrap();
        assert_eq!(handshake.advance(), Progress::Port(1024));
        let mut rest = [0; 5];
        handshake.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn the_whole_range_of_ports_and_nothing_else() {
        for (line, progress) in [
            ("CONNECT 0\n", Progress::Port(0)),
            ("CONNECT 4294967295\n", Progress::Port(u32::MAX)),
            ("CONNECT 4294967296\n", Progress::Failed),
            ("CONNECT 12345678901", Progress::Failed),
            ("CONNECT \n", Progress::Failed),
            ("CONNECT +1\n", Progress::Failed),
            ("CONNECT 1 \n", Progress::Failed),
            ("connect 1\n", Progress::Failed),
            ("\n", Progress::Failed),
            ("GET / HTTP/1.1\r\nHost: x\r\n", Progress::Failed),
        ] {
            let (handshake, mut client) = handshake();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(handshake.advance(), progress, "{line:?}");
        }
        let (handshake, client) = handshake();
        drop(client);
        assert_eq!(handshake.advance(), Progress::Failed);
    }

    #[test]
    fn a_path_in_use_or_too_long_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = Listener::new(&path).unwrap();
        assert!(matches!(Listener::new(&path), Err(VsockError::Listen { .. })));
        drop(listener);
        assert!(!path.exists());
        let long = directory.path().join("v".repeat(100));
        assert!(matches!(Listener::new(&long), Err(VsockError::PathTooLong { .. })));
        assert!(!long.exists());
    }

    proptest! {
        #[test]
        fn any_first_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 1..64)) {
            let (handshake, mut client) = handshake();
            client.write_all(&bytes).unwrap();
            let progress = handshake.advance();
            prop_assert!(progress != Progress::Waiting || bytes.len() < LINE_LIMIT);
        }
    }
}
