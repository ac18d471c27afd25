//! What is on the disk: layers, images, and the references that mean them.
//!
//! ```text
//! lock                     held by the one process that uses the store
//! references.json          every tag and digest, and the image it means
//! images/HEX/              an image, by the SHA-256 of its configuration
//!     image.json           its layers and when it came
//!     config.json          the configuration itself
//!     rootfs.erofs         the merged tree, first of the files of its disk
//! layers/HEX/              a layer, by the SHA-256 of its uncompressed archive
//!     layer.json           its length
//!     layer.erofs          its files' content, and their tree for a look at the layer alone
//!     tree                 its tree, for merging
//! tmp/                     what is being made
//! ```
//!
//! Everything is made in `tmp`, put on the disk, and renamed into place, an image after its layers, a reference after
//! its image. So a crash leaves complete things and `tmp`; [`Store::open`] empties that and removes what no reference
//! leads to. Records carry a version; what another version wrote is removed and can be pulled again.
//!
//! The maps in memory are the truth while the store is open, under one mutex that is held for look-ups only. Changes
//! are made one at a time, on blocking threads, under a second mutex.

mod collect;
mod files;
mod load;
mod lock;
mod lookup;
mod record;

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use oci_spec::image::ImageConfiguration;
use tempfile::TempDir;

pub use files::Usage;
pub(crate) use record::{ImageRecord, LayerRecord};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layer::BuiltLayer;
use crate::reference::Reference;
use crate::tree::Tree;

pub(crate) const LAYER_IMAGE: &str = "layer.erofs";
const LAYER_TREE: &str = "tree";
const LAYER_RECORD: &str = "layer.json";
pub(crate) const ROOTFS: &str = "rootfs.erofs";
const IMAGE_RECORD: &str = "image.json";
const IMAGE_CONFIG: &str = "config.json";
const REFERENCES: &str = "references.json";

/// A store that this process has to itself.
#[derive(Debug)]
pub(crate) struct Store {
    root: PathBuf,
    state: Mutex<State>,
    changes: Mutex<()>,
    _lock: lock::Lock,
}

/// What is in the store.
#[derive(Debug, Default)]
struct State {
    images: BTreeMap<Digest, Arc<Stored>>,
    references: BTreeMap<Reference, Digest>,
    layers: HashMap<Digest, LayerRecord>,
    /// Layers that a pull counts on, and by how many pulls.
    pins: HashMap<Digest, usize>,
}

/// An image, its record and its configuration.
#[derive(Debug)]
struct Stored {
    record: ImageRecord,
    config: ImageConfiguration,
    size: u64,
}

impl Store {
    /// Opens the store in `root`, which is made if need be, and cleans up what a crash left.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).map_err(Error::store("find", root))?;
        for directory in ["", "tmp", "layers", "images"] {
            files::make_directory(&root.join(directory))?;
        }
        let lock = lock::Lock::take(&root)?;
        files::empty(&root.join("tmp"))?;
        let state = load::load(&root)?;
        let store = Self { root, state: Mutex::new(state), changes: Mutex::default(), _lock: lock };
        store.write_references()?;
        store.collect()?;
        Ok(store)
    }

    /// A directory for what is being made, removed with the handle.
    pub(crate) fn temporary(&self) -> Result<TempDir> {
        let tmp = self.root.join("tmp");
        tempfile::Builder::new().prefix("").tempdir_in(&tmp).map_err(Error::store("make a directory in", &tmp))
    }

    pub(crate) fn layer(&self, diff_id: &Digest) -> Option<LayerRecord> {
        self.state().layers.get(diff_id).copied()
    }

    /// The tree of a layer in the store.
    pub(crate) fn tree(&self, diff_id: &Digest) -> Result<Tree> {
        let path = self.layer_path(diff_id).join(LAYER_TREE);
        let bytes = std::fs::read(&path).map_err(Error::store("read", &path))?;
        let tree: Option<Tree> = postcard::from_bytes(&bytes).ok();
        tree.filter(Tree::is_valid).ok_or_else(|| {
            Error::corrupt(path.display().to_string(), "it is damaged; remove the image and pull it again")
        })
    }

    /// Puts a layer whose image was built in `directory` into the store.
    pub(crate) fn add_layer(&self, diff_id: Digest, built: &BuiltLayer, directory: TempDir) -> Result<()> {
        let tree = postcard::to_stdvec(&built.tree)
            .map_err(|error| Error::corrupt(format!("layer {diff_id}"), error.to_string()))?;
        files::write(&directory.path().join(LAYER_TREE), &tree)?;
        let image = directory.path().join(LAYER_IMAGE);
        let synced = std::fs::File::open(&image).and_then(|file| file.sync_all().and_then(|()| file.metadata()));
        let allocated = synced.map_err(Error::store("sync", &image))?.blocks() * 512;
        let record = LayerRecord::new(built.blocks, tree.len() as u64, allocated);
        files::write_record(&directory.path().join(LAYER_RECORD), &record)?;
        let _change = self.change();
        if self.layer(&diff_id).is_none() {
            files::publish(directory, &self.layer_path(&diff_id), &self.root.join("tmp"))?;
            self.state().layers.insert(diff_id, record);
        }
        Ok(())
    }

    pub(crate) fn has_image(&self, id: &Digest) -> bool {
        self.state().images.contains_key(id)
    }

    /// Makes `references` mean the image `id`, and gives it. `made` is put into the store first, if the image is not
    /// there yet. None if the image is not there and was not made.
    pub(crate) fn add_image(
        &self,
        id: &Digest,
        references: impl IntoIterator<Item = Reference>,
        made: Option<MadeImage>,
    ) -> Result<Option<Image>> {
        if let Some(made) = &made {
            files::write(&made.directory.path().join(IMAGE_CONFIG), &made.config)?;
            files::write_record(&made.directory.path().join(IMAGE_RECORD), &made.record)?;
        }
        let _change = self.change();
        if !self.has_image(id) {
            let Some(made) = made else { return Ok(None) };
            let path = self.image_path(id);
            files::publish(made.directory, &path, &self.root.join("tmp"))?;
            let stored = load::image(&path, id, &self.state().layers)?;
            self.state().images.insert(*id, Arc::new(stored));
        }
        let before = {
            let mut state = self.state();
            let before = state.references.clone();
            state.references.extend(references.into_iter().map(|reference| (reference, *id)));
            before
        };
        if let Err(error) = self.write_references() {
            self.state().references = before;
            return Err(error);
        }
        Ok(self.image(id))
    }

    /// The configuration of an image in the store, byte by byte.
    pub(crate) fn config(&self, id: &Digest) -> Option<Vec<u8>> {
        if !self.has_image(id) {
            return None;
        }
        let bytes = std::fs::read(self.image_path(id).join(IMAGE_CONFIG)).ok()?;
        (Digest::of(&bytes) == *id).then_some(bytes)
    }

    /// Keeps layers from being collected, whether they are there yet or not.
    pub(crate) fn pin(self: &Arc<Self>, layers: Vec<Digest>) -> Pins {
        let mut state = self.state();
        for layer in &layers {
            *state.pins.entry(*layer).or_default() += 1;
        }
        drop(state);
        Pins { store: self.clone(), layers }
    }

    /// Bytes and inodes of everything under the store's root.
    pub(crate) fn usage(&self) -> Result<Usage> {
        files::usage(&self.root)
    }

    fn write_references(&self) -> Result<()> {
        let record = record::References::new(&self.state().references);
        files::replace_record(&self.root.join(REFERENCES), &record, &self.root.join("tmp"))
    }

    fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.root.join("layers").join(diff_id.hex())
    }

    fn image_path(&self, id: &Digest) -> PathBuf {
        self.root.join("images").join(id.hex())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An image whose files are made, but not yet in the store.
pub(crate) struct MadeImage {
    pub(crate) record: ImageRecord,
    /// The configuration, byte by byte.
    pub(crate) config: Vec<u8>,
    /// Holds the root file system's own file.
    pub(crate) directory: TempDir,
}

/// Layers that stay as long as this lives.
#[derive(Debug)]
pub(crate) struct Pins {
    store: Arc<Store>,
    layers: Vec<Digest>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut state = self.store.state();
        for layer in &self.layers {
            if let Some(count) = state.pins.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    state.pins.remove(layer);
                }
            }
        }
    }
}

/// Seconds since the epoch, for records.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
