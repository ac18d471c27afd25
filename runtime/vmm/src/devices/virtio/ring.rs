//! One virtqueue of an active device: taking chains, giving them back, and as few
//! notifications as the driver agreed to.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::device::{DeviceError, Interrupt, QueuePosition};

/// A chain the driver made available, before its buffers are looked at.
pub type AvailableChain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// A queue the driver enabled, known to lie within the guest's memory.
#[derive(Debug)]
pub struct Ring {
    device: &'static str,
    index: u16,
    queue: Queue,
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
        let ring = Self { device, index, signalled: queue.next_used(), queue };
        if !ring.queue.ready() {
            return Err(ring.error("the driver did not enable it"));
        }
        // The sizes of the split virtqueue's three parts, virtio 1.2 section 2.7. They are
        // checked here once, so that no later access can fail half way.
        let size = usize::from(ring.queue.size());
        let parts = [
            ("descriptor table", ring.queue.desc_table(), 16 * size),
            ("available ring", ring.queue.avail_ring(), 6 + 2 * size),
            ("used ring", ring.queue.used_ring(), 6 + 8 * size),
        ];
        for (part, address, length) in parts {
            if !memory.check_range(GuestAddress(address), length) {
                return Err(ring.error(&format!("its {part} at {address:#x} is not in memory")));
            }
        }
        Ok(ring)
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

    /// The next available chain.
    ///
    /// # Errors
    /// If the available ring claims more entries than it has.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Result<Option<AvailableChain<'m>>, DeviceError> {
        match self.queue.iter(memory) {
            Ok(mut chains) => Ok(chains.next()),
            Err(error) => Err(self.error(&error.to_string())),
        }
    }

    /// Puts the chain popped last back, as if it had not been looked at.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives the chain that starts at descriptor `head` back, with `written` bytes in it.
    ///
    /// # Errors
    /// If `head` is not a descriptor of this queue.
    pub fn complete(&mut self, memory: &GuestMemoryMmap, head: u16, written: u32) -> Result<(), DeviceError> {
        self.queue.add_used(memory, head, written).map_err(|error| self.error(&error.to_string()))
    }

    /// Gives several chains back at once: the driver sees all of them or none, as it has to
    /// where one thing lies in several chains.
    ///
    /// # Errors
    /// If there are more than the queue has entries, or the used ring cannot be written.
    pub fn complete_all(&mut self, memory: &GuestMemoryMmap, chains: &[(u16, u32)]) -> Result<(), DeviceError> {
        let (size, first) = (self.queue.size(), self.queue.next_used());
        let count = u16::try_from(chains.len()).ok().filter(|count| *count <= size);
        let count = count.ok_or_else(|| self.error("more chains given back than it has"))?;
        let written = (first..).zip(chains).try_for_each(|(index, (head, written))| {
            // Flags and index, then elements of an index and a length.
            let element = self.queue.used_ring() + 4 + 8 * u64::from(index % size);
            memory.write_obj([u32::from(*head).to_le(), written.to_le()], GuestAddress(element))
        });
        let next = first.wrapping_add(count);
        let index = GuestAddress(self.queue.used_ring() + 2);
        written
            .and_then(|()| memory.store(next.to_le(), index, Ordering::Release))
            .map_err(|error| self.error(&error.to_string()))?;
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Interrupts the driver if chains were given back and it wants to know.
    ///
    /// # Errors
    /// If the driver's wish cannot be read.
    pub fn signal(&mut self, memory: &GuestMemoryMmap, interrupt: &dyn Interrupt) -> Result<(), DeviceError> {
        if self.is_signal_due(memory)? {
            interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Whether the driver is to be interrupted, for chains were given back and it wants to know. It is taken to be told
    /// then.
    ///
    /// # Errors
    /// If the driver's wish cannot be read.
    pub fn is_signal_due(&mut self, memory: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        let next = self.queue.next_used();
        let before = std::mem::replace(&mut self.signalled, next);
        if next == before {
            return Ok(false);
        }
        // The driver writes its wish, then looks whether chains were given back; the other
        // way round here.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let wanted = if self.queue.event_idx_enabled() {
            // Virtio 1.2, section 2.7.7.2: an event among those given back since.
            let event = available + 4 + 2 * u64::from(self.queue.size());
            memory
                .load(GuestAddress(event), Ordering::Relaxed)
                .map(|event| next.wrapping_sub(u16::from_le(event)).wrapping_sub(1) < next.wrapping_sub(before))
        } else {
            memory
                .load(GuestAddress(available), Ordering::Relaxed)
                .map(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        };
        wanted.map_err(|error| self.error(&error.to_string()))
    }

    /// Asks the driver for a notification at the next available chain. True if one came
    /// before it could know, so that the device has to look again itself.
    ///
    /// # Errors
    /// If the wish cannot be written.
    pub fn rearm(&mut self, memory: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        self.queue.enable_notification(memory).map_err(|error| self.error(&error.to_string()))
    }

    /// Takes back what [`Ring::rearm`] asked for. The driver may not have seen it when it makes the next chain available,
    /// and the device looks again by itself.
    ///
    /// # Errors
    /// If the wish cannot be written.
    pub fn disarm(&mut self, memory: &GuestMemoryMmap) -> Result<(), DeviceError> {
        let written = if self.queue.event_idx_enabled() {
            // Virtio 1.2, section 2.7.10: an event that has been.
            let event = self.queue.used_ring() + 4 + 8 * u64::from(self.queue.size());
            let past = self.queue.next_avail().wrapping_sub(1);
            memory.store(past.to_le(), GuestAddress(event), Ordering::Relaxed).map_err(|error| error.to_string())
        } else {
            self.queue.disable_notification(memory).map_err(|error| error.to_string())
        };
        written.map_err(|reason| self.error(&reason))
    }

    /// An error about this queue.
    #[must_use]
    pub fn error(&self, reason: &str) -> DeviceError {
        DeviceError { device: self.device, reason: format!("queue {}: {reason}", self.index) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(!ring.rearm(&memory).unwrap());
        assert!(notifies(&memory, 0, 1));
        assert!(ring.rearm(&memory).unwrap(), "there is one to take");
        assert!(ring.pop(&memory).unwrap().is_some());
        ring.disarm(&memory).unwrap();
        assert!(!notifies(&memory, 1, 2) && !notifies(&memory, 1, 5));
        for _ in 1..5 {
            assert!(ring.pop(&memory).unwrap().is_some());
        }
        assert!(!ring.rearm(&memory).unwrap());
        assert!(notifies(&memory, 5, 6));
    }

    #[test]
    fn without_events_it_is_a_flag_that_is_asked_by() {
        let (memory, mut ring) = ring(0);
        let flags = || memory.read_obj::<u16>(GuestAddress(USED)).unwrap();
        ring.disarm(&memory).unwrap();
        assert_eq!(flags(), 1);
        assert!(!ring.rearm(&memory).unwrap());
        assert_eq!(flags(), 0);
    }
}
