//! The files that the guest has open.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::nodes::Node;
use super::numbers::Numbers;

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    /// What it was opened by.
    pub node: Arc<Node>,
    /// Whether it was opened for writing.
    pub writable: bool,
    /// The file.
    pub file: File,
    /// Held while a directory is read: the descriptor has one position.
    pub position: Mutex<()>,
}

impl Handle {
    /// Whether a volume still leads there that allows what it was opened for.
    fn is_allowed(&self) -> bool {
        if self.writable { !self.node.read_only() } else { self.node.reachable() }
    }
}

/// All of them.
#[derive(Debug)]
pub struct Handles {
    table: Mutex<Table>,
    limit: usize,
}

#[derive(Debug)]
struct Table {
    next: u64,
    handles: HashMap<u64, Arc<Handle>, Numbers>,
}

impl Handles {
    /// None yet, and never more than `limit`.
    pub fn new(limit: usize) -> Self {
        Self { table: Mutex::new(Table { next: 1, handles: HashMap::default() }), limit }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives an open file a number.
    ///
    /// # Errors
    /// `ENFILE` if the guest has too many open, `ESTALE` if the volume has gone.
    pub fn add(&self, node: &Arc<Node>, writable: bool, file: File) -> io::Result<u64> {
        let mut table = self.lock();
        let handle = Handle { node: node.clone(), writable, file, position: Mutex::new(()) };
        if !handle.is_allowed() {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        if table.handles.len() >= self.limit {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let id = table.next;
        table.next += 1;
        table.handles.insert(id, Arc::new(handle));
        Ok(id)
    }

    /// The open file of this number, if `node` was opened by it.
    ///
    /// # Errors
    /// `EBADF` if there is none.
    pub fn get(&self, id: u64, node: u64) -> io::Result<Arc<Handle>> {
        let found = self.lock().handles.get(&id).filter(|handle| handle.node.id == node).cloned();
        found.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Closes a file. One that is not open is fine: its volume may have gone.
    pub fn close(&self, id: u64, node: u64) {
        let mut table = self.lock();
        if table.handles.get(&id).is_some_and(|handle| handle.node.id == node) {
            let gone = table.handles.remove(&id);
            drop(table);
            drop(gone);
        }
    }

    /// Closes what no volume leads to any more, or none that it may be written by.
    pub fn end_volume(&self) {
        let mut table = self.lock();
        let gone: Vec<_> = table.handles.extract_if(|_, handle| !handle.is_allowed()).collect();
        drop(table);
        drop(gone);
    }

    /// Closes all files.
    pub fn clear(&self) {
        let gone = std::mem::take(&mut self.lock().handles);
        drop(gone);
    }

    /// How many are open.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.lock().handles.len()
    }
}
