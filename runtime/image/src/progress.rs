//! How far a pull is.

use crate::digest::Digest;

/// One step of a pull, told whenever a layer gets further. Steps may be left out when they come faster than they are
/// taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of all layers that are here, as counted in the registry (compressed).
    pub done: u64,
    /// Bytes of all layers.
    pub total: u64,
    /// The layer that got further, by the digest the manifest gives it.
    pub layer: Digest,
    /// Its place in the image, counted from 0, and the number of layers.
    pub index: usize,
    /// Number of layers of the image.
    pub layers: usize,
    /// What happens with it.
    pub state: LayerState,
}

/// What happens with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerState {
    /// Others come first.
    Waiting,
    /// It is fetched and made into a file system at the same time.
    Downloading {
        /// Bytes that are here.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// It is in the store.
    Complete,
}
