//! What the kernel is told: `boot_params` with the memory map, command line, initramfs,
//! and a random seed (Documentation/arch/x86/boot.rst and zero-page.rst of Linux).

use std::mem::size_of;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use rustix::rand::GetRandomFlags;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;

/// What the guest has no business looking for: there is no second PCI bus, no BIOS, nothing
/// behind a bounce buffer. Each word is compared with the names of all parameters at each of
/// the eight stages of the kernel's start, so none is here without need.
///
/// * `reboot=k panic=-1`: a panic ends the machine at once, see [`crate::exit`].
/// * `pci=conf1`: configuration mechanism #1 without checking for it; `lastbus=0`: no
///   search for further buses.
/// * `rcupdate.rcu_expedited=1`: a guest this small loses nothing by short grace
///   periods, and mounts, namespaces and hot-plug wait for them.
/// * `noreplace-smp`: on one processor, do not rewrite the eight thousand lock prefixes of
///   the kernel's text. It takes longer than they ever would.
/// * `dummy.numdummies=0`: a pod has the interfaces that it was given, and no other.
const COMMAND_LINE: &str = "console=ttyS0 quiet reboot=k panic=-1 pci=conf1,lastbus=0 swiotlb=noforce \
     rcupdate.rcu_expedited=1 noreplace-smp dummy.numdummies=0";

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// `setup_data` type of a seed for the random number generator.
const SETUP_RNG_SEED: u32 = 9;
const SEED_SIZE: usize = 32;
/// No loader id is assigned to us.
const UNDEFINED_LOADER: u8 = 0xff;

/// The boot parameters cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ParamsError {
    /// The command line is too long.
    #[error("the kernel command line has {length} bytes, at most {limit} are possible: shorten the configured one")]
    TooLong {
        /// Its length.
        length: u64,
        /// The limit.
        limit: u64,
    },
    /// It contains what no command line can.
    #[error("the configured kernel command line contains a character other than printable ASCII")]
    Character,
    /// The host has no random bytes.
    #[error("cannot get random bytes from the host")]
    Random(#[source] rustix::io::Errno),
    /// Guest memory is too small.
    #[error("cannot write to guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// The whole command line: ours, then the configured one.
fn command_line(configured: &str) -> Result<Vec<u8>, ParamsError> {
    if !configured.bytes().all(|byte| (0x20..=0x7e).contains(&byte)) {
        return Err(ParamsError::Character);
    }
    let mut line = COMMAND_LINE.as_bytes().to_vec();
    if !configured.is_empty() {
        line.push(b' ');
        line.extend_from_slice(configured.as_bytes());
    }
    let length = line.len() as u64;
    let limit = layout::COMMAND_LINE_SIZE - 1;
    if length > limit {
        return Err(ParamsError::TooLong { length, limit });
    }
    line.push(0);
    Ok(line)
}

/// The memory map, as (start, end, type). What lies between memory and the PCI window is
/// reserved, so that the kernel places devices nowhere but in the window.
fn memory_map(memory: &GuestMemoryMmap) -> Vec<(u64, u64, u32)> {
    let mut map =
        vec![(0, layout::CONVENTIONAL_END, E820_RAM), (layout::CONVENTIONAL_END, layout::HIGH_MEMORY, E820_RESERVED)];
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start.saturating_add(region.len());
        map.push((start.max(layout::HIGH_MEMORY), end, E820_RAM));
        if end < layout::PCI_WINDOW {
            map.push((end, layout::PCI_WINDOW, E820_RESERVED));
        }
        if start < layout::PCI_WINDOW {
            map.push((layout::PCI_WINDOW_END, layout::ABOVE_4G, E820_RESERVED));
        }
    }
    map
}

/// Writes it all; `initramfs` is address and size.
pub fn write(memory: &GuestMemoryMmap, configured: &str, initramfs: (u64, u64)) -> Result<(), ParamsError> {
    let line = command_line(configured)?;
    memory.write_slice(&line, GuestAddress(layout::COMMAND_LINE))?;
    write_seed(memory)?;

    // The kernel reads these through 32-bit fields, and all of them lie below 4 GiB.
    let low = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let mut params = boot_params::default();
    params.hdr.type_of_loader = UNDEFINED_LOADER;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.kernel_alignment = 0x100_0000;
    params.hdr.cmd_line_ptr = low(layout::COMMAND_LINE);
    params.hdr.cmdline_size = low(line.len() as u64);
    params.hdr.ramdisk_image = low(initramfs.0);
    params.hdr.ramdisk_size = low(initramfs.1);
    params.hdr.setup_data = layout::SETUP_DATA;
    let map = memory_map(memory);
    for (entry, (start, end, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: *start, size: end - start, type_: *kind };
        params.e820_entries += 1;
    }
    memory.write_obj(params, GuestAddress(layout::BOOT_PARAMS))?;
    Ok(())
}

/// The kernel mixes these bytes into its pool before anything asks it for random numbers,
/// and then wipes them.
fn write_seed(memory: &GuestMemoryMmap) -> Result<(), ParamsError> {
    let mut seed = [0_u8; SEED_SIZE];
    rustix::rand::getrandom(&mut seed, GetRandomFlags::empty()).map_err(ParamsError::Random)?;
    let mut entry = Vec::with_capacity(size_of::<u64>() * 2 + SEED_SIZE);
    entry.extend_from_slice(&0_u64.to_le_bytes());
    entry.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    entry.extend_from_slice(&(SEED_SIZE as u32).to_le_bytes());
    entry.extend_from_slice(&seed);
    memory.write_slice(&entry, GuestAddress(layout::SETUP_DATA))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn memory_map_covers_all_memory_and_spares_the_window() {
        for mib in [32, 256, 3072, 8192] {
            let map = memory_map(&memory::map(mib).unwrap());
            let ram: u64 = map.iter().filter(|entry| entry.2 == E820_RAM).map(|entry| entry.1 - entry.0).sum();
            assert_eq!(ram, (mib << 20) - (layout::HIGH_MEMORY - layout::CONVENTIONAL_END));
            for (start, end, _) in &map {
                assert!(start < end);
                assert!(*end <= layout::PCI_WINDOW || *start >= layout::PCI_WINDOW_END, "{start:#x}-{end:#x}");
            }
        }
    }

    #[test]
    fn command_line_is_bounded_and_clean() {
        let line = command_line("nacelle.debug=1").unwrap();
        assert!(line.starts_with(b"console=ttyS0 ") && line.ends_with(b" nacelle.debug=1\0"));
        assert!(matches!(command_line("a\nb"), Err(ParamsError::Character)));
        assert!(matches!(command_line(&"x".repeat(2000)), Err(ParamsError::TooLong { .. })));
    }

    #[test]
    fn kernel_finds_what_it_was_given() {
        let memory = memory::map(64).unwrap();
        write(&memory, "", (0x100_0000, 0x2345)).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap();
        let header = params.hdr;
        assert_eq!(({ header.ramdisk_image }, { header.ramdisk_size }), (0x100_0000, 0x2345));
        assert_eq!({ header.setup_data }, layout::SETUP_DATA);
        assert_eq!(params.e820_entries, 5);
        let seed: [u8; SEED_SIZE] = memory.read_obj(GuestAddress(layout::SETUP_DATA + 16)).unwrap();
        assert!(seed.iter().any(|byte| *byte != 0));
    }
}
