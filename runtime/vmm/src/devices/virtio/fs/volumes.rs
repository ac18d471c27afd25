//! Which volumes there are. They come and go while the guest runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::fs::FileType;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::directory;
use super::handles::Handles;
use super::metrics::FsMetrics;
use super::nodes::{Node, Nodes};
use super::passthrough::identify;

/// Longest name of a volume in bytes, as of a file.
const NAME_LIMIT: usize = 255;
/// Most volumes: more than the containers of a pod have mounts.
const VOLUME_LIMIT: usize = 4096;
/// Descriptors left to the rest of the VMM.
const RESERVED: u64 = 1024;

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

/// A directory or file of the host that the guest sees.
#[derive(Debug)]
pub struct Volume {
    /// Never given to another.
    pub id: u64,
    access: Access,
    /// The mount that it begins in.
    mount: u64,
    gone: AtomicBool,
}

impl Volume {
    /// Whether it has been taken away.
    pub fn gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Whether the guest may not change files that lie in this mount.
    pub fn read_only(&self, mount: u64) -> bool {
        match self.access {
            Access::Write => false,
            Access::Read => mount == self.mount,
            Access::ReadAll => true,
        }
    }
}

/// A volume that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// It would not be a file's name.
    #[error("{0:?} is no name for a volume: 1 to {NAME_LIMIT} of [A-Za-z0-9_.-], not \".\" and not \"..\"")]
    Name(String),
    /// There is one.
    #[error("there is a volume {0:?}")]
    Taken(String),
    /// Too many.
    #[error("there are {VOLUME_LIMIT} volumes, which is the most")]
    TooMany,
    /// Nothing that can be given to a guest.
    #[error("volume {0:?} is neither a directory nor a regular file")]
    Kind(String),
    /// It cannot be looked at.
    #[error("cannot look at volume {name:?}")]
    Inspect {
        /// Which.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// The volumes of a device, and what the guest knows and has open of them.
#[derive(Debug)]
pub struct Volumes {
    roots: RwLock<BTreeMap<String, Arc<Node>>>,
    pub(super) nodes: Nodes,
    pub(super) handles: Handles,
    pub(super) metrics: FsMetrics,
    /// Devices that files lie on, in the order they were seen.
    devices: RwLock<Vec<u64>>,
    /// Whether a close on them does nothing.
    local: RwLock<BTreeMap<u64, bool>>,
}

impl Volumes {
    /// None yet. This process gets as many descriptors as it may have: the guest keeps one for
    /// each file that it knows.
    #[must_use]
    pub fn new() -> Self {
        let descriptors = raise_descriptor_limit().saturating_sub(RESERVED);
        let limit = |of: u64| usize::try_from(of).unwrap_or(usize::MAX).max(16);
        // Most of what is known is not open.
        let handles = descriptors / 4;
        Self {
            roots: RwLock::default(),
            nodes: Nodes::new(limit(descriptors - handles)),
            handles: Handles::new(limit(handles)),
            metrics: FsMetrics::default(),
            devices: RwLock::default(),
            local: RwLock::default(),
        }
    }

    /// Gives the guest a directory or a file, below the device's root by this name.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub fn add(&self, name: &str, file: OwnedFd, access: Access) -> Result<(), VolumeError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        if name.is_empty() || name.len() > NAME_LIMIT || !name.bytes().all(allowed) || matches!(name, "." | "..") {
            return Err(VolumeError::Name(name.into()));
        }
        let inspect = |source| VolumeError::Inspect { name: name.into(), source };
        let (identity, stat) = identify(&file, c"").map_err(inspect)?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        if !matches!(kind, FileType::Directory | FileType::RegularFile) {
            return Err(VolumeError::Kind(name.into()));
        }
        let mut roots = self.roots.write().unwrap_or_else(PoisonError::into_inner);
        if roots.contains_key(name) {
            return Err(VolumeError::Taken(name.into()));
        }
        if roots.len() >= VOLUME_LIMIT {
            return Err(VolumeError::TooMany);
        }
        let id = self.nodes.new_id();
        let volume = Arc::new(Volume { id, access, mount: identity.mount, gone: AtomicBool::new(false) });
        roots.insert(name.to_owned(), Arc::new(Node::new(id, volume, file, kind, identity)));
        Ok(())
    }

    /// The names of those that are there, in order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.roots.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// What the device did so far.
    #[must_use]
    pub fn metrics(&self) -> &FsMetrics {
        &self.metrics
    }

    /// Takes a volume away; whatever the guest has open of it is closed. One that is not there
    /// is fine.
    pub fn remove(&self, name: &str) {
        let root = self.roots.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        if let Some(root) = root {
            // First: a request in progress adds nothing after it has been cleared out.
            root.volume.gone.store(true, Ordering::Release);
            self.nodes.remove_volume(root.volume.id);
            self.handles.remove_volume(root.volume.id);
        }
    }

    /// The inode number that the guest sees. To it all volumes are one file system, so the
    /// numbers of different devices are kept apart in the bits that are zero in nearly all.
    pub(super) fn inode(&self, device: u64, inode: u64) -> u64 {
        let position = |devices: &Vec<u64>| devices.iter().position(|known| *known == device);
        let known = position(&self.devices.read().unwrap_or_else(PoisonError::into_inner));
        let index = known.unwrap_or_else(|| {
            let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
            position(&devices).unwrap_or_else(|| {
                devices.push(device);
                devices.len() - 1
            })
        });
        inode ^ ((index as u64) << 48)
    }

    /// Whether closing a file on this device does nothing that could fail. `file` is on it.
    pub(super) fn is_local(&self, device: u64, file: &File) -> bool {
        let known = self.local.read().unwrap_or_else(PoisonError::into_inner).get(&device).copied();
        known.unwrap_or_else(|| {
            let local = directory::is_local(file);
            self.local.write().unwrap_or_else(PoisonError::into_inner).insert(device, local);
            local
        })
    }

    /// The root of the volume of this name.
    pub(super) fn root(&self, name: &[u8]) -> Option<Arc<Node>> {
        let name = std::str::from_utf8(name).ok()?;
        self.roots.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// The node of this number, a volume's root or another.
    ///
    /// # Errors
    /// `ESTALE` if there is none: its volume has gone.
    pub(super) fn node(&self, id: u64) -> io::Result<Arc<Node>> {
        if let Some(node) = self.nodes.get(id) {
            return Ok(node);
        }
        let roots = self.roots.read().unwrap_or_else(PoisonError::into_inner);
        let root = roots.values().find(|root| root.id == id).cloned();
        root.ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }
}

impl Default for Volumes {
    fn default() -> Self {
        Self::new()
    }
}

/// Raises the limit of open files as far as it goes; returns it.
fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // It cannot fail: it is between the current one and the highest.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    getrlimit(Resource::Nofile).current.unwrap_or(1 << 20)
}
