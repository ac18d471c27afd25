//! Packets of the guest.

use std::os::fd::{AsFd, BorrowedFd};

use super::metrics::NetMetrics;
use super::{FRAME_LIMIT, HEADER_SIZE};
use crate::devices::virtio::budget::{Budget, Served};
use crate::devices::virtio::chain::ChainScratch;
use crate::devices::virtio::device::{DeviceError, Interrupt};
use crate::devices::virtio::ring::Ring;

/// Packets taken in one go before others get their turn.
const BATCH: usize = 256;

/// The queue that the guest sends by.
#[derive(Debug)]
pub struct Transmit {
    ring: Ring,
    scratch: ChainScratch,
}

impl Transmit {
    /// The driver's queue.
    pub fn new(ring: Ring) -> Self {
        Self { ring, scratch: ChainScratch::new() }
    }

    /// Passes packets on to the tap, as far as a go reaches. A packet that the tap does not take
    /// is lost, as on any wire.
    pub fn serve(
        &mut self,
        interrupt: &dyn Interrupt,
        tap: &impl AsFd,
        metrics: &NetMetrics,
    ) -> Result<Served, DeviceError> {
        let scratch = &mut self.scratch;
        self.ring.serve(&mut Budget::new(BATCH), interrupt, |ring, chain| {
            let limit = usize::from(ring.size());
            let mut chain = scratch.load(&chain, limit).map_err(|error| ring.error(&error.to_string()))?;
            let length = chain.readable.len();
            let makes_sense = !chain.faulty && (HEADER_SIZE + 1..=FRAME_LIMIT).contains(&length);
            let fd: BorrowedFd<'_> = tap.as_fd();
            if makes_sense && chain.readable.write_packet(fd).is_ok() {
                NetMetrics::count(&metrics.sent, 1);
                NetMetrics::count(&metrics.sent_bytes, length);
            } else {
                NetMetrics::count(&metrics.send_dropped, 1);
            }
            ring.complete(chain.head, 0)
        })
    }
}
