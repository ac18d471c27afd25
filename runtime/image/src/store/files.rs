//! File operations that survive a crash.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use super::record::Versioned;
use crate::error::{Error, Result};

/// No record is larger.
const MAX_RECORD: u64 = 64 << 20;

/// What the store takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on the disk, in use or not.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
    /// The store's root, which identifies its file system.
    pub mount_point: PathBuf,
}

/// Makes a directory that only its owner may enter, unless it is there.
pub(super) fn make_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::store("make directory", path))
}

/// Writes a new file and puts it on the disk.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create_new(path).map_err(Error::store("create", path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::store("write", path))
}

pub(super) fn write_record(path: &Path, record: &impl Serialize) -> Result<()> {
    let bytes = serde_json::to_vec(record).map_err(|error| Error::store("write", path)(error.into()))?;
    write(path, &bytes)
}

/// Writes a record in place of the one in `path`, which stays whole until then.
pub(super) fn replace_record(path: &Path, record: &impl Serialize, tmp: &Path) -> Result<()> {
    let directory = tempfile::tempdir_in(tmp).map_err(Error::store("make a directory in", tmp))?;
    let new = directory.path().join("new");
    write_record(&new, record)?;
    fs::rename(&new, path).map_err(Error::store("replace", path))?;
    sync_parent(path)
}

/// A record of this version; none if there is no such file, if it cannot be read, or if another version wrote it.
pub(super) fn read_record<T: DeserializeOwned + Versioned>(path: &Path) -> Option<T> {
    if fs::metadata(path).ok()?.len() > MAX_RECORD {
        return None;
    }
    let record: T = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    record.is_current().then_some(record)
}

/// Gives what was made in `directory` its final name; what had that name, which nobody knows of, makes room.
pub(super) fn publish(directory: TempDir, path: &Path, tmp: &Path) -> Result<()> {
    sync(directory.path())?;
    discard(path, tmp)?;
    fs::rename(directory.path(), path).map_err(Error::store("publish", path))?;
    // Its name is gone, there is nothing left to remove.
    let _ = directory.keep();
    sync_parent(path)
}

/// Removes a directory so that a crash leaves all of it or, for the next [`empty`], a part in `tmp`.
pub(super) fn discard(path: &Path, tmp: &Path) -> Result<()> {
    let grave = tempfile::tempdir_in(tmp).map_err(Error::store("make a directory in", tmp))?;
    match fs::rename(path, grave.path().join("removed")) {
        Ok(()) => sync_parent(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::store("remove", path)(error)),
    }
    grave.close().map_err(Error::store("remove", path))
}

/// Removes everything in a directory.
pub(super) fn empty(directory: &Path) -> Result<()> {
    for path in entries(directory)? {
        let result = if path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        result.map_err(Error::store("remove", &path))?;
    }
    Ok(())
}

pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>();
    read().map_err(Error::store("list", directory))
}

pub(super) fn usage(root: &Path) -> Result<Usage> {
    let mut usage = Usage { bytes: 0, inodes: 0, mount_point: root.to_owned() };
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let metadata = match path.symlink_metadata() {
            Ok(metadata) => metadata,
            // Removed while we look.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::store("look at", &path)(error)),
        };
        usage.inodes += 1;
        usage.bytes += metadata.blocks() * 512;
        if metadata.is_dir() {
            match entries(&path) {
                Ok(entries) => pending.extend(entries),
                Err(Error::Store { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(usage)
}

fn sync_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), sync)
}

fn sync(directory: &Path) -> Result<()> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(Error::store("sync", directory))
}
