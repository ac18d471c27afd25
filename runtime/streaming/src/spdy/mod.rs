//! SPDY/3.1, the server's side of what Kubernetes uses of it: one upgraded connection, on
//! which the client opens streams with headers, and data both ways with half-close.
//!
//! [`frame`] is the wire format, [`headers`] its compressed header blocks, [`flow`] the
//! windows, [`connection`] the streams.
//!
//! Written here rather than taken from a crate: the only one with a fitting licence is a
//! few weeks old and bounds neither frames nor headers, and the part that is needed is
//! small. What is bounded: frames, headers before and after decompression, streams,
//! bytes that wait in either direction. Data frames are taken in pieces, so their
//! length costs nothing.
//!
//! The Go clients (kubectl, crictl, the kubelet) neither keep nor grant windows. Windows
//! are granted here as the protocol wants; the peer's are kept from the moment it shows
//! that it has any, by SETTINGS or WINDOW_UPDATE. Before, and towards the others, TCP is
//! what holds data back.

pub mod connection;
pub mod flow;
pub mod frame;
pub mod headers;

pub use connection::{Connection, Stream};
