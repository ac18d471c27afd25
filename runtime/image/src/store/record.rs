//! What is written beside the images, as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::files::Found;
use crate::digest::Digest;
use crate::reference::Reference;

/// Version of the records, of the trees and of the images beside them.
pub(super) const VERSION: u32 = 1;

/// A record of this version, in the bytes of its file.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Found<T> {
    #[derive(Deserialize)]
    struct Any {
        version: u64,
    }
    match serde_json::from_slice::<Any>(bytes) {
        Ok(Any { version }) if version != u64::from(VERSION) => Found::Foreign(format!("version {version} wrote it")),
        Ok(_) => serde_json::from_slice(bytes).map_or_else(|e| Found::Incomplete(damaged(&e)), Found::Whole),
        Err(error) => Found::Incomplete(damaged(&error)),
    }
}

fn damaged(error: &serde_json::Error) -> String {
    format!("its record is damaged ({error})")
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

/// Copies of the last layers of a disk, in one file: a virtual machine takes so many files only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Joined {
    /// The first of them, counted among the layers of the disk.
    pub(crate) from: usize,
    /// Length of the file in blocks of 4096 bytes.
    pub(crate) blocks: u32,
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
    /// Where the last layers of the disk lie, if they do not lie by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) joined: Option<Joined>,
    /// Seconds since the epoch.
    pulled_at: u64,
}

impl ImageRecord {
    pub(crate) fn new(layers: Vec<Digest>, disk: Vec<Digest>, blocks: u32, joined: Option<Joined>) -> Self {
        Self { version: VERSION, layers, disk, blocks, joined, pulled_at: super::seconds(SystemTime::now()) }
    }

    pub(super) fn pulled_at(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.pulled_at)).unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

/// `references.json`
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct References {
    version: u32,
    references: BTreeMap<String, Digest>,
    /// Images that stay although no reference leads to them, because theirs were lost.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(super) unnamed: BTreeSet<Digest>,
}

impl References {
    pub(super) fn new(references: &BTreeMap<Reference, Digest>, unnamed: &BTreeSet<Digest>) -> Self {
        let references = references.iter().map(|(reference, id)| (reference.to_string(), *id)).collect();
        Self { version: VERSION, references, unnamed: unnamed.clone() }
    }

    /// Those that can be read.
    pub(super) fn parsed(&self) -> impl Iterator<Item = (Reference, Digest)> {
        self.references.iter().filter_map(|(text, id)| Some((text.parse().ok()?, *id)))
    }
}
