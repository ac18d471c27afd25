//! The VMM's side of the control socket: who is connected, and what they say. What a
//! request does is decided in [`crate::machine`].

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, socket_with, sockopt};

use super::message::{Request, Response};
use super::packet;
use crate::acceptor::Acceptor;

/// Connections waiting to be accepted.
const BACKLOG: i32 = 16;
/// Connected clients; more are turned away.
const CLIENT_LIMIT: usize = 16;

/// The control socket cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on the control socket {path}: its path must not exist and have at most 107 bytes")]
pub struct ServerError {
    path: PathBuf,
    source: io::Error,
}

/// The listening socket and its clients.
pub struct Server {
    listener: Acceptor<OwnedFd>,
    clients: BTreeMap<u64, OwnedFd>,
    next: u64,
}

/// What came of a client's readiness.
pub enum Incoming {
    /// Nothing to do.
    Nothing,
    /// A request with its descriptors; it wants an answer.
    Request(Request, Vec<OwnedFd>),
    /// A message that is no request, with what to answer.
    Bad(Response),
    /// The client is gone.
    Gone,
}

/// A socket that listens on `path`, for the owner of this process only.
///
/// A VMM whose standard input it is takes it for its control socket. So whoever starts one
/// connects at once, and waits for the answer instead of for the socket.
///
/// # Errors
/// If `path` exists, is longer than 107 bytes, or its directory cannot be written.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    // Nobody can connect before `listen`, so nobody can before the mode is set.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// Standard input, if it is a socket of [`listen`]'s.
fn given() -> Option<OwnedFd> {
    let stdin = rustix::stdio::stdin();
    let listens = sockopt::socket_domain(stdin) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(stdin) == Ok(SocketType::SEQPACKET)
        && sockopt::socket_acceptconn(stdin) == Ok(true);
    listens.then(|| fcntl_dupfd_cloexec(stdin, 3).ok()).flatten()
}

impl Server {
    /// Listens on `path`, if standard input is not a socket that does so already.
    pub fn listen(path: &Path) -> Result<Self, ServerError> {
        let listener = given().map_or_else(|| listen(path), Ok).and_then(Acceptor::new);
        let listener = listener.map_err(|source| ServerError { path: path.to_owned(), source })?;
        Ok(Self { listener, clients: BTreeMap::new(), next: 0 })
    }

    /// Readable when [`Server::accept`] may have somebody.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Accepts a client that is waiting, if one is; returns its number.
    ///
    /// # Errors
    /// If the process has no descriptor left for one: they wait for a while then.
    pub fn accept(&mut self) -> io::Result<Option<u64>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let client = self.listener.accept(|listener| Ok(accept_with(listener, flags)?))?;
        let Some(client) = client else { return Ok(None) };
        if self.clients.len() >= CLIENT_LIMIT {
            return Ok(None);
        }
        let number = self.next;
        self.next += 1;
        self.clients.insert(number, client);
        Ok(Some(number))
    }

    /// The socket of client `number`.
    pub fn client(&self, number: u64) -> Option<BorrowedFd<'_>> {
        self.clients.get(&number).map(AsFd::as_fd)
    }

    /// Takes what client `number` has sent.
    pub fn receive(&self, number: u64) -> Incoming {
        let Some(client) = self.clients.get(&number) else { return Incoming::Nothing };
        let packet = match packet::receive(client.as_fd()) {
            Ok(packet) => packet,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Incoming::Nothing;
            }
            Err(_) => return Incoming::Gone,
        };
        if packet.bytes.is_empty() {
            return Incoming::Gone;
        }
        if packet.truncated {
            return bad("the message or its list of descriptors is too long");
        }
        match serde_json::from_slice(&packet.bytes) {
            Ok(request) => Incoming::Request(request, packet.fds),
            Err(error) => bad(&format!("not a request that this version knows: {error}")),
        }
    }

    /// Answers client `number`; false if it is to be dropped because it does not read.
    pub fn answer(&self, number: u64, response: &Response) -> bool {
        let Some(client) = self.clients.get(&number) else { return false };
        serde_json::to_vec(response)
            .map_err(io::Error::from)
            .and_then(|bytes| packet::send(client.as_fd(), &bytes, &[]))
            .is_ok()
    }

    /// Closes the connection of client `number`.
    pub fn drop_client(&mut self, number: u64) {
        self.clients.remove(&number);
    }
}

fn bad(message: &str) -> Incoming {
    Incoming::Bad(Response::Error { message: message.to_owned() })
}
