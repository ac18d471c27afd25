//! The configuration space (virtio 1.2, section 5.2.4), and the limits it states.

use super::disk::SECTOR;
use crate::devices::virtio::config_space;

/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 128;
/// The most data buffers of one request: a header and a status byte go along.
pub const SEGMENTS_LIMIT: u32 = QUEUE_SIZE as u32 - 2;
/// The most ranges of one discard request.
pub const DISCARD_RANGES_LIMIT: u32 = 32;
/// The most sectors of one discarded range, 128 MiB: what a file system frees in a moment.
pub const DISCARD_SECTORS_LIMIT: u32 = 1 << 18;
/// The most ranges of one write-zeroes request.
pub const ZEROES_RANGES_LIMIT: u32 = 1;
/// The most sectors of one zeroed range, 16 MiB: should the file system have no zeroes of
/// its own, this is what one request makes us write.
pub const ZEROES_SECTORS_LIMIT: u32 = 1 << 15;
/// What a file system frees, in sectors.
const DISCARD_ALIGNMENT: u32 = 8;

/// The configuration space as the guest sees it.
#[derive(Debug, Clone, Copy)]
pub struct ConfigSpace([u8; 60]);

impl ConfigSpace {
    /// Describes a disk of `sectors` 512-byte sectors.
    pub fn new(sectors: u64, read_only: bool) -> Self {
        let mut space = Self([0; 60]);
        space.put(0, &sectors.to_le_bytes());
        space.put(12, &SEGMENTS_LIMIT.to_le_bytes());
        space.put(20, &(SECTOR as u32).to_le_bytes());
        space.put(34, &1_u16.to_le_bytes());
        if !read_only {
            space.put(36, &DISCARD_SECTORS_LIMIT.to_le_bytes());
            space.put(40, &DISCARD_RANGES_LIMIT.to_le_bytes());
            space.put(44, &DISCARD_ALIGNMENT.to_le_bytes());
            space.put(48, &ZEROES_SECTORS_LIMIT.to_le_bytes());
            space.put(52, &ZEROES_RANGES_LIMIT.to_le_bytes());
            space.put(56, &[1]);
        }
        space
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        self.0[at..at + value.len()].copy_from_slice(value);
    }

    /// Copies what lies at `offset`; what lies beyond the end is zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.0, offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_says() {
        let read = |space: &ConfigSpace, offset, size: usize| {
            let mut bytes = [0xff; 8];
            space.read(offset, &mut bytes[..size]);
            bytes[size..].fill(0);
            u64::from_le_bytes(bytes)
        };
        let space = ConfigSpace::new(0x1_2345_6789, false);
        assert_eq!(read(&space, 0, 8), 0x1_2345_6789);
        assert_eq!(read(&space, 4, 4), 1);
        assert_eq!(read(&space, 12, 4), 126);
        assert_eq!(read(&space, 20, 4), 512);
        assert_eq!(read(&space, 36, 4), 1 << 18);
        assert_eq!(read(&space, 40, 4), 32);
        assert_eq!(read(&space, 44, 4), 8);
        assert_eq!(read(&space, 48, 4), 1 << 15);
        assert_eq!(read(&space, 52, 4), 1);
        assert_eq!(read(&space, 56, 1), 1);
        assert_eq!(read(&space, 58, 8), 0);
        assert_eq!(read(&space, u64::MAX, 8), 0);
        assert_eq!(read(&ConfigSpace::new(8, true), 36, 8), 0);
    }
}
