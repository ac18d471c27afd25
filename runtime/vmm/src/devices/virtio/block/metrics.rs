//! What a disk did.

use std::sync::atomic::AtomicU64;

/// Counters since the disk was attached.
#[derive(Debug, Default)]
pub struct BlockMetrics {
    /// Read requests done.
    pub reads: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Write requests done.
    pub writes: AtomicU64,
    /// Bytes written.
    pub write_bytes: AtomicU64,
    /// Flushes done.
    pub flushes: AtomicU64,
    /// Discard and write-zeroes requests done.
    pub discards: AtomicU64,
    /// Requests that failed or made no sense.
    pub errors: AtomicU64,
}
