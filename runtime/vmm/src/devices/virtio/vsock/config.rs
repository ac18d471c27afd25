//! The configuration space (virtio 1.2, section 5.10.4).

use super::packet::GUEST_CID;
use crate::devices::virtio::config_space;

/// Reads the guest's address; what lies beyond it is zero.
pub fn read(offset: u64, data: &mut [u8]) {
    config_space::read(&GUEST_CID.to_le_bytes(), offset, data);
}

#[cfg(test)]
mod tests {
    #[test]
    fn guest_reads_its_address_in_any_piece() {
        let mut data = [0xff; 10];
        super::read(0, &mut data);
        assert_eq!(data, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut data = [0xff; 4];
        super::read(4, &mut data);
        assert_eq!(data, [0; 4]);
        super::read(u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
