//! virtio-vsock: streams between host and guest (virtio 1.2, section 5.10), in user space.
//!
//! The host's side is unix sockets. Whoever wants to reach guest port P connects to the
//! device's socket and writes `CONNECT P\n`; once the guest accepted, `OK <host port>\n`
//! comes back and the stream is the guest's. If the guest refuses, the connection is closed
//! without an answer. Who connects before the guest's driver is up waits for it. A connection
//! that the guest makes to host port P becomes one to the unix socket `<path>_P`, and is
//! reset if nobody listens there.
//!
//! `device` has the queues, `muxer` knows which packet belongs to whom and whose turn it is,
//! `connection` is one stream with its two halves, `host` the sockets.
//!
//! What is bounded, and how: data from the host stays in its socket until the guest has
//! credit and a buffer for it, and goes there by one system call. Data from the guest goes
//! to the socket by one system call; what the socket does not take is kept, at most what
//! the guest was given credit for (`CreditPool`). The number of connections is
//! limited (`CONNECTIONS_LIMIT`); resets that the guest does not fetch are dropped
//! beyond `RESETS_LIMIT`. No call waits. Everything runs on the event loop's thread.

mod buffer;
mod config;
mod connection;
mod credit;
mod device;
mod host;
mod metrics;
mod muxer;
mod packet;
mod state;

pub use device::Vsock;
pub use host::{Listener, VsockError};
pub use metrics::VsockMetrics;
pub use packet::{GUEST_CID, HOST_CID};
pub use state::VsockState;

#[cfg(test)]
mod tests;
