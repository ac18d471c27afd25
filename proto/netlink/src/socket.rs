//! The socket: requests, acknowledgements, dumps.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::Result;

/// The kernel refused, or could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}: {source}")]
pub struct Error {
    pub(crate) action: String,
    pub(crate) source: io::Error,
}

impl Error {
    pub(crate) fn new(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self { action, source }
    }

    /// Whether the thing was not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self.source.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::ESRCH))
    }
}

/// A socket to the kernel, in the network namespace that the thread was in when it was
/// opened.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens it.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn open() -> Result<Self> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            io::Result::Ok(socket)
        };
        Ok(Self { socket: open().map_err(Error::new("open a netlink socket"))?, sequence: 0 })
    }

    /// Sends a request and waits for its acknowledgement. `action` is for the error.
    pub(crate) fn request(&mut self, action: &str, message: RouteNetlinkMessage, flags: u16) -> Result<()> {
        self.send(action, message, flags | NLM_F_ACK)?;
        self.receive(action, |_| {})
    }

    /// Sends a request for a list and returns its entries.
    pub(crate) fn dump(&mut self, action: &str, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
        self.send(action, message, NLM_F_DUMP)?;
        let mut entries = Vec::new();
        self.receive(action, |entry| entries.push(entry))?;
        Ok(entries)
    }

    fn send(&mut self, action: &str, message: RouteNetlinkMessage, flags: u16) -> Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop).map_err(Error::new(action))
    }

    /// Receives up to the acknowledgement or the end of the list.
    fn receive(&mut self, action: &str, mut each: impl FnMut(RouteNetlinkMessage)) -> Result<()> {
        let nonsense = |reason: String| Error::new(action)(io::Error::new(io::ErrorKind::InvalidData, reason));
        loop {
            let (datagram, _) = self.socket.recv_from_full().map_err(Error::new(action))?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| nonsense(error.to_string()))?;
                let length = (message.header.length as usize).next_multiple_of(4).min(rest.len());
                if length == 0 {
                    return Err(nonsense("a message without length".into()));
                }
                rest = rest.get(length..).unwrap_or_default();
                // What is left of an earlier call that failed half way.
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(entry) => each(entry),
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(()),
                        Some(_) => return Err(Error::new(action)(error.to_io())),
                    },
                    NetlinkPayload::Overrun(_) => return Err(nonsense("the kernel's list overran the socket".into())),
                    _ => {}
                }
            }
        }
    }
}
