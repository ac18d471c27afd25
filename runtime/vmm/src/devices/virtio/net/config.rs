//! The configuration space (virtio 1.2, section 5.1.4).

use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use crate::devices::virtio::config_space;

/// The smallest MTU: that of IPv4 (virtio 1.2, section 5.1.4.1).
pub const MTU_LEAST: u16 = 68;

/// The configuration space as the guest sees it.
#[derive(Debug, Clone, Copy)]
pub struct ConfigSpace([u8; 12]);

impl ConfigSpace {
    /// Describes an interface that is up.
    pub fn new(mac: [u8; 6], mtu: u16) -> Self {
        let mut space = [0; 12];
        space[..6].copy_from_slice(&mac);
        space[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        space[8..10].copy_from_slice(&1_u16.to_le_bytes());
        space[10..].copy_from_slice(&mtu.to_le_bytes());
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
        let space = ConfigSpace::new([2, 1, 2, 3, 4, 5], 1450);
        let mut all = [0xff; 14];
        space.read(0, &mut all);
        assert_eq!(all, [2, 1, 2, 3, 4, 5, 1, 0, 1, 0, 0xaa, 5, 0, 0]);
        let mut mtu = [0; 2];
        space.read(10, &mut mtu);
        assert_eq!(u16::from_le_bytes(mtu), 1450);
        space.read(u64::MAX, &mut mtu);
        assert_eq!(mtu, [0; 2]);
    }
}
