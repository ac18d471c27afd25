//! Where volumes begin, and what leads from there to a file.
//!
//! A place is a directory or file of the host that volumes begin at. Volumes that begin at the
//! same one, and have nothing mounted below, show the same tree: they are one place, and each
//! directory in it is one to the guest. A volume with mounts below is a place of its own, for
//! below its directories there may be what is not below those of another.
//!
//! What a guest may do in a place is what any of its volumes allows: to its kernel a file is one,
//! by whichever of them it was reached, and the flags of its mounts keep its containers apart.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::FileType;

use super::nodes::{Found, Identity};

/// What the guest may do with a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Read and write.
    Write,
    /// Read; but write to file systems that are mounted below it.
    Read,
    /// Read, below mounts as well.
    ReadAll,
}

/// Where volumes begin.
#[derive(Debug)]
pub struct Place {
    /// Never given to another.
    pub id: u64,
    /// Whether nothing is mounted below, so that any number of volumes can begin here.
    pub plain: bool,
    volumes: AtomicUsize,
    writers: AtomicUsize,
}

impl Place {
    /// One that no volume begins at yet.
    pub fn new(id: u64, plain: bool) -> Self {
        Self { id, plain, volumes: AtomicUsize::new(0), writers: AtomicUsize::new(0) }
    }

    /// Whether no volume begins here any more.
    pub fn gone(&self) -> bool {
        self.volumes.load(Ordering::Acquire) == 0
    }
}

/// A directory or file of the host that the guest sees.
#[derive(Debug)]
pub struct Volume {
    /// Where it begins.
    pub place: Arc<Place>,
    access: Access,
    /// The mount that it begins in.
    mount: u64,
    gone: AtomicBool,
}

impl Volume {
    /// One more that begins at `place`.
    pub fn new(place: Arc<Place>, access: Access, mount: u64) -> Self {
        place.volumes.fetch_add(1, Ordering::AcqRel);
        if access == Access::Write {
            place.writers.fetch_add(1, Ordering::AcqRel);
        }
        Self { place, access, mount, gone: AtomicBool::new(false) }
    }

    /// Takes it away, once.
    pub fn end(&self) {
        if !self.gone.swap(true, Ordering::AcqRel) {
            if self.access == Access::Write {
                self.place.writers.fetch_sub(1, Ordering::AcqRel);
            }
            self.place.volumes.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Whether it has been taken away.
    pub fn gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Whether the guest may not change files by way of this mount.
    pub fn read_only(&self, mount: u64) -> bool {
        match self.access {
            Access::Write => false,
            Access::Read => self.place.plain || mount == self.mount,
            Access::ReadAll => true,
        }
    }

    /// What makes a file the one that it is to the guest. A file is known by its place on the
    /// host's disks alone, whatever leads to it. The guest's kernel has one name for a
    /// directory, so one that is reached in two ways is one for each of them.
    pub fn identity(&self, kind: FileType, found: &Found) -> Identity {
        let (place, mount) = match kind {
            FileType::Directory if self.place.plain => (self.place.id, 0),
            FileType::Directory => (self.place.id, found.mount),
            _ => (0, 0),
        };
        Identity { place, mount, device: found.device, inode: found.inode }
    }

    /// The way to a file that was found in this mount.
    pub fn way(&self, mount: u64) -> Way {
        Way { place: self.place.clone(), writable: !self.place.plain && !self.read_only(mount) }
    }
}

/// What leads to a file.
#[derive(Debug)]
pub struct Way {
    place: Arc<Place>,
    /// Of a place of one volume: whether the guest may write by its mount.
    writable: bool,
}

impl Way {
    /// Whether it is that one.
    pub fn is(&self, other: &Self) -> bool {
        self.place.id == other.place.id && self.writable == other.writable
    }

    /// Whether it still leads there.
    pub fn open(&self) -> bool {
        !self.place.gone()
    }

    /// Whether the guest may change what it leads to.
    pub fn writable(&self) -> bool {
        self.open() && (self.writable || self.place.plain && self.place.writers.load(Ordering::Acquire) > 0)
    }

    /// Whether it begins there.
    pub fn from(&self, place: &Place) -> bool {
        self.place.id == place.id
    }
}
