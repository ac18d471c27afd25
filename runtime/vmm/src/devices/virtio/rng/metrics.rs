//! What the random number device did.

use std::sync::atomic::AtomicU64;

/// Counters since the device was made.
#[derive(Debug, Default)]
pub struct RngMetrics {
    /// Requests answered.
    pub requests: AtomicU64,
    /// Random bytes handed out.
    pub bytes: AtomicU64,
}
