//! How much an image may ask of this host. An honest image stays far below each of these.

/// Bounds of what is fetched and built; all are per image or per layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a manifest or an index.
    pub manifest_bytes: u64,
    /// Bytes of an image configuration.
    pub config_bytes: u64,
    /// Layers of an image.
    pub layers: usize,
    /// Bytes of one layer, as stored in the registry and after decompression alike.
    pub layer_bytes: u64,
    /// How many times larger than its stored size a layer may become on the disk, once it has
    /// [`Limits::EXPANSION_FREE`] bytes there. Long runs of zeros take no space, and do not count.
    pub layer_expansion: u64,
    /// Bytes of one layer's files with the holes of sparse files, which take no space on the disk.
    pub layer_logical_bytes: u64,
    /// Entries of one layer's archive, and inodes of a layer or an image.
    pub inodes: usize,
    /// Bytes of names, link targets and extended attributes of one layer; they are held in memory.
    pub metadata_bytes: u64,
}

impl Limits {
    /// A layer that takes no more bytes than this on the disk may have come from any number of bytes.
    pub const EXPANSION_FREE: u64 = 4 << 30;
    /// An archive of no more bytes than this, zeros included, may have come from any number of bytes. It is a bound of
    /// time: some minutes of a processor.
    pub const UNPACKED_FREE: u64 = 64 << 30;
    /// What gzip makes of zeros, nearly.
    const ZEROS_EXPANSION: u64 = 1024;

    /// Bytes that the archive of a layer of `stored` bytes may have.
    pub(crate) fn unpacked(&self, stored: u64) -> u64 {
        stored.saturating_mul(Self::ZEROS_EXPANSION).max(Self::UNPACKED_FREE).min(self.layer_bytes)
    }

    /// Bytes of content that a layer of `stored` bytes may have on the disk.
    pub(crate) fn written(&self, stored: u64) -> u64 {
        stored.saturating_mul(self.layer_expansion).max(Self::EXPANSION_FREE).min(self.layer_bytes)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            manifest_bytes: 4 << 20,
            config_bytes: 8 << 20,
            layers: 512,
            layer_bytes: 256 << 30,
            layer_expansion: 100,
            layer_logical_bytes: 1 << 40,
            inodes: 2_000_000,
            metadata_bytes: 256 << 20,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_layers_may_grow_freely_and_large_ones_in_proportion() {
        let limits = Limits::default();
        assert_eq!(limits.written(1000), 4 << 30);
        assert_eq!(limits.written(1 << 30), 100 << 30);
        assert_eq!(limits.written(100 << 30), 256 << 30);
        assert_eq!(limits.written(u64::MAX), 256 << 30);
        assert_eq!(limits.unpacked(1000), 64 << 30);
        assert_eq!(limits.unpacked(100 << 20), 100 << 30);
        assert_eq!(limits.unpacked(u64::MAX), 256 << 30);
    }
}
