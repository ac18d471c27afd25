//! An image as the rest of the runtime sees it.

use std::fs::File;
use std::path::PathBuf;
use std::time::SystemTime;

use crate::error::{Error, Result};
use crate::manifest::ImageConfig;

/// An image in the store.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Digest of its configuration, `sha256:` and 64 digits: the same whichever registry it came from.
    pub id: String,
    /// Tags that mean it, each `HOST/PATH:TAG`, sorted.
    pub repo_tags: Vec<String>,
    /// Digests it was pulled by, each `HOST/PATH@sha256:…`, sorted.
    pub repo_digests: Vec<String>,
    /// Bytes it takes in the store, shared layers included; never 0.
    pub size: u64,
    /// What it says about its processes: user, environment, entrypoint, command, labels and so on.
    pub config: ImageConfig,
    /// When it was first pulled, to the second.
    pub pulled_at: SystemTime,
    pub(crate) rootfs: Vec<PathBuf>,
}

impl Image {
    /// The files that, one after the other, are the disk with the image's root file system (EROFS).
    ///
    /// Each is a whole number of 4096-byte blocks. None is ever changed; when the image is removed they are unlinked,
    /// and whoever has them open keeps them.
    #[must_use]
    pub fn rootfs_files(&self) -> Vec<PathBuf> {
        self.rootfs.clone()
    }

    /// Opens [`Image::rootfs_files`] for reading, in order. What is open survives the image's removal.
    ///
    /// # Errors
    /// [`Error::UnknownImage`] if the image was removed in the meantime, [`Error::Store`] if a file cannot be opened.
    pub fn open_rootfs(&self) -> Result<Vec<File>> {
        let open = |path: &PathBuf| {
            File::open(path).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => Error::UnknownImage { name: self.id.clone() },
                _ => Error::store("open", path)(error),
            })
        };
        self.rootfs.iter().map(open).collect()
    }
}
