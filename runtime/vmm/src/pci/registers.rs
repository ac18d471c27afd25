//! The common configuration structure of a virtio device (Virtual I/O Device 1.2,
//! 4.1.4.3): plain registers, and what the driver has said so far.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::msix::Msix;

/// Length of the structure.
pub const SIZE: usize = 64;
/// Driver is ready.
pub const STATUS_DRIVER_OK: u8 = 4;
/// Driver has accepted features.
pub const STATUS_FEATURES_OK: u8 = 8;
/// Device has given up until it is reset.
pub const STATUS_NEEDS_RESET: u8 = 0x40;
const FEATURE_VERSION_1: u64 = 1 << 32;
const FEATURE_EVENT_INDEX: u64 = 1 << 29;

const DEVICE_FEATURE_SELECT: usize = 0;
const DEVICE_FEATURE: usize = 4;
const DRIVER_FEATURE_SELECT: usize = 8;
const DRIVER_FEATURE: usize = 12;
const CONFIG_VECTOR: usize = 16;
const QUEUE_COUNT: usize = 18;
const STATUS: usize = 20;
const GENERATION: usize = 21;
const QUEUE_SELECT: usize = 22;
const QUEUE_SIZE: usize = 24;
const QUEUE_VECTOR: usize = 26;
const QUEUE_ENABLE: usize = 28;
const QUEUE_NOTIFY: usize = 30;
const QUEUE_DESCRIPTORS: usize = 32;
const QUEUE_DRIVER: usize = 40;
const QUEUE_DEVICE: usize = 48;

/// What the driver has set up of one queue.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct QueueSetup {
    limit: u16,
    size: u16,
    enabled: bool,
    /// Descriptor table, available ring, used ring.
    areas: [u64; 3],
}

/// A change that concerns more than the registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// None.
    None,
    /// The driver reset the device.
    Reset,
    /// The driver is ready: activate the device.
    Activate,
}

/// The registers. What they hold is all there is to save of them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Registers {
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

impl Registers {
    /// Registers of a device that offers `features` and queues of at most `sizes`.
    pub fn new(features: u64, sizes: &[u16]) -> Self {
        let queue = |limit: &u16| QueueSetup { limit: *limit, size: *limit, enabled: false, areas: [0; 3] };
        Self {
            offered: features,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            status: 0,
            queue_select: 0,
            queues: sizes.iter().map(queue).collect(),
        }
    }

    /// Back to the beginning.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.limit).collect();
        *self = Self::new(self.offered, &sizes);
    }

    /// Whether these, which were saved, can be the registers of a device that `other` belongs to.
    pub fn fits(&self, other: &Self) -> bool {
        let limits = |registers: &Self| registers.queues.iter().map(|queue| queue.limit).collect::<Vec<_>>();
        self.offered == other.offered && limits(self) == limits(other)
    }

    /// The device has given up.
    pub fn set_needs_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
    }

    /// The features that both sides agreed on.
    pub fn features(&self) -> u64 {
        self.accepted
    }

    /// The queues that the driver enabled, or the number of the first that makes no sense.
    pub fn build_queues(&self, memory: &GuestMemoryMmap) -> Result<Vec<Queue>, usize> {
        self.queues.iter().enumerate().map(|(index, setup)| setup.build(memory, self.accepted).ok_or(index)).collect()
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The driver reads.
    pub fn read(&self, offset: usize, data: &mut [u8], msix: &Msix) {
        let image = self.image(msix);
        for (byte, value) in data.iter_mut().zip(image.iter().skip(offset)) {
            *byte = *value;
        }
    }

    fn image(&self, msix: &Msix) -> [u8; SIZE] {
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut image = [0; SIZE];
        let mut put = |offset: usize, bytes: &[u8]| {
            for (target, byte) in image.iter_mut().skip(offset).zip(bytes) {
                *target = *byte;
            }
        };
        put(DEVICE_FEATURE_SELECT, &self.device_select.to_le_bytes());
        put(DEVICE_FEATURE, &half(self.offered, self.device_select).to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &self.driver_select.to_le_bytes());
        put(DRIVER_FEATURE, &half(self.accepted, self.driver_select).to_le_bytes());
        put(CONFIG_VECTOR, &msix.config_vector().to_le_bytes());
        put(QUEUE_COUNT, &(self.queues.len() as u16).to_le_bytes());
        put(STATUS, &[self.status]);
        put(GENERATION, &[msix.generation()]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.selected() {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &msix.queue_vector(self.queue_select).to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY, &self.queue_select.to_le_bytes());
            for (offset, area) in [QUEUE_DESCRIPTORS, QUEUE_DRIVER, QUEUE_DEVICE].into_iter().zip(queue.areas) {
                put(offset, &area.to_le_bytes());
            }
        }
        image
    }

    /// The driver writes. Accesses that straddle registers are ignored.
    pub fn write(&mut self, offset: usize, data: &[u8], msix: &Msix) -> Effect {
        let mut bytes = [0; 8];
        for (target, byte) in bytes.iter_mut().zip(data) {
            *target = *byte;
        }
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => self.driver_select = value as u32,
            (DRIVER_FEATURE, 4) => self.accept(value),
            (CONFIG_VECTOR, 2) => msix.set_config_vector(value as u16),
            (STATUS, 1) => return self.set_status(value as u8),
            (QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (QUEUE_VECTOR, 2) => msix.set_queue_vector(self.queue_select, value as u16),
            (QUEUE_SIZE | QUEUE_ENABLE | QUEUE_DESCRIPTORS.., _) => self.write_queue(offset, data.len(), value),
            _ => {}
        }
        Effect::None
    }

    fn accept(&mut self, value: u64) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        match self.driver_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | value,
            1 => self.accepted = self.accepted & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let before = self.status;
        self.status |= value & !STATUS_NEEDS_RESET;
        if self.accepted & !self.offered != 0 || self.accepted & FEATURE_VERSION_1 == 0 {
            self.status &= !STATUS_FEATURES_OK;
        }
        let ready = STATUS_FEATURES_OK | STATUS_DRIVER_OK;
        if self.status & ready == ready && before & ready != ready { Effect::Activate } else { Effect::None }
    }

    fn write_queue(&mut self, offset: usize, length: usize, value: u64) {
        // The setup is fixed once the driver is ready.
        if self.status & STATUS_DRIVER_OK != 0 {
            return;
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        let low = |area: &mut u64| *area = *area & !0xffff_ffff | value & 0xffff_ffff;
        let high = |area: &mut u64| *area = *area & 0xffff_ffff | value << 32;
        let [descriptors, driver, device] = &mut queue.areas;
        match (offset, length) {
            (QUEUE_SIZE, 2) => queue.size = value as u16,
            (QUEUE_ENABLE, 2) => queue.enabled = value == 1,
            (QUEUE_DESCRIPTORS, 4) => low(descriptors),
            (36, 4) => high(descriptors),
            (QUEUE_DESCRIPTORS, 8) => *descriptors = value,
            (QUEUE_DRIVER, 4) => low(driver),
            (44, 4) => high(driver),
            (QUEUE_DRIVER, 8) => *driver = value,
            (QUEUE_DEVICE, 4) => low(device),
            (52, 4) => high(device),
            (QUEUE_DEVICE, 8) => *device = value,
            _ => {}
        }
    }
}

impl QueueSetup {
    /// The queue as the device will use it, or none if the driver's setup makes no sense.
    fn build(&self, memory: &GuestMemoryMmap, features: u64) -> Option<Queue> {
        let mut queue = Queue::new(self.limit).ok()?;
        if !self.enabled {
            return Some(queue);
        }
        let [descriptors, driver, device] = self.areas.map(GuestAddress);
        queue.try_set_size(self.size).ok()?;
        queue.try_set_desc_table_address(descriptors).ok()?;
        queue.try_set_avail_ring_address(driver).ok()?;
        queue.try_set_used_ring_address(device).ok()?;
        queue.set_event_idx(features & FEATURE_EVENT_INDEX != 0);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }
}
