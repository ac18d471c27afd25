//! The device: its registers, and what its threads serve.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::config::{ConfigSpace, QUEUE_SIZE, SEGMENTS_LIMIT};
use super::disk::{Disk, SECTOR};
use super::metrics::BlockMetrics;
use super::request;
use crate::devices::virtio::chain::ChainScratch;
use crate::devices::virtio::descriptors::AvailableChain;
use crate::devices::virtio::device::{Activation, DeviceError, VirtioDevice};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::workers::{Answer, Handler, Threads, Way};

const NAME: &str = "block";
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
/// Descriptors of the longest request: the data, a header and a status byte.
const CHAIN_LIMIT: usize = SEGMENTS_LIMIT as usize + 2;
/// Most requests that the host is asked for at once: what a fast disk wants to be busy, and a driver keeps under way.
const THREADS: usize = 32;

/// A virtio-blk device.
pub struct Block {
    disk: Arc<Disk>,
    config: ConfigSpace,
    features: u64,
    threads: Threads<Requests>,
    metrics: Arc<BlockMetrics>,
}

impl Block {
    /// A device for `disk`.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new(disk: Disk) -> io::Result<Self> {
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
            disk: Arc::new(disk),
            features,
            threads: Threads::new()?,
            metrics: Arc::default(),
        })
    }

    /// What it did so far.
    #[must_use]
    pub fn metrics(&self) -> Arc<BlockMetrics> {
        self.metrics.clone()
    }
}

/// What serves the requests of a driver.
struct Requests {
    disk: Arc<Disk>,
    metrics: Arc<BlockMetrics>,
    /// The driver does not know of flushes, so every write has to last at once.
    write_through: bool,
}

impl Handler for Requests {
    type Room = ChainScratch;

    fn name(&self) -> &'static str {
        NAME
    }

    fn threads(&self) -> usize {
        THREADS
    }

    fn room(&self) -> io::Result<ChainScratch> {
        Ok(ChainScratch::new())
    }

    fn serve(
        &self,
        _index: u16,
        chain: &AvailableChain,
        room: &mut ChainScratch,
        way: &mut dyn Way,
    ) -> Result<Answer, String> {
        let chain = room.load(chain, CHAIN_LIMIT).map_err(|error| error.to_string())?;
        let moved = (chain.readable.len() + chain.writable.len()) as u64;
        let written = request::serve(&self.disk, chain, self.write_through, &self.metrics, way);
        let written = written.ok_or("a request has no room for its status")?;
        Ok(Answer { written, moved })
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
        let requests = Requests { disk: self.disk.clone(), metrics: self.metrics.clone(), write_through };
        self.threads.start(requests, vec![ring], interrupt)
    }

    fn reset(&mut self) {
        self.threads.reset();
    }

    fn is_reset(&mut self) -> bool {
        self.threads.is_reset()
    }

    fn take_notifications(&mut self, notifications: &[EventFd]) -> io::Result<bool> {
        self.threads.take_notifications(notifications)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.threads.poll_fd())
    }

    fn poll_ready(&mut self) -> Result<(), DeviceError> {
        self.threads.poll_ready()
    }

    fn queue_notified(&mut self, _index: u16) -> Result<(), DeviceError> {
        // The threads see to that.
        Ok(())
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reads = self.metrics.reads.load(Ordering::Relaxed);
        let writes = self.metrics.writes.load(Ordering::Relaxed);
        f.debug_struct("Block")
            .field("disk", &self.disk)
            .field("active", &self.threads.are_active())
            .field("reads", &reads)
            .field("writes", &writes)
            .finish_non_exhaustive()
    }
}
