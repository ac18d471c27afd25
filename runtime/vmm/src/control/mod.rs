//! The VMM's control socket: `SOCK_SEQPACKET`, one JSON message a packet, file
//! descriptors beside it (`SCM_RIGHTS`).
//!
//! A client sends one [`Request`] and receives one [`Response`]; then the next. Any
//! number of clients may be connected, requests are served one at a time in the order
//! they arrive. The socket is the VMM's only way in from the host side; only its owner
//! may connect (mode 0600).

mod client;
pub mod message;
mod packet;
pub(crate) mod server;

pub use client::{Client, ClientError};
pub use message::{Access, DeviceInfo, Request, Response, check_owner};
pub use server::{ServerError, listen};
