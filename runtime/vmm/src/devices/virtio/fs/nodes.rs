//! The files that the guest knows.
//!
//! A node is a file of a volume that the guest has looked up, held by an `O_PATH` descriptor
//! until the guest has forgotten it as often as it was told of it. While the descriptor is
//! open the host gives the inode's number to no other file, so a number that is in the table
//! means the file that it meant before.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::api::filesystem::ROOT_ID;
use rustix::fs::{FileType, Stat, Statx};

use super::numbers::Numbers;
use super::volumes::Volume;

/// What makes two files of a volume the same: the mount they are seen in, the device, the
/// inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Number of the mount, for one file may be writable in one and not in another.
    pub mount: u64,
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// A file that the guest knows.
#[derive(Debug)]
pub struct Node {
    /// Its number towards the guest; never given to another file.
    pub id: u64,
    /// Where it belongs.
    pub volume: Arc<Volume>,
    /// Held by `O_PATH`.
    file: OwnedFd,
    /// What kind of file it is; that does not change.
    pub kind: FileType,
    /// Which file it is.
    pub identity: Identity,
    /// What it was like when it was opened last.
    seen: Mutex<Option<Version>>,
}

/// What tells whether the content of a file has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, u64),
}

impl From<Stat> for Version {
    fn from(stat: Stat) -> Self {
        Self { size: stat.st_size as u64, modified: (stat.st_mtime, stat.st_mtime_nsec) }
    }
}

impl From<Statx> for Version {
    fn from(stat: Statx) -> Self {
        Self { size: stat.stx_size, modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec.into()) }
    }
}

impl Node {
    /// A node for `file`.
    pub fn new(id: u64, volume: Arc<Volume>, file: OwnedFd, kind: FileType, identity: Identity) -> Self {
        Self { id, volume, file, kind, identity, seen: Mutex::new(None) }
    }

    /// Whether the guest may change it.
    pub fn read_only(&self) -> bool {
        self.volume.read_only(self.identity.mount)
    }

    /// Whether its content is what it was at the last call.
    pub fn unchanged(&self, now: Version) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.replace(now) == Some(now)
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// All nodes.
#[derive(Debug)]
pub struct Nodes {
    table: Mutex<Table>,
    limit: usize,
}

#[derive(Debug)]
struct Table {
    next: u64,
    nodes: HashMap<u64, Entry, Numbers>,
    ids: HashMap<(u64, Identity), u64, Numbers>,
}

#[derive(Debug)]
struct Entry {
    node: Arc<Node>,
    /// How often the guest was told of it and has not forgotten it.
    lookups: u64,
}

impl Nodes {
    /// None yet, and never more than `limit`.
    pub fn new(limit: usize) -> Self {
        let table = Table { next: ROOT_ID + 1, nodes: HashMap::default(), ids: HashMap::default() };
        Self { table: Mutex::new(table), limit }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node of this number.
    pub fn get(&self, id: u64) -> Option<Arc<Node>> {
        self.lock().nodes.get(&id).map(|entry| entry.node.clone())
    }

    /// A number that no file has or had.
    pub fn new_id(&self) -> u64 {
        let mut table = self.lock();
        let id = table.next;
        table.next += 1;
        id
    }

    /// The node of this file if the guest knows it; it is told of it once more.
    pub fn find(&self, volume: &Volume, identity: Identity) -> Option<Arc<Node>> {
        let mut table = self.lock();
        let id = *table.ids.get(&(volume.id, identity))?;
        let entry = table.nodes.get_mut(&id)?;
        entry.lookups = entry.lookups.saturating_add(1);
        Some(entry.node.clone())
    }

    /// The node of this file, new or not; the guest is told of it once more.
    ///
    /// # Errors
    /// `ENFILE` if the guest knows too many, `ESTALE` if the volume has gone.
    pub fn enter(
        &self,
        volume: &Arc<Volume>,
        file: OwnedFd,
        kind: FileType,
        identity: Identity,
    ) -> io::Result<Arc<Node>> {
        let mut table = self.lock();
        let known = table.ids.get(&(volume.id, identity)).copied();
        if let Some(entry) = known.and_then(|id| table.nodes.get_mut(&id)) {
            entry.lookups = entry.lookups.saturating_add(1);
            return Ok(entry.node.clone());
        }
        if volume.gone() {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        if table.nodes.len() >= self.limit {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let id = table.next;
        table.next += 1;
        let node = Arc::new(Node::new(id, volume.clone(), file, kind, identity));
        table.nodes.insert(id, Entry { node: node.clone(), lookups: 1 });
        table.ids.insert((volume.id, identity), id);
        Ok(node)
    }

    /// The guest forgets that it was told of a node `count` times.
    pub fn forget(&self, id: u64, count: u64) {
        let mut table = self.lock();
        let Some(entry) = table.nodes.get_mut(&id) else { return };
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups == 0
            && let Some(Entry { node, .. }) = table.nodes.remove(&id)
        {
            table.ids.remove(&(node.volume.id, node.identity));
            // Closing may take a while; nobody should wait for it.
            drop(table);
        }
    }

    /// Lets go of all nodes of a volume.
    pub fn remove_volume(&self, volume: u64) {
        let mut table = self.lock();
        table.ids.retain(|(of, _), _| *of != volume);
        let gone: Vec<_> = table.nodes.extract_if(|_, entry| entry.node.volume.id == volume).collect();
        drop(table);
        drop(gone);
    }

    /// Lets go of all nodes: the guest's file system has ended.
    pub fn clear(&self) {
        let mut table = self.lock();
        table.ids.clear();
        let gone = std::mem::take(&mut table.nodes);
        drop(table);
        drop(gone);
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.lock().nodes.len()
    }
}
