//! Loads an uncompressed x86-64 Linux kernel (ELF `vmlinux`) into guest memory, segment
//! by segment, straight from the file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::elf;
use vm_memory::GuestMemoryMmap;

use crate::sys;
use crate::{layout, memory};

const HUGE_PAGE: u64 = sys::HUGE_PAGE as u64;
/// At most so many bytes of a huge page are worth small pages.
const SPARSE: u64 = 64 << 10;
const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
/// A kernel has four or five; a file that claims more than this is no kernel.
const PROGRAM_HEADER_LIMIT: u16 = 64;
/// Bytes of the header that tell 64-bit, and little-endian.
const CLASS: usize = 4;
const DATA: usize = 5;
const MACHINE_X86_64: u16 = 62;

/// What is wrong with a kernel file.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It cannot be read.
    #[error("cannot open or read it")]
    Read(#[from] io::Error),
    /// It is shorter than its headers say.
    #[error("the file is truncated: {what} ends beyond it")]
    Truncated {
        /// Which part.
        what: String,
    },
    /// It is something else.
    #[error("the file is not an uncompressed x86-64 kernel: {reason}")]
    Format {
        /// How that shows.
        reason: String,
    },
    /// There is no room.
    #[error("the kernel needs memory up to {end:#x}, the guest's ends at {memory:#x}: give the guest more memory")]
    TooLarge {
        /// End of the segment.
        end: u64,
        /// End of memory.
        memory: u64,
    },
    /// A segment cannot be copied.
    #[error("cannot copy a segment into guest memory")]
    Copy(#[source] io::Error),
}

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// 64-bit entry point.
    pub entry: u64,
    /// First byte after the kernel, its uninitialised data included.
    pub end: u64,
}

/// A part of the file that goes into memory.
#[derive(Debug, Clone, Copy)]
struct Segment {
    offset: u64,
    file_size: u64,
    address: u64,
    memory_size: u64,
}

impl Segment {
    fn holds(&self, address: u64) -> bool {
        address.checked_sub(self.address).is_some_and(|offset| offset < self.file_size)
    }
}

/// Loads the kernel at `path`. Memory beyond the file's data is left as it is: zero.
pub fn load(memory: &GuestMemoryMmap, path: &Path) -> Result<Kernel, KernelError> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let (entry, segments) = parse(&file, size)?;
    let limit = memory::low_end(memory);
    let mut end = 0;
    for segment in &segments {
        let segment_end = check(segment, size, limit)?;
        end = end.max(segment_end);
    }
    if !segments.iter().any(|segment| segment.holds(entry)) {
        return Err(format(&format!("its entry point {entry:#x} lies in no segment")));
    }
    for address in sparse(&segments) {
        memory::advise_small_pages(memory, address);
    }
    for segment in segments {
        memory::load(memory, segment.address, &file, segment.offset, segment.file_size).map_err(KernelError::Copy)?;
    }
    Ok(Kernel { entry, end })
}

/// The huge pages of which the file fills next to nothing. To clear one takes a host as long as a hundred faults.
fn sparse(segments: &[Segment]) -> Vec<u64> {
    let mut filled = BTreeMap::<u64, u64>::new();
    for segment in segments {
        let end = segment.address.saturating_add(segment.file_size);
        let mut address = segment.address;
        while address < end {
            let page = address - address % HUGE_PAGE;
            let next = page.saturating_add(HUGE_PAGE).min(end);
            *filled.entry(page).or_default() += next - address;
            address = next;
        }
    }
    filled.into_iter().filter(|(_, bytes)| *bytes <= SPARSE).map(|(page, _)| page).collect()
}

fn format(reason: &str) -> KernelError {
    KernelError::Format { reason: reason.to_owned() }
}

/// Checks that a segment lies within the file and within usable memory; returns its end.
fn check(segment: &Segment, file_size: u64, memory_end: u64) -> Result<u64, KernelError> {
    let what = || KernelError::Truncated { what: format!("the segment for address {:#x}", segment.address) };
    if segment.offset.checked_add(segment.file_size).is_none_or(|end| end > file_size) {
        return Err(what());
    }
    if segment.address < layout::HIGH_MEMORY {
        return Err(format(&format!("a segment belongs at {:#x}, below 1 MiB", segment.address)));
    }
    if segment.memory_size < segment.file_size {
        return Err(format("a segment is larger in the file than in memory"));
    }
    let end = segment.address.saturating_add(segment.memory_size);
    if end > memory_end { Err(KernelError::TooLarge { end, memory: memory_end }) } else { Ok(end) }
}

/// Reads the headers: the entry point and the segments to load.
fn parse(file: &File, size: u64) -> Result<(u64, Vec<Segment>), KernelError> {
    let header: [u8; HEADER_SIZE] = read(file, 0, size, "the ELF header")?;
    if header.get(..4) != Some(b"\x7fELF") {
        return Err(format(if header.get(..2) == Some(b"MZ") {
            "it is a compressed bzImage or an EFI program, vmlinux is wanted"
        } else {
            "it does not start with the ELF magic"
        }));
    }
    if header[CLASS] != 2 || header[DATA] != 1 || u16_at(&header, 18) != MACHINE_X86_64 {
        return Err(format("it is an ELF file for another machine"));
    }
    let entry = u64_at(&header, 24);
    let table = u64_at(&header, 32);
    let count = u16_at(&header, 56);
    if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER_SIZE || count == 0 || count > PROGRAM_HEADER_LIMIT {
        return Err(format("its program headers make no sense"));
    }
    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let offset = table
            .checked_add(index * PROGRAM_HEADER_SIZE as u64)
            .ok_or_else(|| format("its program headers make no sense"))?;
        let header: [u8; PROGRAM_HEADER_SIZE] = read(file, offset, size, "the program header table")?;
        let segment = Segment {
            offset: u64_at(&header, 8),
            address: u64_at(&header, 24),
            file_size: u64_at(&header, 32),
            memory_size: u64_at(&header, 40),
        };
        if u32_at(&header, 0) == elf::PT_LOAD && segment.memory_size > 0 {
            segments.push(segment);
        }
    }
    Ok((entry, segments))
}

fn read<const N: usize>(file: &File, offset: u64, size: u64, what: &str) -> Result<[u8; N], KernelError> {
    let mut bytes = [0; N];
    if offset.checked_add(N as u64).is_none_or(|end| end > size) {
        return Err(KernelError::Truncated { what: what.to_owned() });
    }
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

// The offsets passed to these are constants inside fixed-size arrays.
fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).map_or(0, |chunk| u16::from_le_bytes(*chunk))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    const LOAD: u64 = 0x20_0000;

    /// A file with one segment that holds `code`, entered at its start.
    pub(crate) fn elf_with(code: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 0x1000];
        file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        let mut put = |offset: usize, bytes: &[u8]| file[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(16, &2_u16.to_le_bytes());
        put(18, &MACHINE_X86_64.to_le_bytes());
        put(24, &LOAD.to_le_bytes());
        put(32, &64_u64.to_le_bytes());
        put(54, &56_u16.to_le_bytes());
        put(56, &1_u16.to_le_bytes());
        put(64, &elf::PT_LOAD.to_le_bytes());
        put(72, &0x1000_u64.to_le_bytes());
        put(88, &LOAD.to_le_bytes());
        put(96, &(code.len() as u64).to_le_bytes());
        put(104, &(code.len() as u64 + 0x1000).to_le_bytes());
        file.extend_from_slice(code);
        file
    }

    fn load_bytes(bytes: &[u8], memory: &GuestMemoryMmap) -> Result<Kernel, KernelError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        load(memory, file.path())
    }

    #[test]
    fn segments_go_where_they_belong() {
        let memory = memory::map(32).unwrap();
        let kernel = load_bytes(&elf_with(b"code"), &memory).unwrap();
        assert_eq!(kernel, Kernel { entry: LOAD, end: LOAD + 4 + 0x1000 });
        assert_eq!(memory.read_obj::<[u8; 5]>(GuestAddress(LOAD)).unwrap(), *b"code\0");
    }

    #[test]
    fn huge_pages_with_next_to_nothing_are_found() {
        let segment = |address, file_size| Segment { offset: 0, file_size, address, memory_size: 0x100_0000 };
        let kernel = [
            segment(0x100_0000, 0x70_3000),
            segment(0x180_0000, 0x2000),
            segment(0x190_4000, 0x1000),
            segment(0x1a0_0000, SPARSE + 1),
        ];
        assert_eq!(sparse(&kernel), [0x180_0000]);
        assert_eq!(sparse(&[segment(0x11f_f000, 0x2000)]), [0x100_0000, 0x120_0000]);
        assert_eq!(sparse(&[segment(0x120_0000, 0)]), [0; 0]);
    }

    #[test]
    fn other_files_are_named_for_what_they_are() {
        let memory = memory::map(32).unwrap();
        let reason = |bytes: &[u8]| load_bytes(bytes, &memory).unwrap_err().to_string();
        assert!(reason(b"").contains("truncated"));
        assert!(reason(&[b"MZ".as_slice(), &[0; 600]].concat()).contains("bzImage"));
        assert!(reason(&[b'#'; 600]).contains("ELF magic"));
        let mut low = elf_with(b"code");
        low[88..96].copy_from_slice(&0x8000_u64.to_le_bytes());
        assert!(reason(&low).contains("below 1 MiB"));
        let mut entry = elf_with(b"code");
        entry[24..32].copy_from_slice(&(LOAD + 4).to_le_bytes());
        assert!(reason(&entry).contains("entry point"));
        let mut large = elf_with(b"code");
        large[104..112].copy_from_slice(&(32_u64 << 20).to_le_bytes());
        assert!(reason(&large).contains("more memory"));
    }

    proptest! {
        #[test]
        fn truncated_files_are_refused(length in 0_usize..0x1004) {
            let memory = memory::map(32).unwrap();
            let file = elf_with(b"code");
            prop_assert!(load_bytes(&file[..length], &memory).is_err());
        }

        #[test]
        fn mutated_files_never_panic(changes in proptest::collection::vec((0_usize..120, any::<u8>()), 1..6)) {
            let memory = memory::map(32).unwrap();
            let mut file = elf_with(b"code");
            for (offset, value) in changes {
                file[offset] = value;
            }
            if let Ok(kernel) = load_bytes(&file, &memory) {
                prop_assert!(kernel.entry < kernel.end && kernel.end <= 32 << 20);
            }
        }
    }
}
