//! Looking at what another run left.

use std::collections::BTreeSet;
use std::path::Path;

use super::files::{self, Found, MAX_RECORD};
use super::{
    IMAGE_CONFIG, IMAGE_RECORD, ImageRecord, JOINED, LAYER_IMAGE, LAYER_RECORD, LAYER_TREE, Layer, LayerRecord, ROOTFS,
    Stored,
};
use crate::digest::Digest;
use crate::erofs::BLOCK_SIZE;
use crate::error::{Error, Result};
use crate::manifest::ImageConfig;

/// What this version makes in a layer's and in an image's directory.
const FILES: [&str; 7] = [LAYER_IMAGE, LAYER_TREE, LAYER_RECORD, ROOTFS, JOINED, IMAGE_RECORD, IMAGE_CONFIG];

/// Whether an image has all of a layer, or will once that can be read.
pub(super) enum Lookup {
    There(Layer),
    Later,
    Missing,
}

/// The layer in `directory`.
pub(super) fn layer(directory: &Path) -> Result<Found<Layer>> {
    if let Some(foreign) = no_directory(directory)? {
        return Ok(foreign);
    }
    let record: LayerRecord = match files::read_record(&directory.join(LAYER_RECORD))? {
        Found::Whole(record) => record,
        other => return other.unless_useful(directory),
    };
    let tree = files::length(&directory.join(LAYER_TREE))? == Some(record.tree_bytes);
    if tree && has_blocks(&directory.join(LAYER_IMAGE), record.blocks)? {
        return Ok(Found::Whole(Layer { record, directory: directory.to_owned() }));
    }
    Found::<()>::Incomplete("a file of it is missing or cut".to_owned()).unless_useful(directory)
}

/// The image in `directory`, with all its layers.
pub(super) fn image(directory: &Path, id: &Digest, layer: impl Fn(&Digest) -> Lookup) -> Result<Found<Stored>> {
    if let Some(foreign) = no_directory(directory)? {
        return Ok(foreign);
    }
    let incomplete = |reason: &str| Found::<()>::Incomplete(reason.to_owned()).unless_useful(directory);
    let record: ImageRecord = match files::read_record(&directory.join(IMAGE_RECORD))? {
        Found::Whole(record) => record,
        other => return other.unless_useful(directory),
    };
    let Some(config) =
        files::read(&directory.join(IMAGE_CONFIG), MAX_RECORD)?.filter(|config| Digest::of(config) == *id)
    else {
        return incomplete("its configuration is missing, or has another digest");
    };
    let config_bytes = config.len() as u64;
    let Ok(config) = ImageConfig::parse(&config) else { return incomplete("its configuration is no such thing") };
    if !has_blocks(&directory.join(ROOTFS), record.blocks)? {
        return incomplete("its root file system is missing or cut");
    }
    let unique: BTreeSet<&Digest> = record.layers.iter().collect();
    let mut size = config_bytes + u64::from(record.blocks) * BLOCK_SIZE;
    let mut rootfs = vec![directory.join(ROOTFS)];
    let mut places = std::collections::HashMap::new();
    for digest in unique {
        match layer(digest) {
            Lookup::There(Layer { record, directory }) => {
                size = size.saturating_add(record.allocated).saturating_add(record.tree_bytes);
                places.insert(*digest, directory.join(LAYER_IMAGE));
            }
            Lookup::Later => {
                return Err(Error::corrupt(format!("image {id}"), format!("its layer {digest} cannot be used now")));
            }
            Lookup::Missing => return incomplete(&format!("its layer {digest} is missing")),
        }
    }
    let apart = record.joined.map_or(record.disk.len(), |joined| joined.from);
    for digest in record.disk.iter().take(apart) {
        let Some(place) = places.get(digest) else { return incomplete("its disk has a layer that it does not have") };
        rootfs.push(place.clone());
    }
    if let Some(joined) = record.joined {
        let path = directory.join(JOINED);
        if !has_blocks(&path, joined.blocks)? {
            return incomplete("the copies of its last layers are missing or cut");
        }
        size = size.saturating_add(u64::from(joined.blocks) * BLOCK_SIZE);
        rootfs.push(path);
    }
    Ok(Found::Whole(Stored { record, config, size, directory: directory.to_owned(), rootfs }))
}

impl<T> Found<T> {
    /// What cannot be used, by what else is in its directory: only what this version makes is taken for its leavings.
    fn unless_useful<U>(self, directory: &Path) -> Result<Found<U>> {
        let reason = match self {
            Self::Foreign(reason) => return Ok(Found::Foreign(reason)),
            Self::Incomplete(reason) => reason,
            Self::Absent | Self::Whole(_) => "it has no record".to_owned(),
        };
        let strange = files::entries(directory)?
            .into_iter()
            .find(|path| !FILES.iter().any(|name| path.file_name().is_some_and(|found| found == *name)));
        Ok(match strange {
            Some(path) => Found::Foreign(format!("{reason}, and this version makes no {}", path.display())),
            None => Found::Incomplete(reason),
        })
    }
}

/// That something is no directory, or is not there any more.
fn no_directory<T>(path: &Path) -> Result<Option<Found<T>>> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => Ok(None),
        Ok(_) => Ok(Some(Found::Foreign("it is no directory".to_owned()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Some(Found::Absent)),
        Err(error) => Err(Error::store("look at", path)(error)),
    }
}

fn has_blocks(path: &Path, blocks: u32) -> Result<bool> {
    Ok(files::length(path)? == Some(u64::from(blocks) * BLOCK_SIZE))
}
