//! Which volumes there are. They come and go while the guest runs.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat2, readlinkat};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::handles::Handles;
use super::metrics::FsMetrics;
use super::nodes::{Held, Node, Nodes};
use super::passthrough::identify;
use super::places::{Access, Place, Volume};
use super::{directory, sys};

/// Longest name of a volume in bytes, as of a file.
const NAME_LIMIT: usize = 255;
/// Most volumes: more than the containers of a pod have mounts.
const VOLUME_LIMIT: usize = 4096;
/// Descriptors left to the rest of the VMM.
const RESERVED: u64 = 1024;

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

/// What a volume begins with.
#[derive(Debug)]
struct Root {
    node: Arc<Node>,
    held: Arc<Held>,
}

/// The volumes of a device, and what the guest knows and has open of them.
#[derive(Debug)]
pub struct Volumes {
    roots: RwLock<BTreeMap<String, Root>>,
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

    /// Gives the guest a directory or a file, below the device's root by this name. It is `plain` if nothing is mounted below
    /// it, now and later.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub fn add(&self, name: &str, file: OwnedFd, access: Access, plain: bool) -> Result<(), VolumeError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        if name.is_empty() || name.len() > NAME_LIMIT || !name.bytes().all(allowed) || matches!(name, "." | "..") {
            return Err(VolumeError::Name(name.into()));
        }
        let inspect = |source| VolumeError::Inspect { name: name.into(), source };
        let (found, stat) = identify(&file, c"").map_err(inspect)?;
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
        let same = |root: &&Root| {
            let identity = root.node.identity;
            root.held.volume.place.plain && (identity.device, identity.inode) == (found.device, found.inode)
        };
        let known = roots.values().find(same).filter(|_| plain).map(|root| root.held.volume.place.clone());
        let place = known.unwrap_or_else(|| Arc::new(Place::new(self.nodes.new_id(), plain)));
        let volume = Arc::new(Volume::new(place, access, found.mount));
        let identity = volume.identity(kind, &found);
        let held = Arc::new(Held::new(file, found.mount, volume.clone()));
        let node = self.nodes.begin_volume(held.clone(), kind, identity);
        let node = node.inspect_err(|_| volume.end()).map_err(inspect)?;
        roots.insert(name.to_owned(), Root { node, held });
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

    /// Takes a volume away; whatever the guest has open by no other is closed. One that is not there is fine.
    pub fn remove(&self, name: &str) {
        let mut roots = self.roots.write().unwrap_or_else(PoisonError::into_inner);
        let Some(root) = roots.remove(name) else { return };
        // First: a request in progress adds nothing after it has been cleared out.
        root.held.volume.end();
        let others = roots.values().filter(|other| other.node.id == root.node.id);
        if let Some(other) = others.max_by_key(|other| other.held.writable)
            && root.node.held().volume.gone()
        {
            root.node.hold(other.held.clone());
        }
        drop(roots);
        self.nodes.end_volume(root.node.id);
        self.handles.end_volume();
    }

    /// Has a node that was reached through a volume that has gone be held through another that leads there.
    fn hold_anew(&self, node: &Node) {
        let roots = self.roots.read().unwrap_or_else(PoisonError::into_inner);
        let (held, mut others) = (node.held(), Vec::new());
        others.extend(roots.values().filter(|root| node.is_in(&root.held.volume)).map(|root| &root.held));
        others.sort_by_key(|other| !other.writable);
        let Some(first) = others.first() else { return };
        let same = |other: &&&Arc<Held>| other.volume.place.id == held.volume.place.id;
        let found = others.iter().find(same).and_then(|root| {
            // Where it is by now below the place, which is the same for all volumes of that.
            let path = readlinkat(CWD, sys::path_of(held.as_fd()), Vec::new()).ok()?;
            let below = CString::new(path.as_bytes().strip_prefix(b"/").filter(|path| !path.is_empty())?).ok()?;
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let file = openat2(&***root, below, flags, Mode::empty(), resolve).ok()?;
            let (found, _) = identify(&file, c"").ok()?;
            let is_it = root.volume.identity(node.kind, &found) == node.identity;
            is_it.then(|| Held::new(file, found.mount, root.volume.clone()))
        });
        // What has no name any more stays what it is.
        node.hold(found.unwrap_or_else(|| held.through(first.volume.clone())).into());
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

    /// The root of the volume of this name; the guest is told of it once more.
    pub(super) fn root(&self, name: &[u8]) -> Option<Arc<Node>> {
        let name = std::str::from_utf8(name).ok()?;
        let roots = self.roots.read().unwrap_or_else(PoisonError::into_inner);
        let node = roots.get(name)?.node.clone();
        self.nodes.tell(node.id);
        Some(node)
    }

    /// The node of this number.
    ///
    /// # Errors
    /// `ESTALE` if there is none: its volume has gone.
    pub(super) fn node(&self, id: u64) -> io::Result<Arc<Node>> {
        let node = self.nodes.get(id).ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
        if node.held().volume.gone() {
            self.hold_anew(&node);
        }
        Ok(node)
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
