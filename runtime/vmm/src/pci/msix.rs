//! A function's MSI-X table and pending bits (PCI Local Bus Specification 3.0, 6.8.2),
//! and the interrupts that its device raises through them.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::devices::virtio::device::Interrupt;
use crate::interrupts::{Line, Message, RouteError, Routes};

/// "No vector": the event raises no interrupt.
pub const NO_VECTOR: u16 = 0xffff;
/// Offset of the pending bits in the memory range; the table is at 0.
pub const PENDING_OFFSET: u64 = 0x800;
const ENTRY_SIZE: u64 = 16;
const ENTRY_MASKED: u32 = 1;
/// Bits of the control register.
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// See [`CONTROL_ENABLE`].
pub const CONTROL_MASK_ALL: u16 = 1 << 14;

/// One line of the table.
struct Entry {
    words: [u32; 4],
    pending: bool,
    /// Made when the first interrupt is due.
    line: Option<Line>,
}

struct Table {
    control: u16,
    entries: Vec<Entry>,
}

/// What the guest has set up of a device's interrupts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MsixState {
    control: u16,
    entries: Vec<([u32; 4], bool)>,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    generation: u8,
}

/// The interrupts of one device.
pub struct Msix {
    device: &'static str,
    vectors: usize,
    routes: Arc<Routes>,
    table: Mutex<Table>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    generation: AtomicU8,
}

impl Msix {
    /// Interrupts for a device with `queues` queues: one vector for changes of its
    /// configuration and, unless it is `shared`, one for each queue.
    pub fn new(device: &'static str, queues: usize, shared: bool, routes: Arc<Routes>) -> Self {
        let vectors = if shared { 2 } else { queues.saturating_add(1) };
        let entry = || Entry { words: [0, 0, 0, ENTRY_MASKED], pending: false, line: None };
        Self {
            device,
            vectors,
            routes,
            table: Mutex::new(Table { control: 0, entries: (0..vectors).map(|_| entry()).collect() }),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            generation: AtomicU8::new(0),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        self.vectors
    }

    /// Changes whenever the device's configuration does.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// Vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    /// Vector of queue `index`.
    pub fn queue_vector(&self, index: u16) -> u16 {
        self.queue_vectors.get(usize::from(index)).map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// A vector that does not exist is none.
    fn checked(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vectors() { vector } else { NO_VECTOR }
    }

    /// The driver chose a vector for configuration changes.
    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.checked(vector), Ordering::Relaxed);
    }

    /// The driver chose a vector for queue `index`.
    pub fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(place) = self.queue_vectors.get(usize::from(index)) {
            place.store(self.checked(vector), Ordering::Relaxed);
        }
    }

    /// The device was reset: no event has a vector.
    pub fn forget_vectors(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
    }

    /// The guest wrote the capability's control register.
    pub fn set_control(&self, control: u16) {
        let mut table = self.table();
        table.control = control;
        for index in 0..table.entries.len() {
            self.settle(&mut table, index);
        }
    }

    /// What the guest has set up.
    pub fn state(&self) -> MsixState {
        let table = self.table();
        MsixState {
            control: table.control,
            entries: table.entries.iter().map(|entry| (entry.words, entry.pending)).collect(),
            config_vector: self.config_vector(),
            queue_vectors: self.queue_vectors.iter().map(|vector| vector.load(Ordering::Relaxed)).collect(),
            generation: self.generation(),
        }
    }

    /// Takes that over from a device of the same kind; what is due is delivered.
    pub fn restore(&self, state: &MsixState) {
        self.set_config_vector(state.config_vector);
        for (index, vector) in (0..).zip(&state.queue_vectors) {
            self.set_queue_vector(index, *vector);
        }
        self.generation.store(state.generation, Ordering::Release);
        let mut table = self.table();
        for (entry, (words, pending)) in table.entries.iter_mut().zip(&state.entries) {
            (entry.words, entry.pending) = (*words, *pending);
        }
        drop(table);
        self.set_control(state.control);
    }

    /// The guest reads the memory range.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let table = self.table();
        if offset >= PENDING_OFFSET {
            let bits =
                table.entries.iter().enumerate().map(|(index, entry)| u128::from(entry.pending) << index.min(127));
            let bytes = bits.fold(0, |all, bit| all | bit).to_le_bytes();
            let start = usize::try_from(offset - PENDING_OFFSET).unwrap_or(usize::MAX);
            for (target, byte) in data.iter_mut().zip(bytes.iter().skip(start)) {
                *target = *byte;
            }
        } else {
            for (index, chunk) in (0_u64..).zip(data.chunks_mut(4)) {
                let place = offset + index * 4;
                if let Some(entry) = table.entries.get((place / ENTRY_SIZE) as usize) {
                    let word = entry.words[(place / 4 % 4) as usize].to_le_bytes();
                    for (target, byte) in chunk.iter_mut().zip(word) {
                        *target = byte;
                    }
                }
            }
        }
    }

    /// The guest writes the memory range: whole words or pairs of them, as the
    /// specification has it; anything else is ignored.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || offset >= PENDING_OFFSET {
            return;
        }
        let mut table = self.table();
        for (index, chunk) in (0_u64..).zip(data.chunks(4)) {
            let place = offset + index * 4;
            let number = (place / ENTRY_SIZE) as usize;
            if let (Some(entry), Ok(word)) = (table.entries.get_mut(number), chunk.try_into()) {
                entry.words[(place / 4 % 4) as usize] = u32::from_le_bytes(word);
                self.settle(&mut table, number);
            }
        }
    }

    /// Raises a vector, or notes that it is due.
    fn raise(&self, vector: u16) {
        let index = usize::from(vector);
        let mut table = self.table();
        if table.control & CONTROL_ENABLE == 0 {
            return;
        }
        if let Some(entry) = table.entries.get_mut(index) {
            entry.pending = true;
            self.settle(&mut table, index);
        }
    }

    /// Delivers a vector that is due and not masked.
    fn settle(&self, table: &mut Table, index: usize) {
        let open = table.control & (CONTROL_ENABLE | CONTROL_MASK_ALL) == CONTROL_ENABLE;
        let Some(entry) = table.entries.get_mut(index) else { return };
        let [low, high, data, control] = entry.words;
        if !open || !entry.pending || control & ENTRY_MASKED != 0 {
            return;
        }
        entry.pending = false;
        let message = Message { address: u64::from(high) << 32 | u64::from(low), data };
        if let Err(error) = self.deliver(&mut entry.line, message) {
            // The guest can bring this about; it costs it its own interrupt.
            crate::report(&format!("lost an interrupt of the {} device", self.device), &error);
        }
    }

    fn deliver(&self, line: &mut Option<Line>, message: Message) -> Result<(), RouteError> {
        match line {
            Some(line) => line.raise(message),
            None => line.insert(Line::new(Arc::clone(&self.routes))?).raise(message),
        }
    }

    /// Gives the interrupt lines back.
    pub fn disconnect(&self) {
        let mut table = self.table();
        table.control = 0;
        for entry in &mut table.entries {
            entry.line = None;
        }
    }
}

impl Interrupt for Msix {
    fn queue(&self, index: u16) {
        self.raise(self.queue_vector(index));
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::Release);
        self.raise(self.config_vector());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msix() -> Msix {
        let vm = crate::machine::create_vm().unwrap().1;
        let msix = Msix::new("test", 2, false, Arc::new(Routes::new(Arc::new(vm))));
        msix.set_queue_vector(1, 2);
        msix
    }

    fn pending(msix: &Msix) -> u8 {
        let mut byte = [0];
        msix.read(PENDING_OFFSET, &mut byte);
        byte[0]
    }

    fn has_line(msix: &Msix, index: usize) -> bool {
        msix.table().entries[index].line.is_some()
    }

    #[test]
    fn a_masked_interrupt_waits_for_its_unmasking() {
        let msix = msix();
        msix.set_control(CONTROL_ENABLE);
        msix.write(32, &[0, 0, 0xe0, 0xfe, 0, 0, 0, 0]);
        msix.write(40, &0x41_u32.to_le_bytes());
        msix.queue(1);
        assert_eq!(pending(&msix), 0b100);
        assert!(!has_line(&msix, 2), "a masked interrupt must not be delivered");
        msix.write(44, &0_u32.to_le_bytes());
        assert_eq!(pending(&msix), 0);
        assert!(has_line(&msix, 2));
        let mut word = [0; 4];
        msix.read(40, &mut word);
        assert_eq!(u32::from_le_bytes(word), 0x41);
    }

    #[test]
    fn the_function_mask_holds_all_back() {
        let msix = msix();
        msix.write(44, &0_u32.to_le_bytes());
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        msix.queue(1);
        assert_eq!(pending(&msix), 0b100);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn events_without_a_vector_or_msix_are_dropped() {
        let msix = msix();
        msix.queue(1);
        msix.set_control(CONTROL_ENABLE);
        msix.queue(0);
        msix.queue(9);
        msix.config();
        assert_eq!(pending(&msix), 0);
        msix.set_queue_vector(0, 3);
        assert_eq!(msix.queue_vector(0), NO_VECTOR, "vector 3 does not exist");
        assert_eq!(msix.generation(), 1);
    }

    #[test]
    fn queues_can_share_a_vector() {
        let vm = crate::machine::create_vm().unwrap().1;
        let msix = Msix::new("test", 3, true, Arc::new(Routes::new(Arc::new(vm))));
        assert_eq!(msix.vectors(), 2);
        msix.set_control(CONTROL_ENABLE);
        for queue in 0..3 {
            msix.set_queue_vector(queue, 2);
            assert_eq!(msix.queue_vector(queue), NO_VECTOR, "vector 2 does not exist");
            msix.set_queue_vector(queue, 1);
        }
        msix.queue(2);
        assert_eq!(pending(&msix), 0b10);
    }

    #[test]
    fn accesses_outside_the_table_are_contained() {
        let msix = msix();
        for offset in [48, 0x7fc, 0x800, 0xffc, 0xfff] {
            let mut data = [1; 8];
            msix.write(offset, &data);
            msix.read(offset, &mut data);
            assert_eq!(data, [0; 8]);
        }
    }
}
