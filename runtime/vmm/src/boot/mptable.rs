//! The MP table (MultiProcessor Specification 1.4), which tells a guest without ACPI of
//! its processors. It has no IOAPIC and no buses: all interrupts are messages.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;

const SPECIFICATION_1_4: u8 = 4;
const LOCAL_APIC_VERSION: u8 = 0x14;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_INTERRUPT: u8 = 3;
/// An id that no controller has.
const NO_IOAPIC: u8 = 0xfe;

/// Writes the table for `vcpus` processors (1 to 64) with APIC ids counted from 0.
pub fn write(memory: &GuestMemoryMmap, vcpus: u8) -> Result<(), GuestMemoryError> {
    let table = table(vcpus);
    memory.write_slice(&table, GuestAddress(layout::MP_TABLE))?;
    memory.write_slice(&floating_pointer(), GuestAddress(layout::MP_FLOATING_POINTER))
}

fn floating_pointer() -> [u8; 16] {
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&address_bytes(layout::MP_TABLE));
    pointer[8] = 1; // its length in 16 bytes
    pointer[9] = SPECIFICATION_1_4;
    pointer[10] = checksum(&pointer);
    pointer
}

fn table(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        // Signature and features are the processor's own affair: it has CPUID.
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[ENTRY_PROCESSOR, id, LOCAL_APIC_VERSION, flags]);
        entry(&processor);
    }
    // A table without any interrupt is taken for a bug and reported on the console. This
    // one, from a bus that is not there to an IOAPIC that is not there, is never looked up.
    entry(&[ENTRY_INTERRUPT, 0, 0, 0, 0, 0, NO_IOAPIC, 0]);

    let mut table = Vec::with_capacity(44 + entries.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[SPECIFICATION_1_4, 0]);
    table.extend_from_slice(b"NACELLE MICROVM     ");
    table.extend_from_slice(&[0; 6]); // no OEM table
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&address_bytes(layout::LOCAL_APIC));
    table.extend_from_slice(&[0; 4]); // no extended table
    table.extend_from_slice(&entries);
    let sum = checksum(&table);
    if let Some(byte) = table.get_mut(7) {
        *byte = sum;
    }
    table
}

/// Addresses in the table lie below 4 GiB.
fn address_bytes(address: u64) -> [u8; 4] {
    (address as u32).to_le_bytes()
}

/// The byte that makes all of them sum to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn a_kernel_accepts_the_table() {
        for vcpus in [1, 2, 64] {
            let memory = memory::map(32).unwrap();
            write(&memory, vcpus).unwrap();
            let pointer: [u8; 16] = memory.read_obj(GuestAddress(layout::MP_FLOATING_POINTER)).unwrap();
            assert_eq!(pointer[..4], *b"_MP_");
            assert_eq!(checksum(&pointer), 0);
            let mut header = [0; 44];
            memory.read_slice(&mut header, GuestAddress(layout::MP_TABLE)).unwrap();
            let length = usize::from(u16::from_le_bytes([header[4], header[5]]));
            assert!(layout::MP_TABLE + length as u64 <= layout::MP_FLOATING_POINTER);
            let mut table = vec![0; length];
            memory.read_slice(&mut table, GuestAddress(layout::MP_TABLE)).unwrap();
            assert_eq!(checksum(&table), 0);
            let mut rest = &table[44..];
            let mut processors = 0;
            let mut entries = 0;
            while let Some(kind) = rest.first() {
                processors += u32::from(*kind == ENTRY_PROCESSOR);
                rest = &rest[if *kind == ENTRY_PROCESSOR { 20 } else { 8 }..];
                entries += 1;
            }
            assert_eq!(processors, u32::from(vcpus));
            assert_eq!(entries, u16::from_le_bytes([header[34], header[35]]));
        }
    }
}
