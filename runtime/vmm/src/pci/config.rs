//! The 256 bytes of a function's configuration space.

use crate::layout;

pub const COMMAND: usize = 0x04;
pub const COMMAND_PORTS: u8 = 1;
pub const COMMAND_MEMORY: u8 = 2;
const COMMAND_WRITABLE: u16 = 0x0407;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BAR0: usize = 0x10;
const BAR1: usize = 0x14;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const BAR_PORTS: u32 = 1;

/// Index of the I/O port range.
pub const PORTS_BAR: u8 = 0;
/// Size of the I/O port range in bytes.
pub const PORTS_SIZE: u16 = 0x200;
/// Index of the memory range.
pub const MEMORY_BAR: u8 = 1;
/// Size of the memory range in bytes.
pub const MEMORY_SIZE: u32 = 0x1000;

/// Registers and which of their bits the guest may write.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    end: usize,
    last_link: usize,
}

/// Who a function says it is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    /// Class, subclass and interface, as the register has them.
    pub class: u32,
    pub subsystem: u16,
}

impl ConfigSpace {
    /// A function without address ranges and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut config = Self { bytes: [0; 256], writable: [0; 256], end: FIRST_CAPABILITY, last_link: CAPABILITIES };
        config.put(0x00, &identity.vendor.to_le_bytes(), &[]);
        config.put(0x02, &identity.device.to_le_bytes(), &[]);
        // Revision 1: a modern virtio device.
        config.put(0x08, &(identity.class << 8 | 1).to_le_bytes(), &[]);
        config.put(0x2c, &identity.vendor.to_le_bytes(), &[]);
        config.put(0x2e, &identity.subsystem.to_le_bytes(), &[]);
        config
    }

    /// Adds both address ranges, placed by slot.
    pub fn add_ranges(&mut self, slot: u8) {
        let ports = u32::from(layout::PCI_PORTS) + u32::from(slot) * u32::from(PORTS_SIZE);
        let memory = layout::PCI_WINDOW as u32 + u32::from(slot) * MEMORY_SIZE;
        let port_bits = 0xffff & !(u32::from(PORTS_SIZE) - 1);
        self.put(BAR0, &(ports | BAR_PORTS).to_le_bytes(), &port_bits.to_le_bytes());
        self.put(BAR1, &memory.to_le_bytes(), &(!(MEMORY_SIZE - 1)).to_le_bytes());
        self.put(COMMAND, &[0, 0], &COMMAND_WRITABLE.to_le_bytes());
        // The line register is a note that software leaves for itself.
        self.put(0x3c, &[0], &[0xff]);
    }

    /// Appends a capability: its id, a link, then `body`, of which the bits of `writable`
    /// can be written. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.end;
        self.put(offset, &[id, 0], &[]);
        self.put(offset + 2, body, writable);
        self.put(self.last_link, &[offset as u8], &[]);
        self.put(COMMAND + 2, &STATUS_CAPABILITIES.to_le_bytes(), &[]);
        self.last_link = offset + 1;
        self.end = (offset + 2 + body.len()).next_multiple_of(4);
        offset
    }

    /// For construction: offsets are the caller's constants.
    fn put(&mut self, offset: usize, value: &[u8], writable: &[u8]) {
        for (target, byte) in self.bytes.iter_mut().skip(offset).zip(value) {
            *target = *byte;
        }
        for (target, byte) in self.writable.iter_mut().skip(offset).zip(writable) {
            *target = *byte;
        }
    }

    /// Reads; what lies beyond the end reads as ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset.saturating_add(index)).copied().unwrap_or(0xff);
        }
    }

    /// Writes the bits that can be written.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for ((byte, mask), value) in self.bytes.iter_mut().zip(&self.writable).skip(offset).zip(data) {
            *byte = *byte & !mask | value & mask;
        }
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8; 256] {
        &self.bytes
    }

    /// The byte at `offset`.
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or_default()
    }

    /// The little-endian word at `offset`.
    pub fn word(&self, offset: usize) -> u32 {
        self.bytes.get(offset..).and_then(|rest| rest.first_chunk()).map_or(0, |chunk| u32::from_le_bytes(*chunk))
    }

    /// First I/O port, if the function answers to any.
    pub fn ports(&self) -> Option<u16> {
        let base = (self.word(BAR0) & 0xfffc) as u16;
        (self.byte(COMMAND) & COMMAND_PORTS != 0 && base != 0).then_some(base)
    }

    /// First memory address, if the function answers to any.
    pub fn memory(&self) -> Option<u32> {
        let base = self.word(BAR1) & !0xf;
        (self.byte(COMMAND) & COMMAND_MEMORY != 0 && base != 0).then_some(base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config() -> ConfigSpace {
        let mut config = ConfigSpace::new(Identity { vendor: 0x1af4, device: 0x1042, class: 0x01_00_00, subsystem: 7 });
        config.add_ranges(3);
        config.add_capability(0x09, &[1, 2, 3], &[]);
        config.add_capability(0x11, &[4; 10], &[0, 0xc0]);
        config
    }

    #[test]
    fn identity_cannot_be_written() {
        let mut config = config();
        config.write(0, &[0; 4]);
        assert_eq!(config.word(0), 0x1042_1af4);
        assert_eq!(config.word(8), 0x0100_0001);
    }

    #[test]
    fn ranges_can_be_sized_and_moved() {
        let mut config = config();
        assert_eq!((config.ports(), config.memory()), (None, None), "nothing is decoded before the guest says so");
        config.write(COMMAND, &[3, 0]);
        assert_eq!((config.ports(), config.memory()), (Some(0x1600), Some(0xc000_3000)));
        for (bar, mask) in [(BAR0, 0xfe01), (BAR1, 0xffff_f000)] {
            config.write(bar, &[0xff; 4]);
            assert_eq!(config.word(bar), mask);
        }
        config.write(BAR0, &0x5200_u32.to_le_bytes());
        config.write(BAR1, &0xd000_1000_u32.to_le_bytes());
        assert_eq!((config.ports(), config.memory()), (Some(0x5200), Some(0xd000_1000)));
        config.write(0x18, &[0xff; 4]);
        assert_eq!(config.word(0x18), 0, "there is no third range");
    }

    #[test]
    fn capabilities_form_a_list() {
        let config = config();
        assert_eq!(config.word(COMMAND) >> 16 & 0x10, 0x10);
        let first = usize::from(config.byte(0x34));
        assert_eq!(config.byte(first), 0x09);
        let second = usize::from(config.byte(first + 1));
        assert_eq!((config.byte(second), config.byte(second + 1)), (0x11, 0));
        assert_eq!(config.byte(second + 2), 4);
    }

    proptest! {
        #[test]
        fn any_access_is_contained(offset in 0_usize..300, data in proptest::collection::vec(any::<u8>(), 0..9)) {
            let mut config = config();
            config.write(offset, &data);
            let mut read = vec![0; data.len()];
            config.read(offset, &mut read);
            prop_assert_eq!(config.word(0), 0x1042_1af4);
            prop_assert_eq!(config.byte(0x34), 0x40);
        }
    }
}
