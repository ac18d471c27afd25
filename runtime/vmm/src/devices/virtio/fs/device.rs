//! The device: its registers, and the life of its threads.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::config::ConfigSpace;
use super::requests::Requests;
use super::volumes::Volumes;
use crate::devices::virtio::device::{Activation, DeviceError, VirtioDevice};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::workers::Threads;

pub(super) const NAME: &str = "fs";
/// Forgotten files, then requests. A request of 1 MiB in pages takes 258 descriptors, or one
/// that leads to a table of them.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// A virtio-fs device.
#[derive(Debug)]
pub struct Fs {
    volumes: Arc<Volumes>,
    threads: Threads<Requests>,
}

impl Fs {
    /// A device that shows these volumes.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new(volumes: Arc<Volumes>) -> io::Result<Self> {
        Ok(Self { volumes, threads: Threads::new()? })
    }
}

impl VirtioDevice for Fs {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_FS as u16
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        ConfigSpace::new().read(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { memory, queues, interrupt, features } = activation;
        let rings = (0..).zip(queues).map(|(index, queue)| Ring::new(NAME, index, queue, &memory, features));
        let rings = rings.collect::<Result<Vec<_>, _>>()?;
        self.threads.start(Requests::new(self.volumes.clone()), rings, interrupt)
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
