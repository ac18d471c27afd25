//! The configuration space (virtio 1.2, section 5.11.4).

use crate::devices::virtio::config_space;

/// Name by which the guest mounts the device.
pub const TAG: &str = "nacelle";
/// Bytes of the tag's field, filled up with zeros.
const TAG_SIZE: usize = 36;
const _: () = assert!(TAG.len() <= TAG_SIZE);
/// Queues for requests. One: the threads share it, so that none is idle while another has
/// more than it can do.
const REQUEST_QUEUES: u32 = 1;

/// The configuration space as the guest sees it.
#[derive(Debug, Clone, Copy)]
pub struct ConfigSpace([u8; TAG_SIZE + 4]);

impl ConfigSpace {
    /// The one there is.
    pub fn new() -> Self {
        let mut space = [0; TAG_SIZE + 4];
        space[..TAG.len()].copy_from_slice(TAG.as_bytes());
        space[TAG_SIZE..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        Self(space)
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
        let mut all = [0xff; 44];
        ConfigSpace::new().read(0, &mut all);
        assert_eq!(&all[..8], b"nacelle\0");
        assert_eq!(&all[8..36], [0; 28]);
        assert_eq!(&all[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
        let mut beyond = [0xff; 4];
        ConfigSpace::new().read(u64::MAX, &mut beyond);
        assert_eq!(beyond, [0; 4]);
    }
}
