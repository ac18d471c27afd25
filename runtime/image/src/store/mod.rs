//! What is on the disk: layers, images, and the references that mean them.
//!
//! ```text
//! lock                     held by the one process that uses the store
//! references.json          every tag and digest, and the image it means
//! images/HEX/              an image, by the SHA-256 of its configuration
//!     image.json           its layers and when it came
//!     config.json          the configuration itself
//!     rootfs.erofs         the merged tree, first of the files of its disk
//!     layers.erofs         copies of its last layers, if there are more than a disk may have files
//! layers/HEX/              a layer, by the SHA-256 of its uncompressed archive
//!     layer.json           its length
//!     layer.erofs          its files' content, and their tree for a look at the layer alone
//!     tree                 its tree, for merging
//! manifests/HEX.json       what a digest of a repository leads to
//! partial/HEX              the beginning of a blob whose download was interrupted
//! tmp/                     what is being made
//! ```
//!
//! Everything is made in `tmp`, put on the disk, and renamed into place, an image after its layers, a reference after
//! its image; it is removed the other way round, its record first. So a crash leaves complete things, things without a
//! record, and `tmp`; [`Store::open`] removes the latter and what no reference leads to. What cannot be read or written
//! just now, and what another version wrote, stays: see [`pending`].
//!
//! The maps in memory are the truth while the store is open, under one mutex that is held for look-ups only and never
//! while the disk is touched. Changes are made one at a time, on blocking threads, under a second mutex.

mod collect;
mod files;
mod join;
mod load;
mod lock;
mod lookup;
mod manifests;
mod names;
mod partial;
mod pending;
mod record;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

use tempfile::TempDir;
use tokio::sync::watch;

pub use files::Usage;
pub(crate) use join::join;
pub(crate) use manifests::Kept;
pub(crate) use partial::Partial;
use pending::{Pending, Unusable, chain};
pub(crate) use record::{ImageRecord, LayerRecord};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layer::BuiltLayer;
use crate::manifest::ImageConfig;
use crate::reference::Reference;
use crate::tree::Tree;

pub(crate) const LAYER_IMAGE: &str = "layer.erofs";
const LAYER_TREE: &str = "tree";
const LAYER_RECORD: &str = "layer.json";
pub(crate) const ROOTFS: &str = "rootfs.erofs";
/// Copies of the last layers of a disk.
const JOINED: &str = "layers.erofs";
const IMAGE_RECORD: &str = "image.json";
const IMAGE_CONFIG: &str = "config.json";

/// A store that this process has to itself.
#[derive(Debug)]
pub(crate) struct Store {
    root: PathBuf,
    state: Mutex<State>,
    changes: Mutex<Pending>,
    /// Changes whenever a layer comes.
    arrivals: watch::Sender<()>,
    /// Not there while the store cannot be had: then it is empty, and cannot be changed.
    lock: OnceLock<lock::Lock>,
}

/// What is in the store.
#[derive(Debug, Default)]
struct State {
    images: BTreeMap<Digest, Arc<Stored>>,
    /// May lead to images that cannot be used now.
    references: BTreeMap<Reference, Digest>,
    /// Images that stay although no reference leads to them, because theirs were lost.
    unnamed: BTreeSet<Digest>,
    layers: HashMap<Digest, Layer>,
    /// Layers that a pull counts on, and by how many pulls.
    pins: HashMap<Digest, usize>,
    /// Blobs whose beginnings downloads have.
    partial: HashSet<Digest>,
    /// When to look again at what cannot be read now, if there is such.
    again: Option<Instant>,
}

/// An image, its record and its configuration.
#[derive(Debug)]
struct Stored {
    record: ImageRecord,
    config: ImageConfig,
    size: u64,
    directory: PathBuf,
    /// The files of its disk.
    rootfs: Vec<PathBuf>,
}

/// A layer and its record.
#[derive(Debug, Clone)]
struct Layer {
    record: LayerRecord,
    directory: PathBuf,
}

impl Store {
    /// Opens the store in `root`, which is made if need be, and cleans up what a crash left.
    ///
    /// # Errors
    /// Only if another process has it. All else is tried again with the next change.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).map_err(Error::store("find", root))?;
        let store = Self {
            root,
            state: Mutex::default(),
            changes: Mutex::default(),
            arrivals: watch::Sender::default(),
            lock: OnceLock::default(),
        };
        let opened = store.change().and_then(|mut pending| store.collect(&mut pending));
        match opened {
            Err(error @ Error::Locked { .. }) => return Err(error),
            Err(error) => tracing::warn!(error = chain(&error), "not all of the images can be used or removed now"),
            Ok(()) => {}
        }
        Ok(store)
    }

    /// A directory for what is being made, removed with the handle.
    pub(crate) fn temporary(&self) -> Result<TempDir> {
        if self.lock.get().is_none() {
            drop(self.change()?);
        }
        let tmp = self.root.join("tmp");
        files::make_directory(&tmp)?;
        tempfile::Builder::new().prefix("").tempdir_in(&tmp).map_err(Error::store("make a directory in", &tmp))
    }

    pub(crate) fn layer(&self, diff_id: &Digest) -> Option<LayerRecord> {
        self.state().layers.get(diff_id).map(|layer| layer.record)
    }

    /// The tree of a layer in the store.
    pub(crate) fn tree(&self, diff_id: &Digest) -> Result<Tree> {
        let layer = self.state().layers.get(diff_id).cloned();
        let layer = layer.ok_or_else(|| Error::corrupt(format!("layer {diff_id}"), "it vanished from the store"))?;
        let path = layer.directory.join(LAYER_TREE);
        let bytes = files::read(&path, layer.record.tree_bytes)?;
        let tree: Option<Tree> = bytes.and_then(|bytes| postcard::from_bytes(&bytes).ok());
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
        let mut pending = self.change()?;
        if self.layer(&diff_id).is_none() {
            let place = pending.place(self.root.join("layers").join(diff_id.hex()))?;
            files::publish(directory, &place)?;
            self.state().layers.insert(diff_id, Layer { record, directory: place });
            self.arrivals.send_replace(());
        }
        Ok(())
    }

    /// Tells whenever a layer comes from now on.
    pub(crate) fn arrivals(&self) -> watch::Receiver<()> {
        self.arrivals.subscribe()
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
        let mut pending = self.change()?;
        let new = !self.has_image(id);
        if new {
            let Some(made) = made else { return Ok(None) };
            let place = pending.place(self.root.join("images").join(id.hex()))?;
            files::publish(made.directory, &place)?;
            pending.images.insert(place, Unusable::new(*id));
            self.load_images(&mut pending);
            if !self.has_image(id) {
                return Err(Error::corrupt(format!("image {id}"), "it cannot be read back from the store"));
            }
        }
        let mut next = self.names();
        next.references.extend(references.into_iter().map(|reference| (reference, *id)));
        next.unnamed.remove(id);
        // What is as it was needs no room.
        if next != self.names()
            && let Err(error) = self.write_names(&mut pending, next)
        {
            if new {
                let _ = self.drop_image(&mut pending, id);
            }
            return Err(error);
        }
        if new && let Err(error) = self.collect(&mut pending) {
            tracing::debug!(error = chain(&error), "what is old stays for now");
        }
        Ok(self.image(id))
    }

    /// The configuration of an image in the store, byte by byte.
    pub(crate) fn config(&self, id: &Digest) -> Option<Vec<u8>> {
        let unread = self.state().again.is_some();
        if unread {
            // A pull is when it matters. What it cannot do will be said by what needs it.
            drop(self.change());
        }
        let stored = self.state().images.get(id).cloned()?;
        let bytes = files::read(&stored.directory.join(IMAGE_CONFIG), files::MAX_RECORD).ok()??;
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

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
