//! A record in memory and its file.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::{remove, write};
use crate::Result;

/// A record that is looked at without waiting for a disk: memory has its own lock, which nobody holds while something
/// is written.
#[derive(Debug)]
pub struct Stored<T> {
    path: PathBuf,
    value: Mutex<T>,
    /// Held by who writes the file.
    writing: Mutex<()>,
    /// Whether memory knows more than the file.
    changed: AtomicBool,
    /// Whether the file is not ours to write.
    kept: bool,
}

impl<T: Clone + Serialize> Stored<T> {
    /// A record that is not on disk as it is.
    pub fn new(path: PathBuf, value: T) -> Self {
        Self { changed: AtomicBool::new(true), ..Self::read(path, value) }
    }

    /// A record as it was read.
    pub fn read(path: PathBuf, value: T) -> Self {
        Self { path, value: Mutex::new(value), writing: Mutex::default(), changed: AtomicBool::new(false), kept: false }
    }

    /// What is known of a record whose file stays as it is.
    pub fn kept(path: PathBuf, value: T) -> Self {
        Self { kept: true, ..Self::read(path, value) }
    }

    /// To look at it, for as short as it takes.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy.
    pub fn get(&self) -> T {
        self.lock().clone()
    }

    /// Changes it in memory; [`Stored::save`] brings it to the disk.
    pub fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let mut value = self.lock();
        let result = change(&mut value);
        self.changed.store(true, Ordering::Relaxed);
        result
    }

    /// Writes it as it is now, if it was changed. Blocks.
    ///
    /// # Errors
    /// The disk does not take it. It can be tried again.
    pub fn save(&self) -> Result<()> {
        if self.kept {
            return Ok(());
        }
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.changed.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let value = self.get();
        write(&self.path, &value).inspect_err(|_| self.changed.store(true, Ordering::Relaxed))
    }

    /// Removes the file, unless it is not ours. Blocks.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self) -> Result<()> {
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        // Nothing that is still to be saved brings it back.
        self.changed.store(false, Ordering::Relaxed);
        remove(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn what_a_disk_refuses_stays_in_memory_and_is_written_later() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("missing");
        let stored = Stored::new(place.join("r.json"), BTreeMap::from([("a", 1)]));
        stored.save().unwrap_err();
        stored.change(|value| value.insert("b", 2));
        std::fs::create_dir(&place).unwrap();
        stored.save().unwrap();
        let before = std::fs::read(place.join("r.json")).unwrap();
        stored.save().unwrap();
        assert_eq!(std::fs::read(place.join("r.json")).unwrap(), before);
        stored.remove().unwrap();
        stored.remove().unwrap();
        assert!(!place.join("r.json").exists());
    }

    #[test]
    fn a_kept_file_is_never_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r.json");
        std::fs::write(&path, "of another").unwrap();
        let stored = Stored::kept(path.clone(), BTreeMap::from([("a", 1)]));
        stored.change(|value| value.insert("a", 2));
        stored.save().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"of another");
    }
}
