//! The daemon's side of the control socket. Blocking; every wait has an end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::message::{Request, Response};
use super::packet;

/// How long to wait before asking again for a VMM that is starting.
const RETRY: Duration = Duration::from_millis(1);

/// The VMM cannot be asked, or refused.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot connect to the VMM's control socket {path}: is the VMM running?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The request did not go out.
    #[error("cannot send a request to the VMM")]
    Send(#[source] io::Error),
    /// No answer came.
    #[error("the VMM did not answer: it hangs or has ended, its console and its messages may say why")]
    Receive(#[source] io::Error),
    /// The connection ended.
    #[error("the VMM closed the connection: it has ended, its console and its messages may say why")]
    Closed,
    /// The answer makes no sense.
    #[error("the VMM's answer is not one that this version knows")]
    Answer(#[source] serde_json::Error),
    /// The VMM said no. Nothing has changed.
    #[error("the VMM refused: {0}")]
    Refused(String),
}

/// A connection to a VMM. After an error other than [`ClientError::Refused`] it is of no
/// further use: a late answer would be taken for the next one's.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
}

impl Client {
    /// Connects to the VMM at `path`. While nobody listens there, tries again until
    /// `deadline`.
    ///
    /// # Errors
    /// [`ClientError::Connect`] if nobody listens at the deadline, or at once if the
    /// socket cannot be connected to for another reason.
    pub fn connect(path: &Path, deadline: Instant) -> Result<Self, ClientError> {
        let failed = |error: rustix::io::Errno| ClientError::Connect { path: path.to_owned(), source: error.into() };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        loop {
            let socket =
                socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(failed)?;
            match connect(&socket, &address) {
                Ok(()) => return Ok(Self { socket }),
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED | rustix::io::Errno::INTR)
                    if Instant::now() < deadline =>
                {
                    thread::sleep(RETRY);
                }
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Asks and waits for the answer, at most `timeout`.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the VMM answers with an error; the others if there is
    /// no answer.
    pub fn call(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<Response, ClientError> {
        let bytes = serde_json::to_vec(request).map_err(|error| ClientError::Send(error.into()))?;
        set_socket_timeout(&self.socket, Timeout::Send, Some(timeout))
            .and_then(|()| set_socket_timeout(&self.socket, Timeout::Recv, Some(timeout)))
            .map_err(|error| ClientError::Send(error.into()))?;
        packet::send(self.socket.as_fd(), &bytes, fds).map_err(ClientError::Send)?;
        let packet = packet::receive(self.socket.as_fd()).map_err(ClientError::Receive)?;
        if packet.bytes.is_empty() {
            return Err(ClientError::Closed);
        }
        match serde_json::from_slice(&packet.bytes).map_err(ClientError::Answer)? {
            Response::Error { message } => Err(ClientError::Refused(message)),
            response => Ok(response),
        }
    }
}
