//! Where guest memory is in this process, by its address in the guest: looked up once, for
//! what is asked with every buffer of a request.

use std::fmt;

use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

/// The regions of a guest's memory. There are two at most where it is the hypervisor that made
/// them, and they stay the same for as long as the guest lives.
pub struct Regions {
    regions: Vec<Region>,
    /// Keeps them mapped.
    memory: GuestMemoryMmap,
}

struct Region {
    start: u64,
    length: u64,
    address: *mut u8,
}

// SAFETY: what the pointers lead to stays mapped as long as this lives, and may be used from
// any thread: the guest uses it at the same time anyway.
unsafe impl Send for Regions {}
// SAFETY: as above; nothing here changes.
unsafe impl Sync for Regions {}

impl fmt::Debug for Regions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Regions").field("regions", &self.regions.len()).finish_non_exhaustive()
    }
}

impl Regions {
    /// Looks all of `memory` up.
    #[must_use]
    pub fn new(memory: &GuestMemoryMmap) -> Self {
        let regions = memory.iter().filter_map(|region| {
            let start = region.start_addr();
            let slice = memory.get_slice(start, usize::try_from(region.len()).ok()?).ok()?;
            Some(Region { start: start.raw_value(), length: region.len(), address: slice.ptr_guard_mut().as_ptr() })
        });
        Self { regions: regions.collect(), memory: memory.clone() }
    }

    /// Where the `length` bytes at `address` are, which may be used for as long as this lives.
    /// None if they do not lie in one region.
    #[must_use]
    #[inline]
    pub fn find(&self, address: GuestAddress, length: usize) -> Option<*mut u8> {
        self.regions.iter().find_map(|region| {
            let offset = address.raw_value().checked_sub(region.start)?;
            let rest = region.length.checked_sub(offset)?;
            // SAFETY: `offset` is at most the region's length, which is mapped in one piece.
            (length as u64 <= rest).then(|| unsafe { region.address.add(offset as usize) })
        })
    }

    /// The memory that was looked up.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_lies_in_one_region_is_found_and_nothing_else() {
        let ranges = [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x1000), (GuestAddress(1 << 32), 0x2000)];
        let regions = Regions::new(&GuestMemoryMmap::from_ranges(&ranges).unwrap());
        for (address, length) in [(0x1000, 0x1000), (0x1fff, 1), (0x2000, 1), (0x1_0000_1000, 0x1000)] {
            let found = regions.find(GuestAddress(address), length).unwrap();
            let expected = regions.memory().get_slice(GuestAddress(address), length).unwrap();
            assert_eq!(found, expected.ptr_guard_mut().as_ptr(), "{address:#x}");
        }
        for (address, length) in [
            (0xfff, 1),
            (0xfff, 2),
            (0x1fff, 2),
            (0x3000, 1),
            (0x1_0000_1fff, 2),
            (0x1_0000_2000, 1),
            (u64::MAX, 2),
            (0x1000, usize::MAX),
        ] {
            assert!(regions.find(GuestAddress(address), length).is_none(), "{address:#x} {length:#x}");
        }
    }

    proptest! {
        #[test]
        fn it_is_where_the_memory_says(address in prop_oneof![0_u64..0x5000, any::<u64>()], length in 1_usize..0x3000) {
            let ranges = [(GuestAddress(0x1000), 0x2000), (GuestAddress(0x3000), 0x1000)];
            let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
            let expected = memory.get_slice(GuestAddress(address), length).ok();
            let expected = expected.map(|slice| slice.ptr_guard_mut().as_ptr());
            prop_assert_eq!(Regions::new(&memory).find(GuestAddress(address), length), expected);
        }
    }
}
