//! What a virtio device is to the rest of the machine.
//!
//! A device is its queues' handler and nothing else: the PCI transport owns the
//! registers, the feature negotiation and the interrupts; the event loop owns the thread.
//! Queue and poll events are handled on the event loop's thread. What follows from a
//! register access ([`VirtioDevice::read_config`], [`VirtioDevice::activate`],
//! [`VirtioDevice::reset`]) happens on the thread of the processor that made it, so that
//! the driver finds it done. All of them hold the device's lock. A device whose requests may
//! take as long as a disk has threads of its own ([`VirtioDevice::take_notifications`]).
//!
//! Everything that comes out of guest memory or a queue is hostile. A handler never
//! panics on it: a malformed request fails that request, a malformed queue
//! ([`DeviceError`]) marks the device as needing a reset, and nothing else notices.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Tells the driver that something happened.
pub trait Interrupt: Send + Sync {
    /// Queue `index` has used buffers.
    fn queue(&self, index: u16);
    /// The device's configuration changed.
    fn config(&self);
}

/// How far a device has come with a queue (virtio 1.2, section 2.7): both count chains, modulo
/// 2^16.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePosition {
    /// Taken from the available ring.
    pub available: u16,
    /// Given back by the used ring.
    pub used: u16,
}

/// A device that can go on elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// By queue. What it has taken it has given back.
    pub positions: Vec<QueuePosition>,
    /// What only a device of its kind understands.
    pub own: Vec<u8>,
}

/// All a device gets when its driver is ready.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemoryMmap,
    /// The queues the driver enabled, by index; a queue it left alone is not ready.
    pub queues: Vec<Queue>,
    /// How to reach the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// The features both sides agreed on.
    pub features: u64,
}

/// The driver broke the protocol in a way that only a reset mends.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {reason}")]
pub struct DeviceError {
    /// Which device.
    pub device: &'static str,
    /// What the driver did.
    pub reason: String,
}

/// One virtio device, without its transport.
pub trait VirtioDevice: Send {
    /// Short name for messages, for example `block`.
    fn name(&self) -> &'static str;
    /// Device type of the virtio specification, section 5.
    fn device_type(&self) -> u16;
    /// Largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Whether one interrupt serves all queues. Each interrupt takes a driver time to set up,
    /// which counts for a device that is there at boot.
    fn shares_interrupt(&self) -> bool {
        false
    }
    /// Feature bits offered, `VIRTIO_F_VERSION_1` included.
    fn features(&self) -> u64;
    /// Reads the device-specific configuration. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver is ready (DRIVER_OK). Called once between resets.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;
    /// Back to the state before [`VirtioDevice::activate`]; what is in flight is not given back. Waits for none of it, see
    /// [`VirtioDevice::is_reset`].
    fn reset(&mut self);
    /// Whether nothing writes to the driver's buffers any more that was in flight at the last [`VirtioDevice::reset`]. The
    /// driver sees its reset done only then (virtio 1.2, section 2.4.2), and the device is not activated before.
    fn is_reset(&mut self) -> bool {
        true
    }
    /// What takes an active device to go on elsewhere; none if it cannot.
    fn state(&self) -> Option<DeviceState> {
        None
    }
    /// The driver notified queue `index`. Called on an active device only.
    fn queue_notified(&mut self, index: u16) -> Result<(), DeviceError>;
    /// The event descriptors by which the driver notifies each queue. A device that answers
    /// true waits for them in threads of its own, and [`VirtioDevice::queue_notified`] is not
    /// called. Called once, before everything else.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    fn take_notifications(&mut self, notifications: &[EventFd]) -> io::Result<bool> {
        let _ = notifications;
        Ok(false)
    }
    /// A descriptor to watch for input for as long as the device lives (an epoll instance
    /// if the device has several), or none.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// [`VirtioDevice::poll_fd`] is readable. May be called on an inactive device.
    fn poll_ready(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}
