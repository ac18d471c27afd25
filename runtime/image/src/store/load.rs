//! Reading a store that another run left.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::record::References;
use super::{
    IMAGE_CONFIG, IMAGE_RECORD, ImageRecord, LAYER_IMAGE, LAYER_RECORD, LAYER_TREE, LayerRecord, REFERENCES, ROOTFS,
    State, Stored, files,
};
use crate::digest::Digest;
use crate::erofs::BLOCK_SIZE;
use crate::error::{Error, Result};

/// Everything that is complete. What is not is removed, with a word in the log.
pub(super) fn load(root: &Path) -> Result<State> {
    let tmp = root.join("tmp");
    let mut state = State::default();
    for path in files::entries(&root.join("layers"))? {
        match digest(&path).and_then(|diff_id| Some((diff_id, layer(&path)?))) {
            Some((diff_id, record)) => {
                state.layers.insert(diff_id, record);
            }
            None => {
                tracing::warn!(path = %path.display(), "removing a layer that is incomplete or of another version");
                files::discard(&path, &tmp)?;
            }
        }
    }
    for path in files::entries(&root.join("images"))? {
        let loaded = digest(&path)
            .ok_or_else(|| Error::corrupt(path.display().to_string(), "its name is not an image id"))
            .and_then(|id| Ok((id, image(&path, &id, &state.layers)?)));
        match loaded {
            Ok((id, stored)) => {
                state.images.insert(id, stored.into());
            }
            Err(error) => {
                tracing::warn!(%error, "removing an image that is incomplete or of another version");
                files::discard(&path, &tmp)?;
            }
        }
    }
    let references: Option<References> = files::read_record(&root.join(REFERENCES));
    state.references = references.map(References::parsed).unwrap_or_default();
    state.references.retain(|_, id| state.images.contains_key(id));
    Ok(state)
}

/// The image in the directory `path`, with all its layers.
pub(super) fn image(path: &Path, id: &Digest, layers: &HashMap<Digest, LayerRecord>) -> Result<Stored> {
    let corrupt = |reason: &str| Error::corrupt(format!("image {id} in the store"), reason);
    let record: ImageRecord =
        files::read_record(&path.join(IMAGE_RECORD)).ok_or_else(|| corrupt("it has no record"))?;
    let config = fs::read(path.join(IMAGE_CONFIG)).unwrap_or_default();
    if Digest::of(&config) != *id {
        return Err(corrupt("its configuration has another digest"));
    }
    let config_bytes = config.len() as u64;
    let config = serde_json::from_slice(&config).map_err(|_| corrupt("its configuration cannot be read"))?;
    if !has_blocks(&path.join(ROOTFS), record.blocks) {
        return Err(corrupt("its root file system is incomplete"));
    }
    let mut size = config_bytes + u64::from(record.blocks) * BLOCK_SIZE;
    let mut unique = record.layers.clone();
    unique.sort();
    unique.dedup();
    for layer in unique {
        let record = layers.get(&layer).ok_or_else(|| corrupt("a layer is missing"))?;
        size = size.saturating_add(record.allocated).saturating_add(record.tree_bytes);
    }
    Ok(Stored { record, config, size })
}

fn layer(path: &Path) -> Option<LayerRecord> {
    let record: LayerRecord = files::read_record(&path.join(LAYER_RECORD))?;
    let tree = fs::metadata(path.join(LAYER_TREE)).ok()?.len();
    (tree == record.tree_bytes && has_blocks(&path.join(LAYER_IMAGE), record.blocks)).then_some(record)
}

fn has_blocks(path: &Path, blocks: u32) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.size() == u64::from(blocks) * BLOCK_SIZE)
}

fn digest(path: &Path) -> Option<Digest> {
    Digest::from_hex(path.file_name()?.to_str()?).ok()
}
