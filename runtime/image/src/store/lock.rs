//! One process per store.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

use super::files;
use crate::error::{Error, Result};

/// Held until dropped, or until the process ends however it may.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of the store in `root`. Needs no room and no writable file system where the lock's file exists.
    pub(super) fn take(root: &Path) -> Result<Self> {
        let path = root.join("lock");
        let open = |flags| files::open(&path, flags | OFlags::CREATE, Mode::RUSR | Mode::WUSR);
        // A file system that became read-only lets it be locked all the same.
        let opened = open(OFlags::RDWR).or_else(|error| open(OFlags::RDONLY).map_err(|_| error));
        let mut file = opened.map_err(Error::store("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let _ = (&mut file).take(100).read_to_string(&mut holder);
                let holder: String = holder.trim().chars().filter(|c| !c.is_control()).collect();
                let holder = if holder.is_empty() { "another process".to_owned() } else { holder };
                return Err(Error::Locked { root: root.to_owned(), holder });
            }
            Err(error) => return Err(Error::store("lock", &path)(error.into())),
        }
        // Whoever can open it can keep the next daemon from starting.
        let private = std::fs::Permissions::from_mode(0o600);
        let _ = file.metadata().map(|metadata| match metadata.permissions().mode() & 0o077 {
            0 => Ok(()),
            _ => file.set_permissions(private),
        });
        // Only to tell somebody who is kept out, so a full disk does not matter; a wrong name would.
        let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
        let holder = format!("process {} ({})\n", std::process::id(), name.trim());
        let written = file.rewind().and_then(|()| file.write_all(holder.as_bytes()));
        if let Err(error) = written.and_then(|()| file.set_len(holder.len() as u64)) {
            tracing::debug!(%error, path = %path.display(), "cannot say who holds the lock");
            let _ = file.set_len(0);
        }
        Ok(Self { _file: file })
    }
}
