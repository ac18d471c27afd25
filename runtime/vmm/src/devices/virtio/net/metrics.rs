//! What an interface did.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the device was made.
#[derive(Debug, Default)]
pub struct NetMetrics {
    /// Packets given to the guest.
    pub received: AtomicU64,
    /// Their bytes, headers of the device included.
    pub received_bytes: AtomicU64,
    /// Packets that no room of the guest's could hold.
    pub receive_dropped: AtomicU64,
    /// Packets taken from the guest.
    pub sent: AtomicU64,
    /// Their bytes, headers of the device included.
    pub sent_bytes: AtomicU64,
    /// Packets of the guest that made no sense, or that the tap refused.
    pub send_dropped: AtomicU64,
}

impl NetMetrics {
    pub(super) fn count(counter: &AtomicU64, by: usize) {
        counter.fetch_add(by as u64, Ordering::Relaxed);
    }
}
