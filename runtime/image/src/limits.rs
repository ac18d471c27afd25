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
    /// Bytes of one layer's files with the holes of sparse files, which take no space on the disk.
    pub layer_logical_bytes: u64,
    /// Entries of one layer's archive, and inodes of a layer or an image.
    pub inodes: usize,
    /// Bytes of names, link targets and extended attributes of one layer; they are held in memory.
    pub metadata_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            manifest_bytes: 4 << 20,
            config_bytes: 8 << 20,
            layers: 512,
            layer_bytes: 256 << 30,
            layer_logical_bytes: 1 << 40,
            inodes: 2_000_000,
            metadata_bytes: 256 << 20,
        }
    }
}
