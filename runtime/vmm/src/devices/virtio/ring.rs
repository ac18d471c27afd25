//! One virtqueue of an active device: taking chains, giving them back, and as few
//! notifications as the driver agreed to.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::budget::{Budget, Served};
use super::descriptors::{AvailableChain, QueueTable};
use super::device::{DeviceError, Interrupt, QueuePosition};
use super::regions::Regions;
use super::stretch::Stretch;

/// Layout of both rings: flags, the index of the next element, the elements, and an event.
const FLAGS: usize = 0;
const INDEX: usize = 2;
const HEADER: usize = 4;
const AVAILABLE_ELEMENT: usize = 2;
const USED_ELEMENT: usize = 8;
const EVENT: usize = 2;

/// A queue the driver enabled, known to lie within the guest's memory.
#[derive(Debug)]
pub struct Ring {
    device: &'static str,
    index: u16,
    queue: Queue,
    table: Arc<QueueTable>,
    available: Stretch,
    used: Stretch,
    /// Chains given back in all when the driver was last told, modulo 2^16.
    signalled: u16,
}

impl Ring {
    /// Takes over queue `index` of `device`, with the features both sides agreed on.
    ///
    /// # Errors
    /// If the driver did not enable the queue, or put one of its rings outside of memory.
    pub fn new(
        device: &'static str,
        index: u16,
        mut queue: Queue,
        memory: &GuestMemoryMmap,
        features: u64,
    ) -> Result<Self, DeviceError> {
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        if !queue.ready() {
            return Err(error(device, index, "the driver did not enable it"));
        }
        // The split virtqueue's three parts, virtio 1.2 section 2.7. They are looked up here
        // once, so that no later access can fail half way.
        let size = usize::from(queue.size());
        let missing =
            |part, address: u64| error(device, index, &format!("its {part} at {address:#x} is not in memory"));
        let find = |part, address, length, alignment| {
            Stretch::new(memory, GuestAddress(address), length, alignment).ok_or_else(|| missing(part, address))
        };
        let indirect = features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0;
        let table = GuestAddress(queue.desc_table());
        let table = QueueTable::new(Regions::new(memory), table, queue.size(), indirect)
            .ok_or_else(|| missing("descriptor table", table.0))?;
        let available = find("available ring", queue.avail_ring(), HEADER + AVAILABLE_ELEMENT * size + EVENT, 2)?;
        let used = find("used ring", queue.used_ring(), HEADER + USED_ELEMENT * size + EVENT, 4)?;
        Ok(Self { device, index, signalled: queue.next_used(), queue, table: Arc::new(table), available, used })
    }

    /// Number of entries the driver chose.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// How far it has come.
    #[must_use]
    pub fn position(&self) -> QueuePosition {
        QueuePosition { available: self.queue.next_avail(), used: self.queue.next_used() }
    }

    /// Serves what is available: `each` is given every chain, and gives it back or keeps it. The driver is told of those
    /// that came back. Says whether that was all.
    ///
    /// # Errors
    /// Those of [`Ring::pop`] and of `each`.
    pub fn serve(
        &mut self,
        budget: &mut Budget,
        interrupt: &dyn Interrupt,
        mut each: impl FnMut(&mut Self, AvailableChain) -> Result<(), DeviceError>,
    ) -> Result<Served, DeviceError> {
        loop {
            while let Some(chain) = self.pop(budget)? {
                each(self, chain)?;
            }
            self.signal(interrupt);
            if budget.is_spent() {
                return Ok(Served::Part);
            }
            if !self.rearm() {
                return Ok(Served::All);
            }
        }
    }

    /// The next available chain; none if there is none, or `budget` is spent, which each look takes from.
    ///
    /// # Errors
    /// If the available ring claims more entries than it has, or a chain begins outside of the descriptor table.
    pub fn pop(&mut self, budget: &mut Budget) -> Result<Option<AvailableChain>, DeviceError> {
        if !budget.charge() {
            return Ok(None);
        }
        let (size, next) = (self.queue.size(), self.queue.next_avail());
        // Before the entries that it tells of.
        let index = u16::from_le(self.available.u16(INDEX).load(Ordering::Acquire));
        let count = index.wrapping_sub(next);
        if count > size {
            return Err(self.error("the available ring claims more entries than it has"));
        }
        if count == 0 {
            return Ok(None);
        }
        let entry = HEADER + AVAILABLE_ELEMENT * usize::from(next % size);
        let head = u16::from_le(self.available.u16(entry).load(Ordering::Relaxed));
        if head >= size {
            return Err(self.error("a chain begins outside of its descriptor table"));
        }
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(Some(AvailableChain::new(head, self.table.clone())))
    }

    /// Puts the chain popped last back, as if it had not been looked at.
    pub fn undo_pop(&mut self) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Gives the chain that starts at descriptor `head` back, with `written` bytes in it.
    ///
    /// # Errors
    /// If `head` is not a descriptor of this queue.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), DeviceError> {
        let next = self.queue.next_used();
        self.put_used(next, head, written)?;
        self.set_next_used(next.wrapping_add(1));
        Ok(())
    }

    /// Gives several chains back at once: the driver sees all of them or none, as it has to
    /// where one thing lies in several chains.
    ///
    /// # Errors
    /// If there are more than the queue has entries, or one is not a descriptor of it.
    pub fn complete_all(&mut self, chains: &[(u16, u32)]) -> Result<(), DeviceError> {
        let first = self.queue.next_used();
        let count = u16::try_from(chains.len()).ok().filter(|count| *count <= self.queue.size());
        let count = count.ok_or_else(|| self.error("more chains given back than it has"))?;
        for (index, (head, written)) in (0..count).zip(chains) {
            self.put_used(first.wrapping_add(index), *head, *written)?;
        }
        self.set_next_used(first.wrapping_add(count));
        Ok(())
    }

    /// Writes an element of the used ring, which the driver does not look at yet.
    fn put_used(&self, index: u16, head: u16, written: u32) -> Result<(), DeviceError> {
        let size = self.queue.size();
        if head >= size {
            return Err(self.error("a chain given back that it has not"));
        }
        // Flags and index, then elements of an index and a length.
        let element = HEADER + USED_ELEMENT * usize::from(index % size);
        self.used.u32(element).store(u32::from(head).to_le(), Ordering::Relaxed);
        self.used.u32(element + 4).store(written.to_le(), Ordering::Relaxed);
        Ok(())
    }

    /// Lets the driver look at all elements before `next`.
    fn set_next_used(&mut self, next: u16) {
        self.used.u16(INDEX).store(next.to_le(), Ordering::Release);
        self.queue.set_next_used(next);
    }

    /// Interrupts the driver if chains were given back and it wants to know.
    pub fn signal(&mut self, interrupt: &dyn Interrupt) {
        if self.is_signal_due() {
            interrupt.queue(self.index);
        }
    }

    /// Whether the driver is to be interrupted, for chains were given back and it wants to know. It is taken to be told
    /// then.
    pub fn is_signal_due(&mut self) -> bool {
        let next = self.queue.next_used();
        let before = std::mem::replace(&mut self.signalled, next);
        if next == before {
            return false;
        }
        // The driver writes its wish, then looks whether chains were given back; the other
        // way round here.
        fence(Ordering::SeqCst);
        if self.queue.event_idx_enabled() {
            // Virtio 1.2, section 2.7.7.2: an event among those given back since.
            let event = u16::from_le(self.available.u16(self.used_event()).load(Ordering::Relaxed));
            next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(before)
        } else {
            let flags = u16::from_le(self.available.u16(FLAGS).load(Ordering::Relaxed));
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver for a notification at the next available chain. True if one came
    /// before it could know, so that the device has to look again itself.
    #[must_use]
    pub fn rearm(&mut self) -> bool {
        let next = self.queue.next_avail();
        if self.queue.event_idx_enabled() {
            self.used.u16(self.available_event()).store(next.to_le(), Ordering::Relaxed);
        } else {
            self.used.u16(FLAGS).store(0, Ordering::Relaxed);
        }
        // The wish before the look; the driver does it the other way round.
        fence(Ordering::SeqCst);
        u16::from_le(self.available.u16(INDEX).load(Ordering::Relaxed)) != next
    }

    /// Takes back what [`Ring::rearm`] asked for. The driver may not have seen it when it makes the next chain available,
    /// and the device looks again by itself.
    pub fn disarm(&mut self) {
        if self.queue.event_idx_enabled() {
            // Virtio 1.2, section 2.7.10: an event that has been.
            let past = self.queue.next_avail().wrapping_sub(1);
            self.used.u16(self.available_event()).store(past.to_le(), Ordering::Relaxed);
        } else {
            let flags = VRING_USED_F_NO_NOTIFY as u16;
            self.used.u16(FLAGS).store(flags.to_le(), Ordering::Relaxed);
        }
    }

    /// Where the driver says which chain's return it wants to hear of, after the available ring.
    fn used_event(&self) -> usize {
        HEADER + AVAILABLE_ELEMENT * usize::from(self.queue.size())
    }

    /// Where the device says which available chain it wants to hear of, after the used ring.
    fn available_event(&self) -> usize {
        HEADER + USED_ELEMENT * usize::from(self.queue.size())
    }

    /// An error about this queue.
    #[must_use]
    pub fn error(&self, reason: &str) -> DeviceError {
        error(self.device, self.index, reason)
    }
}

fn error(device: &'static str, index: u16, reason: &str) -> DeviceError {
    DeviceError { device, reason: format!("queue {index}: {reason}") }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::devices::virtio::testing::Interrupts;

    const TABLE: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const SIZE: u16 = 16;

    fn ring(features: u64) -> (GuestMemoryMmap, Ring) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(TABLE as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_ready(true);
        let ring = Ring::new("test", 0, queue, &memory, features).unwrap();
        (memory, ring)
    }

    /// The driver makes `count` chains available in all; whether it would notify the device of those since `before`
    /// (virtio 1.2, section 2.7.10.1).
    fn notifies(memory: &GuestMemoryMmap, before: u16, count: u16) -> bool {
        memory.write_obj(count, GuestAddress(AVAILABLE + 2)).unwrap();
        let event: u16 = memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(SIZE))).unwrap();
        count.wrapping_sub(event).wrapping_sub(1) < count.wrapping_sub(before)
    }

    #[test]
    fn a_notification_comes_when_it_was_asked_for_and_not_when_that_was_taken_back() {
        let (memory, mut ring) = ring(1 << VIRTIO_RING_F_EVENT_IDX);
        assert!(!ring.rearm());
        assert!(notifies(&memory, 0, 1));
        assert!(ring.rearm(), "there is one to take");
        assert!(ring.pop(&mut Budget::new(1)).unwrap().is_some());
        ring.disarm();
        assert!(!notifies(&memory, 1, 2) && !notifies(&memory, 1, 5));
        for _ in 1..5 {
            assert!(ring.pop(&mut Budget::new(1)).unwrap().is_some());
        }
        assert!(!ring.rearm());
        assert!(notifies(&memory, 5, 6));
    }

    #[test]
    fn chains_are_taken_in_order_and_none_twice() {
        let (memory, mut ring) = ring(0);
        assert!(ring.pop(&mut Budget::new(1)).unwrap().is_none());
        // As often as the index wraps around, and a bit more.
        for index in 0..70_000_u32 {
            let head = (index * 7 % u32::from(SIZE)) as u16;
            let entry = AVAILABLE + 4 + 2 * u64::from(index % u32::from(SIZE));
            memory.write_obj(head, GuestAddress(entry)).unwrap();
            memory.write_obj((index + 1) as u16, GuestAddress(AVAILABLE + 2)).unwrap();
            assert_eq!(ring.pop(&mut Budget::new(1)).unwrap().unwrap().head(), head);
            ring.undo_pop();
            assert_eq!(ring.pop(&mut Budget::new(1)).unwrap().unwrap().head(), head);
            assert!(ring.pop(&mut Budget::new(1)).unwrap().is_none());
        }
    }

    #[test]
    fn a_ring_that_claims_too_much_or_what_is_no_chain_is_broken() {
        let (memory, mut ring) = ring(0);
        for index in [SIZE + 1, u16::MAX] {
            memory.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
            let error = ring.pop(&mut Budget::new(1)).unwrap_err().to_string();
            assert_eq!(error, "test: queue 0: the available ring claims more entries than it has");
        }
        memory.write_obj(SIZE, GuestAddress(AVAILABLE + 2)).unwrap();
        assert!(ring.pop(&mut Budget::new(1)).unwrap().is_some());
        for head in [SIZE, u16::MAX] {
            memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2)).unwrap();
            assert!(ring.pop(&mut Budget::new(1)).is_err(), "{head}");
        }
        assert_eq!(ring.position().available, 1);
    }

    #[test]
    fn a_driver_that_makes_chains_available_while_they_are_served_gets_what_its_budget_allows() {
        let (memory, mut ring) = ring(1 << VIRTIO_RING_F_EVENT_IDX);
        memory.write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
        let (mut budget, interrupts, mut seen) = (Budget::new(100), Interrupts::default(), 0_u16);
        let served = ring.serve(&mut budget, &interrupts, |ring, chain| {
            seen += 1;
            memory.write_obj(seen + 1, GuestAddress(AVAILABLE + 2)).unwrap();
            ring.complete(chain.head(), 0)
        });
        assert_eq!((served.unwrap(), seen, interrupts.take(0)), (Served::Part, 100, 1));
        // It goes on where it was, to the end.
        let served = ring.serve(&mut Budget::new(100), &interrupts, |ring, chain| ring.complete(chain.head(), 0));
        assert_eq!((served.unwrap(), ring.position().available), (Served::All, 101));
    }

    #[test]
    fn a_look_that_finds_nothing_is_charged_too() {
        let (_memory, mut ring) = ring(0);
        let mut budget = Budget::new(3);
        for _ in 0..3 {
            assert!(!budget.is_spent());
            assert!(ring.pop(&mut budget).unwrap().is_none());
        }
        assert!(budget.is_spent());
    }

    #[test]
    fn without_events_it_is_a_flag_that_is_asked_by() {
        let (memory, mut ring) = ring(0);
        let flags = || memory.read_obj::<u16>(GuestAddress(USED)).unwrap();
        ring.disarm();
        assert_eq!(flags(), 1);
        assert!(!ring.rearm());
        assert_eq!(flags(), 0);
    }
}
