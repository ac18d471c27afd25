//! The descriptors of a chain that the driver made available (virtio 1.2, sections 2.7.5 and
//! 2.7.6).
//!
//! Each is read once, for the guest may change it at any time: what is checked is what is used.
//! A walk ends after as many descriptors as the table has, so a loop is no more than a chain
//! without an end.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::GuestAddress;

use super::regions::Regions;

/// Bytes of a descriptor.
pub const DESCRIPTOR: usize = 16;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// What the chains of a queue are walked by.
#[derive(Debug)]
pub struct QueueTable {
    regions: Regions,
    address: GuestAddress,
    size: u16,
    /// Whether both sides agreed on `VIRTIO_F_INDIRECT_DESC`.
    indirect: bool,
}

impl QueueTable {
    /// The table of `size` descriptors at `address`. None if it does not lie in memory in one
    /// piece, or is not aligned.
    #[must_use]
    pub fn new(regions: Regions, address: GuestAddress, size: u16, indirect: bool) -> Option<Self> {
        Table::find(&regions, address, size)?;
        Some(Self { regions, address, size, indirect })
    }
}

/// A chain that the driver made available, before its descriptors are looked at.
#[derive(Debug, Clone)]
pub struct AvailableChain {
    head: u16,
    queue: Arc<QueueTable>,
}

impl AvailableChain {
    /// The chain that begins at `head`.
    #[must_use]
    pub fn new(head: u16, queue: Arc<QueueTable>) -> Self {
        Self { head, queue }
    }

    /// Its first descriptor, by which it is given back.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The memory that its buffers lie in.
    #[must_use]
    pub fn regions(&self) -> &Regions {
        &self.queue.regions
    }

    /// Its descriptors, from the first on.
    #[must_use]
    pub fn descriptors(&self) -> Descriptors<'_> {
        let QueueTable { regions, address, size, indirect } = &*self.queue;
        Descriptors {
            regions,
            table: Table::find(regions, *address, *size),
            next: Some(self.head),
            left: *size,
            length: 0,
            indirect: *indirect,
        }
    }
}

/// The walk does not come to an end: there is a loop, a link out of the table or to a table
/// that is none, or more than 4 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endless;

/// A buffer, as the driver describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Where it is.
    pub address: GuestAddress,
    /// Its bytes.
    pub length: u32,
    /// Whether it is the device that writes it.
    pub writable: bool,
}

/// The walk through a chain. Nothing comes after an error.
#[derive(Debug)]
pub struct Descriptors<'a> {
    regions: &'a Regions,
    table: Option<Table<'a>>,
    next: Option<u16>,
    /// How many descriptors may follow.
    left: u16,
    /// Bytes so far. All of them are fewer than 4 GiB (section 2.7.5.2).
    length: u32,
    /// Whether a table of its own may follow.
    indirect: bool,
}

impl Descriptors<'_> {
    fn step(&mut self, mut index: u16) -> Result<Descriptor, Endless> {
        loop {
            self.left = self.left.checked_sub(1).ok_or(Endless)?;
            let raw = self.table.as_ref().and_then(|table| table.read(index)).ok_or(Endless)?;
            if raw.flags & INDIRECT != 0 {
                // Section 2.7.5.3: only where agreed on, not in such a table itself, and nothing
                // comes after it.
                if !std::mem::take(&mut self.indirect) {
                    return Err(Endless);
                }
                let length = raw.length as usize;
                self.left = u16::try_from(length / DESCRIPTOR).map_err(|_| Endless)?;
                if !length.is_multiple_of(DESCRIPTOR) {
                    return Err(Endless);
                }
                self.table = Table::find(self.regions, raw.address, self.left);
                index = 0;
                continue;
            }
            self.length = self.length.checked_add(raw.length).ok_or(Endless)?;
            self.next = (raw.flags & NEXT != 0).then_some(raw.next);
            return Ok(Descriptor { address: raw.address, length: raw.length, writable: raw.flags & WRITE != 0 });
        }
    }
}

impl Iterator for Descriptors<'_> {
    type Item = Result<Descriptor, Endless>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let index = self.next.take()?;
        Some(self.step(index))
    }
}

/// One entry of a table.
struct Raw {
    address: GuestAddress,
    length: u32,
    flags: u16,
    next: u16,
}

/// A table of descriptors in guest memory, a queue's or one of a chain's own.
#[derive(Debug)]
struct Table<'a> {
    /// Of `entries` descriptors, and aligned for words of eight bytes.
    address: *mut u8,
    entries: u16,
    memory: PhantomData<&'a Regions>,
}

impl<'a> Table<'a> {
    /// None if it does not lie in one region, or is not aligned for its words.
    fn find(regions: &'a Regions, address: GuestAddress, entries: u16) -> Option<Self> {
        let address = regions.find(address, DESCRIPTOR * usize::from(entries))?;
        address.addr().is_multiple_of(align_of::<AtomicU64>()).then_some(Self { address, entries, memory: PhantomData })
    }

    /// The entry at `index`. None if there are fewer.
    #[inline]
    fn read(&self, index: u16) -> Option<Raw> {
        if index >= self.entries {
            return None;
        }
        // SAFETY: the entry is within the table, which is mapped for as long as the regions are
        // borrowed.
        let entry = unsafe { self.address.add(DESCRIPTOR * usize::from(index)) };
        // SAFETY: both words are within the entry, and aligned.
        let (address, rest) = unsafe { (AtomicU64::from_ptr(entry.cast()), AtomicU64::from_ptr(entry.add(8).cast())) };
        let address = u64::from_le(address.load(Ordering::Relaxed));
        let rest = u64::from_le(rest.load(Ordering::Relaxed));
        Some(Raw {
            address: GuestAddress(address),
            length: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;
    use crate::devices::virtio::testing::Driver;

    const TABLE: u64 = 0x1000;
    const SIZE: u16 = 16;
    /// An indirect table, and where memory ends.
    const OTHER: u64 = 0x2000;
    const END: u64 = 0x4000;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x3000), (GuestAddress(0x3000), 0x1000)]).unwrap()
    }

    fn chain(memory: &GuestMemoryMmap, head: u16, indirect: bool) -> AvailableChain {
        let table = QueueTable::new(Regions::new(memory), GuestAddress(TABLE), SIZE, indirect).unwrap();
        AvailableChain::new(head, Arc::new(table))
    }

    /// Puts a descriptor into a table.
    fn put(memory: &GuestMemoryMmap, table: u64, index: u16, length: u32, flags: u16, next: u16) {
        let address = 0x100 * u64::from(index);
        Driver::descriptor_at(memory, table + 16 * u64::from(index), address, length, flags, next);
    }

    /// The lengths of the descriptors from `head` on, and whether the chain ends.
    fn lengths(memory: &GuestMemoryMmap, head: u16) -> (Vec<u32>, bool) {
        let walk: Vec<_> = chain(memory, head, true).descriptors().collect();
        let ends = walk.iter().all(Result::is_ok);
        (walk.into_iter().flatten().map(|descriptor| descriptor.length).collect(), ends)
    }

    #[test]
    fn descriptors_come_in_the_order_of_their_links() {
        let memory = memory();
        put(&memory, TABLE, 3, 10, NEXT, 15);
        put(&memory, TABLE, 15, 20, NEXT | WRITE, 0);
        put(&memory, TABLE, 0, 0, WRITE, 9);
        let walk: Vec<_> = chain(&memory, 3, false).descriptors().map(Result::unwrap).collect();
        let expected = [(0x300, 10, false), (0xf00, 20, true), (0, 0, true)];
        let expected =
            expected.map(|(address, length, writable)| Descriptor { address: GuestAddress(address), length, writable });
        assert_eq!(walk, expected);
    }

    #[test]
    fn a_chain_of_all_descriptors_ends_and_a_loop_does_not() {
        let memory = memory();
        for index in 0..SIZE {
            put(&memory, TABLE, index, 1, if index + 1 < SIZE { NEXT } else { 0 }, index + 1);
        }
        assert_eq!(lengths(&memory, 0), (vec![1; 16], true));
        put(&memory, TABLE, SIZE - 1, 1, NEXT, 0);
        assert_eq!(lengths(&memory, 0), (vec![1; 16], false));
        put(&memory, TABLE, 7, 1, NEXT, 7);
        assert_eq!(lengths(&memory, 7), (vec![1; 16], false));
    }

    #[test]
    fn a_link_out_of_the_table_is_not_followed() {
        let memory = memory();
        for next in [SIZE, SIZE + 1, u16::MAX] {
            put(&memory, TABLE, 1, 1, NEXT, next);
            assert_eq!(lengths(&memory, 1), (vec![1], false), "{next}");
            assert_eq!(lengths(&memory, next), (vec![], false), "{next}");
        }
    }

    #[test]
    fn a_chain_is_shorter_than_four_gib() {
        let memory = memory();
        put(&memory, TABLE, 0, u32::MAX, NEXT, 1);
        put(&memory, TABLE, 1, 0, 0, 0);
        assert_eq!(lengths(&memory, 0), (vec![u32::MAX, 0], true));
        put(&memory, TABLE, 1, 1, 0, 0);
        assert_eq!(lengths(&memory, 0), (vec![u32::MAX], false));
    }

    #[test]
    fn an_indirect_table_ends_a_chain() {
        let memory = memory();
        put(&memory, TABLE, 0, 7, NEXT, 1);
        Driver::descriptor_at(&memory, TABLE + 16, OTHER, 48, INDIRECT | NEXT | WRITE, 2);
        put(&memory, TABLE, 2, 99, 0, 0);
        put(&memory, OTHER, 0, 8, NEXT, 2);
        put(&memory, OTHER, 2, 9, 0, 0);
        assert_eq!(lengths(&memory, 0), (vec![7, 8, 9], true));
        // A loop in it, a link out of it, and a table in the table.
        for (flags, next) in [(NEXT, 0), (NEXT, 2), (NEXT, 3), (INDIRECT, 0)] {
            Driver::descriptor_at(&memory, OTHER + 32, OTHER, 16, flags, next);
            let (found, ends) = lengths(&memory, 0);
            assert!(!ends && found.len() <= 4, "{found:?}");
        }
    }

    #[test]
    fn an_indirect_table_that_is_none_is_not_read() {
        let memory = memory();
        put(&memory, OTHER, 0, 8, 0, 0);
        let refused =
            [(OTHER, 0), (OTHER, 15), (OTHER, 17), (OTHER, !15), (END - 16, 32), (END, 16), (u64::MAX - 7, 16)];
        // Not aligned, and not in one region.
        for (address, length) in refused.into_iter().chain([(OTHER + 4, 16), (0x2ff8, 16)]) {
            Driver::descriptor_at(&memory, TABLE, address, length, INDIRECT, 0);
            assert_eq!(lengths(&memory, 0), (vec![], false), "{address:#x} {length}");
        }
        Driver::descriptor_at(&memory, TABLE, OTHER, 16, INDIRECT, 0);
        assert_eq!(lengths(&memory, 0), (vec![8], true));
        assert_eq!(chain(&memory, 0, false).descriptors().collect::<Vec<_>>(), [Err(Endless)], "not agreed on");
    }

    #[test]
    fn a_table_that_changes_meanwhile_is_walked_no_longer() {
        let memory = memory();
        for index in 0..SIZE {
            put(&memory, TABLE, index, 1, NEXT, index + 1);
        }
        let chain = chain(&memory, 0, true);
        let mut walk = chain.descriptors();
        for _ in 0..SIZE {
            assert!(walk.next().unwrap().is_ok());
            // Back to the start, as often as it is asked.
            for index in 0..SIZE {
                put(&memory, TABLE, index, 1, NEXT, 0);
            }
        }
        assert_eq!(walk.next(), Some(Err(Endless)));
        assert_eq!(walk.next(), None);
    }

    #[test]
    fn a_queues_table_is_in_memory() {
        let memory = memory();
        let table = |address| QueueTable::new(Regions::new(&memory), GuestAddress(address), SIZE, false);
        assert!(table(END - 256).is_some());
        for address in [END - 240, 0x2fe0, END, u64::MAX - 15, TABLE + 4] {
            assert!(table(address).is_none(), "{address:#x}");
        }
    }

    proptest! {
        /// What virtio-queue makes of the same tables is what comes of them here.
        #[test]
        fn any_table_is_walked_as_by_others(
            entries in prop::collection::vec((prop_oneof![Just(OTHER), 0..END], 0_u32..512, 0_u16..8, 0_u16..18), 32),
            long in any::<u32>(),
            head in 0_u16..20,
        ) {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), END as usize)]).unwrap();
            for (index, (address, length, flags, next)) in (0..).zip(entries) {
                let table = if index < 16 { TABLE + 16 * index } else { OTHER + 16 * (index - 16) };
                // Nothing but what both take for a table or both do not.
                let (address, length) = match (flags & INDIRECT != 0, length) {
                    (true, _) => ((address % (END - 512)) & !7, length & !15),
                    (false, 0) => (address, long),
                    (false, _) => (address, length),
                };
                Driver::descriptor_at(&memory, table, address, length, flags, next);
            }
            memory.write_obj([0_u16, 1, head], GuestAddress(0x3800)).unwrap();
            let mut queue = Queue::new(SIZE).unwrap();
            queue.set_desc_table_address(Some(TABLE as u32), None);
            queue.set_avail_ring_address(Some(0x3800), None);
            queue.set_ready(true);
            let theirs = queue.iter(&memory).unwrap().next().unwrap();
            let mut ends = false;
            let theirs: Vec<_> = theirs.inspect(|descriptor| ends = !descriptor.has_next()).map(|descriptor| Descriptor {
                address: descriptor.addr(),
                length: descriptor.len(),
                writable: descriptor.is_write_only(),
            }).collect();
            let ours: Vec<_> = chain(&memory, head, true).descriptors().collect();
            prop_assert_eq!(ours.iter().all(Result::is_ok), ends);
            prop_assert_eq!(ours.into_iter().flatten().collect::<Vec<_>>(), theirs);
        }
    }
}
