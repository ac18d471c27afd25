//! Layers whose download was interrupted: their bytes as the registry has them, for the next attempt to go on from.
//!
//! `partial/HEX` holds the beginning of the blob with that digest. Nothing says that it is right but the digest of the
//! whole, which whoever goes on from it checks; so it needs no sync, and what turns out wrong is fetched anew. A layer
//! that is fetched for the first time is written here, too: a process that ends has no time to. It goes with its layer's
//! end, or after a day, or when space is short.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags};

use super::collect::{KEEP, is_old};
use super::{Store, files};
use crate::digest::Digest;
use crate::error::Result;

const PARTIAL: &str = "partial";
/// What is smaller is sooner fetched than found again.
const LEAST: u64 = 1 << 20;
/// How many times a layer's size must be free for its bytes to be kept beside what is made of them.
const ROOM: u64 = 4;

/// The beginning of a blob, which one download at a time has.
#[derive(Debug)]
pub(crate) struct Partial {
    store: Arc<Store>,
    digest: Digest,
    path: PathBuf,
    /// None when it could not be written.
    file: Option<File>,
    /// Bytes that are there, and how many of them were read.
    length: u64,
    read: u64,
    keep: bool,
}

impl Store {
    /// What is there of a blob of `size` bytes, to be gone on from. None if it is not worth the while, or another
    /// download has it.
    pub(crate) fn partial(self: &Arc<Self>, digest: &Digest, size: u64) -> Option<Partial> {
        let directory = self.root.join(PARTIAL);
        if size < LEAST || self.free().is_none_or(|free| free / ROOM < size) {
            return None;
        }
        if !self.state().partial.insert(*digest) {
            return None;
        }
        let path = directory.join(digest.hex());
        let opened = files::make_directory(&directory).and_then(|()| {
            let file = files::open(&path, OFlags::RDWR | OFlags::CREATE, Mode::RUSR | Mode::WUSR);
            file.and_then(|file| {
                let mut length = file.metadata()?.len();
                if length > size {
                    file.set_len(0)?;
                    length = 0;
                }
                Ok((file, length))
            })
            .map_err(crate::error::Error::store("open", &path))
        });
        match opened {
            Ok((file, length)) => Some(Partial {
                store: self.clone(),
                digest: *digest,
                path,
                file: Some(file),
                length,
                read: 0,
                keep: true,
            }),
            Err(error) => {
                tracing::debug!(%error, "an interrupted download will begin anew");
                self.state().partial.remove(digest);
                None
            }
        }
    }

    /// Removes what no download has: all of it, or what is old.
    pub(super) fn collect_partial(&self, all: bool) -> Result<()> {
        let mut result = Ok(());
        for path in files::entries(&self.root.join(PARTIAL))? {
            let name = path.file_name().and_then(|name| name.to_str());
            // What has another name is another version's.
            let Some(Ok(digest)) = name.map(Digest::from_hex) else { continue };
            let state = self.state();
            if !state.partial.contains(&digest) && (all || is_old(&path, SystemTime::now(), KEEP)) {
                result = result.and(files::remove_file(&path));
            }
        }
        result
    }
}

impl Partial {
    /// Bytes that are there.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Adds bytes at its end. Without room it is given up, which is no error.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        if let Some(file) = &mut self.file
            && let Err(error) = file.write_all(bytes)
        {
            tracing::debug!(%error, path = %self.path.display(), "an interrupted download will begin anew");
            self.file = None;
            self.keep = false;
            // The room is wanted now.
            let _ = files::remove_file(&self.path);
        }
    }

    /// Removes it in the end: it is of no use any more.
    pub(crate) fn discard(&mut self) {
        self.keep = false;
    }
}

/// Reads what was there at first.
impl Read for Partial {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.length - self.read).unwrap_or(usize::MAX);
        let wanted = left.min(buffer.len());
        let (Some(file), Some(buffer)) = (&mut self.file, buffer.get_mut(..wanted)) else { return Ok(0) };
        let count = file.read(buffer)?;
        if count == 0 && wanted > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read += count as u64;
        Ok(count)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let mut state = self.store.state();
        if !self.keep && self.file.is_some() {
            let _ = files::remove_file(&self.path);
        }
        state.partial.remove(&self.digest);
    }
}

/// Bytes that are free on the file system of `root`, and all of them.
pub(super) fn space(root: &Path) -> Option<(u64, u64)> {
    let found = rustix::fs::statvfs(root).ok()?;
    Some((found.f_bavail.saturating_mul(found.f_frsize), found.f_blocks.saturating_mul(found.f_frsize)))
}
