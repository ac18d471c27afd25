//! virtio-net: a network interface behind a tap (virtio 1.2, section 5.1).
//!
//! Packets go straight between the guest's buffers and the tap, by one system call each and
//! with the header that both sides know: a guest may leave checksums and the cutting of long
//! packets to the host, and the host to the guest, so that what passes between two guests is
//! never cut or summed at all. `receive` and `transmit` are the two queues, `tap` is the
//! host's side, `device` brings them together.
//!
//! The device waits for the tap only while the guest has room for a packet. One that waits
//! for room is kept; what comes meanwhile waits in the tap's queue, which drops from its end.

mod config;
mod device;
mod metrics;
mod receive;
mod state;
mod tap;
mod transmit;

pub use device::Net;
pub use metrics::NetMetrics;
pub use state::NetState;
pub use tap::{Tap, TapError};

/// The header before every packet (`struct virtio_net_hdr_v1`), in bytes.
const HEADER_SIZE: usize = 12;
/// The longest frame with its header: an IP packet of 64 KiB, an Ethernet header, a VLAN tag.
const FRAME_LIMIT: usize = HEADER_SIZE + 65_535 + 14 + 4;

#[cfg(test)]
mod tests;
