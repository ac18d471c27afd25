//! The guest's memory: one mapping, never prefaulted, presented to the guest below the PCI
//! window and, for what does not fit there, above 4 GiB. It is private and anonymous, unless
//! the machine is a template or the clone of one: [`Backing`].

use std::fs::File;
use std::io::{self, Seek};
use std::ops::Range;
use std::ptr::NonNull;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, ReadVolatile,
};

use crate::layout;
use crate::sys::{self, Backing, HUGE_PAGE};

/// Guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The mapping failed.
    #[error("cannot map {mib} MiB of guest memory: lower the pod's memory or raise the host's limits")]
    Map {
        /// Size asked for.
        mib: u64,
        /// Why.
        source: io::Error,
    },
    /// The ranges do not make a memory.
    #[error("cannot lay out {mib} MiB of guest memory: {reason}")]
    Layout {
        /// Size asked for.
        mib: u64,
        /// What is wrong.
        reason: String,
    },
    /// KVM refused it.
    #[error("KVM refuses guest memory at {address:#x}")]
    Register {
        /// Guest-physical address.
        address: u64,
        /// Why.
        source: kvm_ioctls::Error,
    },
}

/// The guest-physical ranges, as (start, size), of a guest with `mib` MiB.
fn ranges(mib: u64) -> Vec<(u64, u64)> {
    let size = mib << 20;
    if size <= layout::PCI_WINDOW {
        vec![(0, size)]
    } else {
        vec![(0, layout::PCI_WINDOW), (layout::ABOVE_4G, size - layout::PCI_WINDOW)]
    }
}

/// Makes the memory of a guest with `mib` MiB, at most 1 048 576.
pub fn map(mib: u64) -> Result<GuestMemoryMmap, MemoryError> {
    map_backed(mib, Backing::Anonymous)
}

/// The same, of something. A file must have the memory's size, and keep it.
pub fn map_backed(mib: u64, backing: Backing<'_>) -> Result<GuestMemoryMmap, MemoryError> {
    let failed = |reason: String| MemoryError::Layout { mib, reason };
    let size = usize::try_from(mib << 20).map_err(|e| failed(e.to_string()))?;
    let parts = match backing {
        Backing::Anonymous => Vec::new(),
        Backing::File(_) => vec![Range { start: 0, end: size }],
        Backing::CopyOf(file) => parts(file, size).map_err(|source| MemoryError::Map { mib, source })?,
    };
    let start = sys::map_guest_memory(size, backing, &parts).map_err(|source| MemoryError::Map { mib, source })?;
    let mut offset = 0;
    let mut regions = Vec::new();
    for (address, size) in ranges(mib) {
        let size = usize::try_from(size).map_err(|e| failed(e.to_string()))?;
        // SAFETY: the ranges' sizes sum to the mapping's, which lives as long as the
        // process.
        let region = unsafe {
            MmapRegionBuilder::new(size)
                .with_raw_mmap_pointer(start.as_ptr().add(offset))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(backing.flags())
                .build()
        }
        .map_err(|e| failed(e.to_string()))?;
        offset += size;
        let region =
            GuestRegionMmap::new(region, GuestAddress(address)).ok_or_else(|| failed("address overflow".into()))?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|e| failed(e.to_string()))
}

/// The parts of the first `size` bytes of a file that hold anything, in whole huge pages. What
/// lies between is zero, and so need not come from the file: then the kernel gives the guest huge
/// pages there, which it does not for parts of a file.
fn parts(file: &File, size: usize) -> io::Result<Vec<Range<usize>>> {
    let mut parts = Vec::<Range<usize>>::new();
    // None beyond the last. Any other failure must not pass for it: a guest would lose its memory.
    let find = |from| match seek(file, from) {
        Ok(offset) => Ok(usize::try_from(offset).ok()),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(io::Error::from(error)),
    };
    let mut end = 0;
    while end < size
        && let Some(data) = find(SeekFrom::Data(end as u64))?.filter(|data| *data < size)
    {
        let start = data - data % HUGE_PAGE;
        let hole = find(SeekFrom::Hole(data as u64))?.unwrap_or(size);
        // Never backwards, whatever the file system says.
        end = hole.max(data + 1).next_multiple_of(HUGE_PAGE).min(size);
        match parts.last_mut() {
            Some(last) if last.end >= start => last.end = end,
            _ if start < end => parts.push(start..end),
            _ => {}
        }
    }
    Ok(parts)
}

/// Gives the memory to a virtual machine.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), MemoryError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let address = region.start_addr().raw_value();
        let registration = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping behind the region is never unmapped.
        unsafe { vm.set_user_memory_region(registration) }
            .map_err(|source| MemoryError::Register { address, source })?;
    }
    Ok(())
}

/// Reads `size` bytes of `file` from `offset` on into guest memory at `address`, before the
/// guest runs. The file must have them. By `read(2)`, not from a mapping: each page of a
/// mapped file costs more to map and to unmap than to copy.
pub fn load(memory: &GuestMemoryMmap, address: u64, mut file: &File, offset: u64, size: u64) -> io::Result<()> {
    let size = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut target = memory.get_slice(GuestAddress(address), size).map_err(io::Error::other)?;
    file.seek(io::SeekFrom::Start(offset))?;
    file.read_exact_volatile(&mut target).map_err(io::Error::other)
}

/// Has the huge page that begins at `address` filled by small pages, for a guest that touches only a few of them. Nothing
/// happens where the guest has no whole huge page.
pub fn advise_small_pages(memory: &GuestMemoryMmap, address: u64) {
    if let Ok(slice) = memory.get_slice(GuestAddress(address), HUGE_PAGE)
        && let Some(place) = NonNull::new(slice.ptr_guard_mut().as_ptr())
    {
        sys::advise_small_pages(place);
    }
}

/// End of the memory below the PCI window.
#[must_use]
pub fn low_end(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().next().map_or(0, |region| region.start_addr().raw_value().saturating_add(region.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn small_memory_is_one_range() {
        assert_eq!(ranges(256), [(0, 256 << 20)]);
        assert_eq!(ranges(3072), [(0, 3 << 30)]);
    }

    #[test]
    fn large_memory_leaves_the_window_free() {
        assert_eq!(ranges(4096), [(0, 3 << 30), (4 << 30, 1 << 30)]);
        let memory = map(3073).unwrap();
        assert_eq!(low_end(&memory), layout::PCI_WINDOW);
        memory.write_obj(7_u64, GuestAddress(layout::ABOVE_4G + (1 << 20) - 8)).unwrap();
        assert!(memory.write_obj(7_u8, GuestAddress(layout::PCI_WINDOW)).is_err());
        assert!(memory.write_obj(7_u8, GuestAddress(layout::ABOVE_4G + (1 << 20))).is_err());
    }

    #[test]
    fn memory_is_one_range_aligned_for_huge_pages() {
        let memory = map(4096).unwrap();
        let mut next = memory.iter().next().unwrap().as_ptr() as usize;
        assert!(next.is_multiple_of(2 << 20));
        let end = next + (4096 << 20);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        while next < end {
            let start = format!("{next:x}-");
            let line = maps.lines().find(|line| line.starts_with(&start)).expect("a mapping goes on there");
            let (range, _) = line.split_once(' ').unwrap();
            next = usize::from_str_radix(range.split_once('-').unwrap().1, 16).unwrap();
        }
        assert_eq!(next, end);
    }

    #[test]
    fn a_copy_shares_what_the_file_holds_and_has_the_rest_for_itself() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 20).unwrap();
        assert_eq!(parts(&file, 32 << 20).unwrap(), [0..0; 0]);
        let at = |mib: u64| (mib << 20) as usize;
        for offset in [at(3), at(4), at(9) + 5, at(31)] {
            std::os::unix::fs::FileExt::write_all_at(&file, &[7], offset as u64).unwrap();
        }
        assert_eq!(parts(&file, at(32)).unwrap(), [at(2)..at(6), at(8)..at(10), at(30)..at(32)]);
        assert_eq!(parts(&file, at(31)).unwrap(), [at(2)..at(6), at(8)..at(10)]);

        let (pipe, _writer) = io::pipe().unwrap();
        assert!(
            parts(&File::from(std::os::fd::OwnedFd::from(pipe)), 32 << 20).is_err(),
            "nothing that can be sought in"
        );

        let memory = map_backed(32, Backing::CopyOf(&file)).unwrap();
        let read = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!([3 << 20, (9 << 20) + 5, 31 << 20].map(read), [7; 3]);
        assert_eq!([0, 7 << 20, (32 << 20) - 1].map(read), [0; 3]);
        memory.write_slice(&[8; 2 << 20], GuestAddress(3 << 20)).unwrap();
        let mut kept = [0; 2];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut kept, 3 << 20).unwrap();
        assert_eq!(kept, [7, 0], "the file stays as it is");
    }

    #[test]
    fn files_are_loaded_from_any_offset() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..20_000_u32).map(|index| (index % 251) as u8).collect();
        io::Write::write_all(&mut file, &content).unwrap();
        let memory = map(32).unwrap();
        for (offset, size) in [(0, 20_000), (1, 1), (4097, 8191), (64, 128), (19_999, 1), (5, 0)] {
            load(&memory, 0x20_0003, &file, offset as u64, size as u64).unwrap();
            let mut read = vec![0; size];
            memory.read_slice(&mut read, GuestAddress(0x20_0003)).unwrap();
            assert_eq!(read, &content[offset..offset + size]);
        }
        assert!(load(&memory, (32 << 20) - 4, &file, 0, 5).is_err(), "beyond the end of memory");
        assert!(load(&memory, 0x20_0003, &file, 19_999, 2).is_err(), "beyond the end of the file");
    }
}
