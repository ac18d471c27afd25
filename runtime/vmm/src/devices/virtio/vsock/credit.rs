//! How much data of all streams together may wait for the host.

/// The room that all streams share for data the host does not take.
///
/// A guest can make us keep what it was given credit for, so this is what bounds the memory
/// of the device: every stream gets [`Self::LEAST`], and generous shares of a pool as long
/// as there is some left.
#[derive(Debug)]
pub struct CreditPool(u32);

impl CreditPool {
    /// What every stream gets, in bytes.
    pub const LEAST: u32 = 16 * 1024;
    /// What a stream gets at most: as much as Linux has on its side.
    pub const MOST: u32 = 256 * 1024;
    /// What is shared out beyond the least.
    pub const SHARED: u32 = 32 * 1024 * 1024;

    pub fn new() -> Self {
        Self(Self::SHARED)
    }

    /// Takes a share.
    pub fn take(&mut self) -> u32 {
        let extra = (self.0 / 32).min(Self::MOST - Self::LEAST);
        self.0 -= extra;
        Self::LEAST + extra
    }

    /// Whether every share was given back.
    #[cfg(test)]
    pub fn is_full(&self) -> bool {
        self.0 == Self::SHARED
    }

    /// Gives a share back.
    pub fn give_back(&mut self, share: u32) {
        self.0 = self.0.saturating_add(share.saturating_sub(Self::LEAST)).min(Self::SHARED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::vsock::muxer::CONNECTIONS_LIMIT;

    #[test]
    fn the_memory_a_guest_can_make_us_keep_is_bounded() {
        let mut pool = CreditPool::new();
        let shares: Vec<u32> = (0..CONNECTIONS_LIMIT).map(|_| pool.take()).collect();
        assert_eq!(shares[0], CreditPool::MOST);
        assert!(shares.iter().all(|share| *share >= CreditPool::LEAST));
        let sum: u64 = shares.iter().map(|share| u64::from(*share)).sum();
        assert!(sum <= u64::from(CreditPool::SHARED) + CONNECTIONS_LIMIT as u64 * u64::from(CreditPool::LEAST));
        for share in shares {
            pool.give_back(share);
        }
        assert_eq!(pool.take(), CreditPool::MOST);
    }
}
