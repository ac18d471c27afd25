//! One process per store.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Held until dropped, or until the process ends however it may.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of the store in `root`.
    pub(super) fn take(root: &Path) -> Result<Self> {
        let path = root.join("lock");
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(Error::store("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let holder = fs::read_to_string(&path).unwrap_or_default();
                let holder: String = holder.trim().chars().filter(|c| !c.is_control()).take(100).collect();
                let holder = if holder.is_empty() { "another process".to_owned() } else { holder };
                return Err(Error::Locked { root: root.to_owned(), holder });
            }
            Err(error) => return Err(Error::store("lock", &path)(error.into())),
        }
        let name = fs::read_to_string("/proc/self/comm").unwrap_or_default();
        let holder = format!("process {} ({})\n", std::process::id(), name.trim());
        let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(holder.as_bytes()));
        written.map_err(Error::store("write", &path))?;
        Ok(Self { _file: file })
    }
}
