//! The queue handler.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::metrics::RngMetrics;
use crate::devices::virtio::budget::{Budget, Served};
use crate::devices::virtio::chain::ChainScratch;
use crate::devices::virtio::device::{Activation, DeviceError, Interrupt, VirtioDevice};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::wake::Wake;

pub(crate) const NAME: &str = "rng";
/// Linux asks for one buffer at a time.
const QUEUE_SIZES: [u16; 1] = [8];
/// The most random bytes one request gets, so that none holds the event loop for long.
const BYTES_LIMIT: usize = 4096;
/// Requests served in one go before others get their turn.
const BATCH: usize = 64;

/// The device. It keeps no state between requests.
#[derive(Debug)]
pub struct Rng {
    active: Option<Active>,
    scratch: ChainScratch,
    wake: Wake,
    metrics: Arc<RngMetrics>,
}

struct Active {
    ring: Ring,
    interrupt: Arc<dyn Interrupt>,
}

impl std::fmt::Debug for Active {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Active").field("ring", &self.ring).finish_non_exhaustive()
    }
}

impl Rng {
    /// A random number device.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { active: None, scratch: ChainScratch::new(), wake: Wake::new()?, metrics: Arc::default() })
    }

    /// What it did so far.
    #[must_use]
    pub fn metrics(&self) -> Arc<RngMetrics> {
        self.metrics.clone()
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(Active { ring, interrupt }) = &mut self.active else { return Ok(()) };
        let (scratch, metrics) = (&mut self.scratch, &self.metrics);
        let served = ring.serve(&mut Budget::new(BATCH), interrupt.as_ref(), |ring, chain| {
            let limit = usize::from(ring.size());
            let mut chain = scratch.load(&chain, limit).map_err(|error| ring.error(&error.to_string()))?;
            let count = chain.writable.len().min(BYTES_LIMIT);
            // No entropy is an empty answer: the driver asks again.
            let written = if chain.writable.write_random(count).is_ok() { count } else { 0 };
            metrics.requests.fetch_add(1, Ordering::Relaxed);
            metrics.bytes.fetch_add(written as u64, Ordering::Relaxed);
            ring.complete(chain.head, written as u32)
        })?;
        if served == Served::Part {
            self.wake.set();
        }
        Ok(())
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { memory, queues, interrupt, features } = activation;
        let Some(queue) = queues.into_iter().next() else {
            return Err(DeviceError { device: NAME, reason: "no queue".into() });
        };
        let ring = Ring::new(NAME, 0, queue, &memory, features)?;
        self.active = Some(Active { ring, interrupt });
        self.serve()
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_notified(&mut self, _index: u16) -> Result<(), DeviceError> {
        self.serve()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }

    fn poll_ready(&mut self) -> Result<(), DeviceError> {
        self.wake.clear();
        self.serve()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::{Rng, *};
    use crate::devices::virtio::testing::{Driver, FEATURES, Interrupts, activation, memory, readable, writable};

    fn device() -> (Rng, Driver, GuestMemoryMmap, Arc<Interrupts>) {
        let memory = memory(0x10_0000);
        let driver = Driver::new(&memory, 0x1000, 8);
        let interrupts = Arc::new(Interrupts::default());
        let mut rng = Rng::new().unwrap();
        rng.activate(activation(&memory, &[&driver], FEATURES, &interrupts)).unwrap();
        (rng, driver, memory, interrupts)
    }

    #[test]
    fn guest_gets_different_bytes_and_one_interrupt() {
        let (mut rng, mut driver, memory, interrupts) = device();
        driver.add(&[writable(0x2000, 32), writable(0x3000, 32)]);
        driver.add(&[writable(0x4000, 64)]);
        rng.queue_notified(0).unwrap();
        assert_eq!(driver.take().map(|used| used.1), Some(64));
        assert_eq!(driver.take().map(|used| used.1), Some(64));
        assert_eq!(interrupts.take(0), 1);
        let mut halves = [[0_u8; 32]; 4];
        for (half, at) in halves.iter_mut().zip([0x2000, 0x3000, 0x4000, 0x4020]) {
            memory.read_slice(half, GuestAddress(at)).unwrap();
        }
        for (i, half) in halves.iter().enumerate() {
            assert!(!halves[..i].contains(half), "the same bytes twice");
            assert_ne!(*half, [0; 32]);
        }
    }

    #[test]
    fn a_request_is_bounded_and_buffers_outside_memory_are_left_alone() {
        let (mut rng, mut driver, _memory, _) = device();
        driver.add(&[writable(0x8000, 0x8000)]);
        driver.add(&[writable(1 << 40, 64)]);
        driver.add(&[readable(0x8000, 64)]);
        rng.queue_notified(0).unwrap();
        assert_eq!(driver.take().map(|used| used.1), Some(4096));
        assert_eq!(driver.take().map(|used| used.1), Some(0));
        assert_eq!(driver.take().map(|used| used.1), Some(0));
    }

    #[test]
    fn an_endless_chain_needs_a_reset() {
        let (mut rng, mut driver, _memory, _) = device();
        driver.descriptor(0, 0x8000, 64, 3, 0);
        driver.push(0);
        assert!(rng.queue_notified(0).is_err());
    }

    proptest! {
        #[test]
        fn garbage_in_the_queue_never_panics(garbage in proptest::collection::vec(any::<u8>(), 400), index in any::<u16>()) {
            let (mut rng, driver, memory, _) = device();
            memory.write_slice(&garbage, GuestAddress(0x1000)).unwrap();
            driver.set_available_index(index);
            let _ = rng.queue_notified(0);
            let _ = rng.poll_ready();
        }
    }
}
