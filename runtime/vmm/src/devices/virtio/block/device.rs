//! The queue handler.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::config::{ConfigSpace, QUEUE_SIZE, SEGMENTS_LIMIT};
use super::disk::{Disk, SECTOR};
use super::metrics::BlockMetrics;
use super::request;
use crate::devices::virtio::budget::{Budget, Served};
use crate::devices::virtio::chain::ChainScratch;
use crate::devices::virtio::device::{Activation, DeviceError, Interrupt, VirtioDevice};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::wake::Wake;

const NAME: &str = "block";
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
/// Descriptors of the longest request: the data, a header and a status byte.
const CHAIN_LIMIT: usize = SEGMENTS_LIMIT as usize + 2;
/// Requests served in one go before other devices get their turn.
const BATCH: usize = 256;
/// After so many bytes the driver hears of what is done, though more is to do.
const SIGNAL_BYTES: u64 = 1 << 20;

/// A virtio-blk device.
pub struct Block {
    disk: Disk,
    config: ConfigSpace,
    features: u64,
    active: Option<Active>,
    scratch: ChainScratch,
    wake: Wake,
    metrics: Arc<BlockMetrics>,
}

struct Active {
    ring: Ring,
    interrupt: Arc<dyn Interrupt>,
    /// The driver does not know of flushes, so every write has to last at once.
    write_through: bool,
}

impl Block {
    /// A device for `disk`.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new(disk: Disk) -> std::io::Result<Self> {
        let mut features = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        features |= if disk.read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        Ok(Self {
            config: ConfigSpace::new(disk.size() / SECTOR, disk.read_only()),
            disk,
            features,
            active: None,
            scratch: ChainScratch::new(),
            wake: Wake::new()?,
            metrics: Arc::default(),
        })
    }

    /// What it did so far.
    #[must_use]
    pub fn metrics(&self) -> Arc<BlockMetrics> {
        self.metrics.clone()
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(Active { ring, interrupt, write_through }) = &mut self.active else { return Ok(()) };
        let (disk, scratch, metrics) = (&mut self.disk, &mut self.scratch, &self.metrics);
        let mut unsignalled = 0;
        let served = ring.serve(&mut Budget::new(BATCH), interrupt.as_ref(), |ring, chain| {
            let chain = scratch.load(&chain, CHAIN_LIMIT).map_err(|error| ring.error(&error.to_string()))?;
            let head = chain.head;
            unsignalled += (chain.readable.len() + chain.writable.len()) as u64;
            match request::serve(disk, chain, *write_through, metrics) {
                Some(written) => ring.complete(head, written)?,
                None => return Err(ring.error("a request has no room for its status")),
            }
            if unsignalled >= SIGNAL_BYTES {
                unsignalled = 0;
                ring.signal(interrupt.as_ref());
            }
            Ok(())
        })?;
        if served == Served::Part {
            self.wake.set();
        }
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { memory, queues, interrupt, features } = activation;
        let Some(queue) = queues.into_iter().next() else {
            return Err(DeviceError { device: NAME, reason: "no queue".into() });
        };
        let ring = Ring::new(NAME, 0, queue, &memory, features)?;
        let write_through = features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        self.active = Some(Active { ring, interrupt, write_through });
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

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reads = self.metrics.reads.load(Ordering::Relaxed);
        let writes = self.metrics.writes.load(Ordering::Relaxed);
        f.debug_struct("Block")
            .field("disk", &self.disk)
            .field("active", &self.active.is_some())
            .field("reads", &reads)
            .field("writes", &writes)
            .finish_non_exhaustive()
    }
}
