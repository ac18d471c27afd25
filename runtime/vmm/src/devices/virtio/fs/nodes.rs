//! The files that the guest knows.
//!
//! A node is a file that the guest has looked up, held by an `O_PATH` descriptor until the guest
//! has forgotten it as often as it was told of it. While the descriptor is open the host gives
//! the inode's number to no other file, so a number that is in the table means the file that it
//! meant before.
//!
//! A file is one node, whichever volumes it was reached through, so that the guest's kernel has
//! one inode for it: sockets, pipes, locks, mapped memory and watches are found by that. The
//! descriptor is of one mount, of those that lead to the file: one that can be written by, where
//! any can.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use fuse_backend_rs::api::filesystem::ROOT_ID;
use rustix::fs::{FileType, Stat, Statx};

use super::numbers::Numbers;
use super::places::{Volume, Way};

/// Where on the host a file was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Number of the mount.
    pub mount: u64,
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// What makes two files the same, see [`Volume::identity`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Of a directory: the place that it was reached from.
    pub place: u64,
    /// Of a directory below a place with mounts: the number of its mount.
    pub mount: u64,
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// A file that is held, by one of the mounts that lead to it.
#[derive(Debug)]
pub struct Held {
    /// By `O_PATH`.
    file: Arc<OwnedFd>,
    /// Number of the mount.
    pub mount: u64,
    /// What led there.
    pub volume: Arc<Volume>,
    /// Whether the mount can be written by.
    pub writable: bool,
}

impl Held {
    /// `file`, which was opened through a volume.
    pub fn new(file: OwnedFd, mount: u64, volume: Arc<Volume>) -> Self {
        let writable = !volume.read_only(mount);
        Self { file: Arc::new(file), mount, volume, writable }
    }

    /// The same for another volume that leads there, too.
    pub fn through(&self, volume: Arc<Volume>) -> Self {
        Self { file: self.file.clone(), volume, ..*self }
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (*self.file).as_fd()
    }
}

/// A file that the guest knows.
#[derive(Debug)]
pub struct Node {
    /// Its number towards the guest; never given to another file.
    pub id: u64,
    /// What kind of file it is; that does not change.
    pub kind: FileType,
    /// Which file it is.
    pub identity: Identity,
    reach: RwLock<Reach>,
    /// What it was like when it was opened last.
    seen: Mutex<Option<Version>>,
}

/// How a file is reached.
#[derive(Debug)]
struct Reach {
    held: Arc<Held>,
    /// Few: one for each place that it was reached from.
    ways: Vec<Way>,
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
    fn new(id: u64, kind: FileType, identity: Identity, held: Arc<Held>) -> Self {
        let ways = vec![held.volume.way(held.mount)];
        Self { id, kind, identity, reach: RwLock::new(Reach { held, ways }), seen: Mutex::new(None) }
    }

    fn reach<T>(&self, look: impl FnOnce(&Reach) -> T) -> T {
        look(&self.reach.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// What it is held by.
    pub fn held(&self) -> Arc<Held> {
        self.reach(|reach| reach.held.clone())
    }

    /// Holds it by another mount.
    pub fn hold(&self, held: Arc<Held>) {
        let mut reach = self.reach.write().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut reach.held, held);
        drop(reach);
        drop(before);
    }

    /// Whether any volume leads there.
    pub fn reachable(&self) -> bool {
        self.reach(|reach| reach.ways.iter().any(Way::open))
    }

    /// Whether the guest may not change it.
    pub fn read_only(&self) -> bool {
        self.reach(|reach| !reach.ways.iter().any(Way::writable))
    }

    /// Whether a volume leads there.
    pub fn is_in(&self, volume: &Volume) -> bool {
        self.reach(|reach| reach.ways.iter().any(|way| way.from(&volume.place)))
    }

    /// Whether nothing is new in that it was reached through this mount of a volume.
    fn is_known(&self, volume: &Volume, mount: u64) -> bool {
        let (way, writable) = (volume.way(mount), !volume.read_only(mount));
        self.reach(|reach| {
            let held = &reach.held;
            let by = if held.writable == writable { held.mount == mount } else { held.writable && !held.volume.gone() };
            by && reach.ways.iter().any(|known| known.is(&way))
        })
    }

    /// Another way to it. It is held by that from now on, unless what holds it is better; or, if it is a volume's
    /// `beginning`, as good: what is below would have to follow.
    fn add(&self, held: Arc<Held>, beginning: bool) {
        let way = held.volume.way(held.mount);
        let mut reach = self.reach.write().unwrap_or_else(PoisonError::into_inner);
        if !reach.ways.iter().any(|known| known.is(&way)) {
            reach.ways.retain(Way::open);
            reach.ways.push(way);
        }
        let now = &reach.held;
        let as_good = now.writable == held.writable;
        let keep = !now.volume.gone() && if as_good { beginning } else { now.writable };
        let before = (!keep).then(|| std::mem::replace(&mut reach.held, held));
        drop(reach);
        drop(before);
    }

    /// Whether its content is what it was at the last call.
    pub fn unchanged(&self, now: Version) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.replace(now) == Some(now)
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
    ids: HashMap<Identity, u64, Numbers>,
}

#[derive(Debug)]
struct Entry {
    node: Arc<Node>,
    /// How often the guest was told of it and has not forgotten it.
    lookups: u64,
    /// How many volumes begin with it.
    roots: usize,
}

impl Table {
    fn new_id(&mut self) -> u64 {
        let id = self.next;
        self.next += 1;
        id
    }

    /// The node of this file, new or not.
    fn enter(
        &mut self,
        held: Arc<Held>,
        kind: FileType,
        identity: Identity,
        (beginning, limit): (bool, usize),
    ) -> io::Result<&mut Entry> {
        let known = self.ids.get(&identity).copied().filter(|id| self.nodes.contains_key(id));
        let id = match known {
            Some(id) => id,
            None if self.nodes.len() >= limit => return Err(io::Error::from_raw_os_error(libc::ENFILE)),
            None => self.new_id(),
        };
        self.ids.insert(identity, id);
        match self.nodes.entry(id) {
            std::collections::hash_map::Entry::Occupied(entry) => {
                let entry = entry.into_mut();
                entry.node.add(held, beginning);
                Ok(entry)
            }
            std::collections::hash_map::Entry::Vacant(entry) => {
                let node = Arc::new(Node::new(id, kind, identity, held));
                Ok(entry.insert(Entry { node, lookups: 0, roots: 0 }))
            }
        }
    }

    /// Takes out those that nothing asks for any more.
    fn take(&mut self, gone: impl Fn(&Entry) -> bool) -> Vec<(u64, Entry)> {
        let gone: Vec<_> = self.nodes.extract_if(|_, entry| gone(entry)).collect();
        for (_, entry) in &gone {
            self.ids.remove(&entry.node.identity);
        }
        gone
    }
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
        self.lock().new_id()
    }

    /// The node of this file if the guest knows it by this mount of a volume; it is told of it
    /// once more.
    pub fn find(&self, volume: &Volume, mount: u64, identity: Identity) -> Option<Arc<Node>> {
        let mut table = self.lock();
        let id = *table.ids.get(&identity)?;
        let entry = table.nodes.get_mut(&id)?;
        if !entry.node.is_known(volume, mount) {
            return None;
        }
        entry.lookups = entry.lookups.saturating_add(1);
        Some(entry.node.clone())
    }

    /// The node of this file, new or not; the guest is told of it once more.
    ///
    /// # Errors
    /// `ENFILE` if the guest knows too many, `ESTALE` if the volume has gone.
    pub fn enter(&self, held: Held, kind: FileType, identity: Identity) -> io::Result<Arc<Node>> {
        let mut table = self.lock();
        if held.volume.gone() {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        let entry = table.enter(held.into(), kind, identity, (false, self.limit))?;
        entry.lookups = entry.lookups.saturating_add(1);
        Ok(entry.node.clone())
    }

    /// The node of a file that a volume begins with, which stays until [`Self::end_volume`].
    ///
    /// # Errors
    /// `ENFILE` if the guest knows too many.
    pub fn begin_volume(&self, held: Arc<Held>, kind: FileType, identity: Identity) -> io::Result<Arc<Node>> {
        let mut table = self.lock();
        let entry = table.enter(held, kind, identity, (true, self.limit))?;
        entry.roots += 1;
        Ok(entry.node.clone())
    }

    /// The guest is told of a node that it may have forgotten, which a volume begins with.
    pub fn tell(&self, id: u64) {
        if let Some(entry) = self.lock().nodes.get_mut(&id) {
            entry.lookups = entry.lookups.saturating_add(1);
        }
    }

    /// The guest forgets that it was told of a node `count` times.
    pub fn forget(&self, id: u64, count: u64) {
        let mut table = self.lock();
        let Some(entry) = table.nodes.get_mut(&id) else { return };
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups == 0
            && entry.roots == 0
            && let Some(Entry { node, .. }) = table.nodes.remove(&id)
        {
            table.ids.remove(&node.identity);
            // Closing may take a while; nobody should wait for it.
            drop(table);
        }
    }

    /// A volume no longer begins with this node; lets go of all nodes that no volume leads to.
    pub fn end_volume(&self, id: u64) {
        let mut table = self.lock();
        if let Some(entry) = table.nodes.get_mut(&id) {
            entry.roots = entry.roots.saturating_sub(1);
        }
        let gone = table
            .take(|entry| entry.roots == 0 && (entry.node.id == id && entry.lookups == 0 || !entry.node.reachable()));
        drop(table);
        drop(gone);
    }

    /// Lets go of all nodes but those that volumes begin with: the guest's file system has ended.
    pub fn clear(&self) {
        let mut table = self.lock();
        let gone = table.take(|entry| entry.roots == 0);
        table.nodes.values_mut().for_each(|entry| entry.lookups = 0);
        drop(table);
        drop(gone);
    }

    /// How many there are that no volume begins with.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.lock().nodes.values().filter(|entry| entry.roots == 0).count()
    }
}
