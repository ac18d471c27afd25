//! The streaming server: exec, attach and port forwarding for the clients of the CRI.
//!
//! A call of the CRI leaves a [`Request`] at the [`Door`] and gives its client the URL.
//! The client comes with that URL, once and within a minute, upgrades its connection to
//! SPDY/3.1 or WebSocket, and is served by a [`Backend`], which knows the pods. This crate
//! knows nothing of them, nor of the CRI.
//!
//! Whatever a client sends is bounded before it is stored: the head of its request
//! (`server`), frames, headers and streams (`spdy`), messages (`websocket`), data that
//! nobody takes and data that it does not fetch itself (`pipe`). What it does not fetch
//! holds up whatever produces it.

mod activity;
mod backend;
mod lobby;
mod outcome;
mod pipe;
mod port_forward;
mod protocol;
mod remote_command;
mod resize;
mod server;
pub mod spdy;
mod tls;
mod tokens;
mod tunnel;
mod upgrade;
mod websocket;

pub use backend::{Attach, Backend, Exec, Failure, Request, Streams, Wanted};
pub use pipe::{Broken, Incoming, Outgoing};
pub use resize::{Resizes, Size};
pub use server::{Door, Options, Server, ServerError, Timeouts};
pub use tls::{TlsError, TlsFiles};
pub use tokens::TokenError;
