//! The device: its registers, and the life of its threads.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::by_crate::ByCrate;
use super::config::ConfigSpace;
use super::volumes::Volumes;
use super::workers::Workers;
use crate::devices::virtio::device::{Activation, DeviceError, VirtioDevice};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::wake::Wake;

pub(super) const NAME: &str = "fs";
/// Forgotten files, then requests. A request of 1 MiB in pages takes 258 descriptors, or one
/// that leads to a table of them.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// A virtio-fs device.
#[derive(Debug)]
pub struct Fs {
    volumes: Arc<Volumes>,
    notifications: Vec<EventFd>,
    workers: Option<Workers>,
    failed: Arc<Wake>,
}

impl Fs {
    /// A device that shows these volumes.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new(volumes: Arc<Volumes>) -> io::Result<Self> {
        Ok(Self { volumes, notifications: Vec::new(), workers: None, failed: Arc::new(Wake::new()?) })
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

    fn take_notifications(&mut self, notifications: &[EventFd]) -> io::Result<bool> {
        self.notifications = notifications.iter().map(EventFd::try_clone).collect::<io::Result<_>>()?;
        Ok(true)
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { memory, queues, interrupt, features } = activation;
        let rings = (0..).zip(queues).map(|(index, queue)| Ring::new(NAME, index, queue, &memory, features));
        let rings = rings.collect::<Result<Vec<_>, _>>()?;
        let (volumes, failed) = (self.volumes.clone(), self.failed.clone());
        let workers = Workers::start(rings, &self.notifications, interrupt, volumes, failed, ByCrate::new);
        let failed = |error: io::Error| DeviceError { device: NAME, reason: format!("no thread for it: {error}") };
        self.workers = Some(workers.map_err(failed)?);
        Ok(())
    }

    fn reset(&mut self) {
        // Waits for requests in progress: they write to the guest's memory.
        self.workers = None;
        self.failed.clear();
    }

    fn queue_notified(&mut self, _index: u16) -> Result<(), DeviceError> {
        // The threads see to that.
        Ok(())
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some((*self.failed).as_fd())
    }

    fn poll_ready(&mut self) -> Result<(), DeviceError> {
        self.failed.clear();
        self.workers.as_ref().and_then(Workers::failure).map_or(Ok(()), Err)
    }
}
