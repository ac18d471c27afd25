//! Container images on the host: pulled from registries, kept in a store, given to guests as disks.
//!
//! ```text
//! reference ─> registry ─> manifest, configuration            (registry, manifest)
//!                  └─ layers ─> verified, decompressed, read  (layer, tar)
//!                                 ├─> content ─> layer.erofs  (erofs)
//!                                 └─> tree ──┐                (tree)
//! store <── image, references <── rootfs.erofs <── merged trees of all layers
//! ```
//!
//! What comes from a registry is hostile. It is bounded ([`Limits`]), checked against its digests, and never becomes
//! a file, a name or a path on the host: a layer's archive goes straight into one EROFS image. Layers are merged by
//! metadata alone, so each lies on the disk once, whatever images use it, and a guest gets one read-only disk however
//! many layers an image has: the concatenation of [`Image::rootfs_files`].
//!
//! [`ImageStore`] is the handle; clones share the store. Its asynchronous methods need a tokio runtime, may be dropped
//! at any time, and hold no lock across an await. The others look things up in memory.

mod digest;
mod erofs;
mod error;
mod flight;
mod image;
mod layer;
mod limits;
mod manifest;
mod processors;
mod progress;
mod pull;
mod reference;
mod registry;
mod resolve;
mod store;
mod tar;
mod tree;
mod verify;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

pub use digest::{Digest, InvalidDigest};
pub use error::{Error, ErrorKind, Result};
pub use image::Image;
pub use limits::Limits;
pub use manifest::ImageConfig;
pub use progress::{LayerState, Progress};
pub use reference::{Reference, Target};
pub use registry::{Credentials, Endpoint, Login, Mirrors, Pace, default_endpoint, parse_duration};
pub use store::Usage;
pub use verify::Verifiers;

use flight::Flights;
use processors::Processors;
use pull::{Puller, blocking};
use store::Store;

/// Finds the servers of a registry: from the host in a reference to the endpoints to try, in order.
pub type Endpoints = Arc<dyn Fn(&str) -> Result<Vec<Endpoint>> + Send + Sync>;

/// How a store is opened.
#[derive(Clone)]
pub struct Options {
    /// Bounds of what is pulled.
    pub limits: Limits,
    /// Where registries are; asked at each pull, on a thread that may wait. See [`Mirrors`].
    pub endpoints: Endpoints,
    /// How slow a registry may be.
    pub pace: Pace,
    /// How many layers of one image are fetched at the same time; at least 1.
    pub downloads: usize,
    /// How many layers are taken in at the same time over all pulls, which share that fairly; None for one a processor.
    pub unpacks: Option<usize>,
    /// Who is asked whether an image may be pulled.
    pub verifiers: Option<Verifiers>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            endpoints: Arc::new(|host| Ok(vec![default_endpoint(host)])),
            pace: Pace::default(),
            downloads: 3,
            unpacks: None,
            verifiers: None,
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").field("limits", &self.limits).field("pace", &self.pace).finish_non_exhaustive()
    }
}

/// The images of this host. Cheap to clone; the store is closed with the last clone and the last pull.
#[derive(Debug, Clone)]
pub struct ImageStore {
    puller: Puller,
    options: Options,
}

impl ImageStore {
    /// Opens the store in the directory `root`, which is made if need be, with the default [`Options`].
    ///
    /// Removes what an interrupted run left behind. Takes the time of a few file operations per image.
    ///
    /// Needs no room on the disk, nor a disk that works: what cannot be read, written or removed now is said in the
    /// log, kept, and tried again at look-ups (a few seconds apart) and with each change. What another version of the
    /// store wrote is left alone, and not listed; a pull makes it anew beside it.
    ///
    /// # Errors
    /// [`Error::Locked`] if another process has it, [`Error::Store`] if `root` is no path.
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_with(root, Options::default())
    }

    /// As [`ImageStore::open`], with these options.
    ///
    /// # Errors
    /// As [`ImageStore::open`].
    pub fn open_with(root: &Path, options: Options) -> Result<Self> {
        let processors = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let puller = Puller {
            store: Arc::new(Store::open(root)?),
            limits: options.limits,
            pace: options.pace,
            downloads: options.downloads.max(1),
            processors: Processors::new(options.unpacks.unwrap_or_else(processors)),
            pulls: Arc::default(),
            verifiers: options.verifiers.clone(),
            flights: Flights::default(),
        };
        Ok(Self { puller, options })
    }

    /// Pulls an image, or makes sure that the one in the store is what the registry means now.
    ///
    /// `progress` is called from this future, and should be quick. When the future is dropped, what nobody else waits
    /// for is given up; layers that were complete are found by the next pull.
    ///
    /// # Errors
    /// See [`ErrorKind`]; passing failures of the network were retried already.
    pub async fn pull(
        &self,
        reference: &str,
        login: Option<Login>,
        progress: impl Fn(Progress) + Send + Sync,
    ) -> Result<Image> {
        let reference: Reference = reference.parse()?;
        let (endpoints, host) = (self.options.endpoints.clone(), reference.host().to_owned());
        let endpoints = blocking(reference.to_string(), move || endpoints(&host)).await?;
        self.puller.pull(&reference, &endpoints, login.as_ref(), &progress).await
    }

    /// All images, by id.
    #[must_use]
    pub fn list(&self) -> Vec<Image> {
        self.puller.store.images()
    }

    /// The image that `name` means: a tag or a digest in any spelling (`busybox`, `docker.io/library/busybox:latest`),
    /// an id with or without `sha256:`, or the start of exactly one id.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Image> {
        self.puller.store.find(name)
    }

    /// Removes the image that `name` means (as in [`ImageStore::get`]) with all its tags and digests, and the layers
    /// that no other image has. It is no error if there is none.
    ///
    /// An image in use may be removed: its files are unlinked, and whoever has them open keeps them.
    ///
    /// # Errors
    /// [`Error::Store`] if a file cannot be removed; the image stays, or what is left of it is removed with the next
    /// change.
    pub async fn remove(&self, name: &str) -> Result<()> {
        let (store, owned) = (self.puller.store.clone(), name.to_owned());
        blocking(name.to_owned(), move || store.remove(&owned).map(|_| ())).await
    }

    /// Bytes and inodes that the store takes. Looks at every file: a few per image and layer. One that cannot be looked
    /// at is not counted.
    ///
    /// # Errors
    /// [`Error::Store`] if the store's directory cannot be looked at.
    pub fn usage(&self) -> Result<Usage> {
        self.puller.store.usage()
    }
}
