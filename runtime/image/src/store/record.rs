//! What is written beside the images, as JSON.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::reference::Reference;

/// Version of the records, of the trees and of the images beside them.
const VERSION: u32 = 1;

/// A record that says which version wrote it.
pub(super) trait Versioned {
    fn is_current(&self) -> bool;
}

/// `layer.json`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    version: u32,
    /// Length of the layer's image in blocks of 4096 bytes.
    pub(crate) blocks: u32,
    /// Length of its tree in bytes.
    pub(crate) tree_bytes: u64,
    /// Bytes that the image takes on the disk, without the holes of sparse files.
    pub(crate) allocated: u64,
}

impl LayerRecord {
    pub(super) fn new(blocks: u32, tree_bytes: u64, allocated: u64) -> Self {
        Self { version: VERSION, blocks, tree_bytes, allocated }
    }
}

impl Versioned for LayerRecord {
    fn is_current(&self) -> bool {
        self.version == VERSION
    }
}

/// `image.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    version: u32,
    /// All layers, from the lowest, by their uncompressed digests. Kept, so that a later pull finds them.
    pub(crate) layers: Vec<Digest>,
    /// Those of them whose files are part of the disk, in the order they have there.
    pub(crate) disk: Vec<Digest>,
    /// Length of the root file system's own file in blocks of 4096 bytes.
    pub(crate) blocks: u32,
    /// Seconds since the epoch.
    pulled_at: u64,
}

impl ImageRecord {
    pub(crate) fn new(layers: Vec<Digest>, disk: Vec<Digest>, blocks: u32) -> Self {
        Self { version: VERSION, layers, disk, blocks, pulled_at: super::seconds(SystemTime::now()) }
    }

    pub(super) fn pulled_at(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.pulled_at)).unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

impl Versioned for ImageRecord {
    fn is_current(&self) -> bool {
        self.version == VERSION
    }
}

/// `references.json`
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct References {
    version: u32,
    references: BTreeMap<String, Digest>,
}

impl References {
    pub(super) fn new(references: &BTreeMap<Reference, Digest>) -> Self {
        let references = references.iter().map(|(reference, id)| (reference.to_string(), *id)).collect();
        Self { version: VERSION, references }
    }

    /// Those that can be read.
    pub(super) fn parsed(self) -> BTreeMap<Reference, Digest> {
        self.references.into_iter().filter_map(|(text, id)| Some((text.parse().ok()?, id))).collect()
    }
}

impl Versioned for References {
    fn is_current(&self) -> bool {
        self.version == VERSION
    }
}
