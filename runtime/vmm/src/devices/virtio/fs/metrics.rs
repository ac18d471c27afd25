//! What the device did.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the device was made.
#[derive(Debug, Default)]
pub struct FsMetrics {
    /// Requests that were answered, errors included.
    pub requests: AtomicU64,
    /// Requests that made no sense, or that the device does not know.
    pub refused: AtomicU64,
    /// Bytes of files that the guest read.
    pub read_bytes: AtomicU64,
    /// Bytes that it wrote to files.
    pub written_bytes: AtomicU64,
}

impl FsMetrics {
    pub(super) fn count(counter: &AtomicU64, by: usize) {
        counter.fetch_add(by as u64, Ordering::Relaxed);
    }
}
