//! A stretch of guest memory that is looked up once, and then used by its address in this
//! process: for what is looked at with every request.

use std::fmt;
use std::sync::atomic::{AtomicU16, AtomicU32};

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

/// Some bytes of guest memory, of which words are loaded and stored.
pub struct Stretch {
    address: *mut u8,
    length: usize,
    /// Keeps it mapped.
    _memory: GuestMemoryMmap,
}

// SAFETY: what the pointer leads to stays mapped as long as this lives, and is used by atomic
// operations only. The guest uses it at the same time anyway.
unsafe impl Send for Stretch {}

impl fmt::Debug for Stretch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stretch").field("length", &self.length).finish_non_exhaustive()
    }
}

impl Stretch {
    /// The `length` bytes at `address`. None if they are not in memory in one piece, or not
    /// aligned to `alignment` bytes.
    #[must_use]
    pub fn new(memory: &GuestMemoryMmap, address: GuestAddress, length: usize, alignment: usize) -> Option<Self> {
        let slice = memory.get_slice(address, length).ok()?;
        let address = slice.ptr_guard_mut().as_ptr();
        address.addr().is_multiple_of(alignment).then(|| Self { address, length, _memory: memory.clone() })
    }

    /// The two bytes at `offset`, in the guest's order (little-endian).
    ///
    /// # Panics
    /// If they are not aligned, or not within the stretch.
    #[must_use]
    #[inline]
    pub fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: it is mapped, within and aligned. Everybody in this process uses it by atomic operations.
        unsafe { AtomicU16::from_ptr(self.word(offset, 2).cast()) }
    }

    /// The four bytes at `offset`, in the guest's order (little-endian).
    ///
    /// # Panics
    /// If they are not aligned, or not within the stretch.
    #[must_use]
    #[inline]
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.word(offset, 4).cast()) }
    }

    #[inline]
    fn word(&self, offset: usize, size: usize) -> *mut u8 {
        assert!(offset < self.length && self.length - offset >= size);
        // SAFETY: it is within.
        let address = unsafe { self.address.add(offset) };
        assert!(address.addr().is_multiple_of(size));
        address
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn words_are_the_guests_and_only_those_of_the_stretch() {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let stretch = Stretch::new(&memory, GuestAddress(0xff0), 16, 4).unwrap();
        memory.write_obj([1_u16, 2, 3], GuestAddress(0xffa)).unwrap();
        assert_eq!(stretch.u16(12).load(Ordering::Relaxed), 2);
        stretch.u32(8).store(0x0005_0004, Ordering::Relaxed);
        assert_eq!(memory.read_obj::<[u16; 4]>(GuestAddress(0xff8)).unwrap(), [4, 5, 2, 3]);
        for (address, length) in [(0xff4, 16), (0x1ff4, 16), (0x2000, 4), (0xff2, 4)] {
            assert!(Stretch::new(&memory, GuestAddress(address), length, 4).is_none(), "{address:#x}");
        }
        Stretch::new(&memory, GuestAddress(0xff2), 4, 2).unwrap();
        for offset in [1, 16, 15, usize::MAX - 1] {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| stretch.u16(offset).load(Ordering::Relaxed)))
                .unwrap_err();
        }
    }
}
