//! The guest's side of a virtqueue, for the tests of the devices: real rings in real guest
//! memory, with wrap-around and event indices, as a driver would keep them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::device::{Activation, Interrupt};

/// `VIRTIO_F_VERSION_1` and what there is of rings, as Linux negotiates.
pub const FEATURES: u64 = 1 << 32 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Where a buffer is, and who writes it.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub length: u32,
    pub writable: bool,
}

pub fn readable(address: u64, length: u32) -> Buffer {
    Buffer { address, length, writable: false }
}

pub fn writable(address: u64, length: u32) -> Buffer {
    Buffer { address, length, writable: true }
}

/// Counts the interrupts of each queue.
#[derive(Debug, Default)]
pub struct Interrupts([AtomicU32; 4]);

impl Interrupts {
    pub fn take(&self, queue: u16) -> u32 {
        self.0[usize::from(queue)].swap(0, Ordering::SeqCst)
    }
}

impl Interrupt for Interrupts {
    fn queue(&self, index: u16) {
        self.0[usize::from(index)].fetch_add(1, Ordering::SeqCst);
    }

    fn config(&self) {}
}

/// Guest memory with a hole: 0 to `size`, and as much again from 4 GiB on.
pub fn memory(size: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size), (GuestAddress(1 << 32), size)]).unwrap()
}

/// Everything a device gets, for queues whose drivers the test keeps.
pub fn activation(
    memory: &GuestMemoryMmap,
    drivers: &[&Driver],
    features: u64,
    interrupt: &Arc<Interrupts>,
) -> Activation {
    Activation {
        memory: memory.clone(),
        queues: drivers.iter().map(|driver| driver.queue()).collect(),
        interrupt: interrupt.clone(),
        features,
    }
}

/// Makes chains available as fast as a device gives them back, until it is dropped: what a second processor of a hostile
/// guest does.
pub struct Feeder {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().map(JoinHandle::join);
    }
}

/// The driver of one queue.
#[derive(Debug)]
pub struct Driver {
    memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
    available: u16,
    used: u16,
    event_index: bool,
}

impl Driver {
    /// A queue of `size` entries whose rings start at `base`.
    pub fn new(memory: &GuestMemoryMmap, base: u64, size: u16) -> Self {
        let driver = Self::at(memory, base, size);
        driver.memory.write_slice(&vec![0; Self::span(size) as usize], GuestAddress(base)).unwrap();
        driver
    }

    fn at(memory: &GuestMemoryMmap, base: u64, size: u16) -> Self {
        Self {
            memory: memory.clone(),
            base,
            size,
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
            available: 0,
            used: 0,
            event_index: true,
        }
    }

    /// Bytes the rings of a queue take.
    pub fn span(size: u16) -> u64 {
        (16 * u64::from(size) + 6 + 2 * u64::from(size)).next_multiple_of(4) + 6 + 8 * u64::from(size)
    }

    pub fn without_event_index(mut self) -> Self {
        self.event_index = false;
        self
    }

    pub fn available_ring(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    pub fn used_ring(&self) -> u64 {
        (self.available_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The queue as the transport hands it over.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(self.base);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.available_ring());
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used_ring());
        queue.set_used_ring_address(low, high);
        queue.set_ready(true);
        queue
    }

    /// Descriptors that are not in use.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Makes a chain of `buffers` available. Returns its head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let indices = self.free.split_off(self.free.len() - buffers.len());
        for (position, (index, buffer)) in indices.iter().zip(buffers).enumerate() {
            let next = indices.get(position + 1);
            let flags = if next.is_some() { VRING_DESC_F_NEXT } else { 0 }
                | if buffer.writable { VRING_DESC_F_WRITE } else { 0 };
            self.descriptor(*index, buffer.address, buffer.length, flags as u16, next.copied().unwrap_or(0));
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        self.push(head);
        head
    }

    /// Writes one descriptor, whatever it says.
    pub fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        Self::descriptor_at(&self.memory, self.base + 16 * u64::from(index), address, length, flags, next);
    }

    /// Writes one descriptor anywhere, such as into an indirect table.
    pub fn descriptor_at(memory: &GuestMemoryMmap, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Puts `head` on the available ring, whatever it is.
    pub fn push(&mut self, head: u16) {
        let entry = self.available_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head.to_le(), GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available_index(self.available);
    }

    /// Claims that the available ring is filled up to `index`.
    pub fn set_available_index(&self, index: u16) {
        self.memory.store(index.to_le(), GuestAddress(self.available_ring() + 2), Ordering::Release).unwrap();
    }

    /// Keeps all entries of the ring available, whatever they are.
    pub fn feed(&self) -> Feeder {
        let (driver, stop) = (Self::at(&self.memory, self.base, self.size), Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let begins = Arc::new(Barrier::new(2));
        let begun = begins.clone();
        let thread = std::thread::spawn(move || {
            let feed = || driver.set_available_index(driver.used_index().wrapping_add(driver.size));
            feed();
            begins.wait();
            while !stopped.load(Ordering::SeqCst) {
                feed();
            }
        });
        begun.wait();
        Feeder { stop, thread: Some(thread) }
    }

    /// How many chains it claims to have made available, modulo 2^16.
    pub fn available_index(&self) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(self.available_ring() + 2), Ordering::Acquire).unwrap())
    }

    /// How many chains the device gave back, modulo 2^16.
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(self.used_ring() + 2), Ordering::Acquire).unwrap())
    }

    /// The next chain the device gave back: its head and how much was written. Asks for an
    /// interrupt at the one after.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.used {
            return None;
        }
        let entry = GuestAddress(self.used_ring() + 4 + 8 * u64::from(self.used % self.size));
        let [id, written]: [u32; 2] = self.memory.read_obj(entry).unwrap();
        self.used = self.used.wrapping_add(1);
        if self.event_index {
            let event = self.available_ring() + 4 + 2 * u64::from(self.size);
            self.memory.store(self.used.to_le(), GuestAddress(event), Ordering::SeqCst).unwrap();
        }
        let head = u16::try_from(id).unwrap();
        self.free.extend(self.chains.remove(&head).unwrap_or_default().into_iter().rev());
        Some((head, written))
    }

    /// Whether the device wants to hear of what was made available last, `added` chains.
    pub fn wants_notification(&self, added: u16) -> bool {
        let address = if self.event_index { self.used_ring() + 4 + 8 * u64::from(self.size) } else { self.used_ring() };
        let value: u16 = self.memory.load(GuestAddress(address), Ordering::SeqCst).unwrap();
        if self.event_index {
            let event = u16::from_le(value);
            self.available.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            value & 1 == 0
        }
    }
}
