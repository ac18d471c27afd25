//! What the vsock device did.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the device was made.
#[derive(Debug, Default)]
pub struct VsockMetrics {
    /// Connections made, by either side.
    pub opened: AtomicU64,
    /// Connections refused: nobody listened, or too many were open.
    pub refused: AtomicU64,
    /// Connections ended because the other side did not answer in time.
    pub timed_out: AtomicU64,
    /// Bytes given to the guest.
    pub to_guest: AtomicU64,
    /// Bytes taken from the guest.
    pub from_guest: AtomicU64,
    /// Packets from the guest that made no sense.
    pub bad_packets: AtomicU64,
    /// Resets not told because the guest did not fetch those before.
    pub dropped_resets: AtomicU64,
}

impl VsockMetrics {
    pub(super) fn count(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}
