//! File operations that survive a crash, and follow no link.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::{NamedTempFile, TempDir};

use super::record;
use crate::error::{Error, Result};

/// No record and no configuration is larger.
pub(super) const MAX_RECORD: u64 = 64 << 20;

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

/// What something on the disk turned out to be, where it could be looked at. An error beside it says that it could
/// not be looked at *now*, and nothing about what it is.
#[derive(Debug)]
pub(super) enum Found<T> {
    /// Complete, and of this version.
    Whole(T),
    /// Not there.
    Absent,
    /// Cut short or damaged, of no use to anybody; and how that shows.
    Incomplete(String),
    /// Another version's, or not a store's at all; and how that shows.
    Foreign(String),
}

/// Makes a directory in the store that only its owner may enter, unless it is there.
pub(super) fn make_directory(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(Error::store("use", path)(io::ErrorKind::NotADirectory.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::DirBuilder::new().mode(0o700).create(path).map_err(Error::store("make directory", path))
        }
        Err(error) => Err(Error::store("look at", path)(error)),
    }
}

/// Opens a regular file, and nothing that a link leads to.
pub(super) fn open(path: &Path, flags: OFlags, mode: Mode) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, mode)?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(irregular()),
    }
}

fn irregular() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")
}

/// The content of a file of at most `limit` bytes; none if there is no such file.
pub(super) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let read = || {
        let mut bytes = Vec::new();
        open(path, OFlags::RDONLY, Mode::empty())?.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit { Err(io::Error::from(io::ErrorKind::FileTooLarge)) } else { Ok(bytes) }
    };
    match read() {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::store("read", path)(error)),
    }
}

/// A record of this version.
pub(super) fn read_record<T: DeserializeOwned>(path: &Path) -> Result<Found<T>> {
    Ok(read(path, MAX_RECORD)?.map_or(Found::Absent, |bytes| record::parse(&bytes)))
}

/// Length of a regular file; none if there is none.
pub(super) fn length(path: &Path) -> Result<Option<u64>> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_file() => Ok(Some(metadata.len())),
        Ok(_) => Err(Error::store("use", path)(irregular())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::store("look at", path)(error)),
    }
}

/// Writes a new file and puts it on the disk.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file =
        File::options().write(true).create_new(true).mode(0o600).open(path).map_err(Error::store("create", path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::store("write", path))
}

pub(super) fn write_record(path: &Path, record: &impl Serialize) -> Result<()> {
    let bytes = serde_json::to_vec(record).map_err(|error| Error::store("write", path)(error.into()))?;
    write(path, &bytes)
}

/// Writes a record in place of the one in `path`, which stays whole until then.
pub(super) fn replace_record(path: &Path, record: &impl Serialize, tmp: &Path) -> Result<()> {
    make_directory(tmp)?;
    let bytes = serde_json::to_vec(record).map_err(|error| Error::store("write", path)(error.into()))?;
    let mut new = NamedTempFile::new_in(tmp).map_err(Error::store("make a file in", tmp))?;
    new.write_all(&bytes).and_then(|()| new.as_file().sync_all()).map_err(Error::store("write", path))?;
    new.persist(path).map_err(|error| Error::store("replace", path)(error.error))?;
    sync_parent(path)
}

/// Gives what was made in `directory` its final name, which nothing has.
pub(super) fn publish(directory: TempDir, path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        make_directory(parent)?;
    }
    sync(directory.path())?;
    fs::rename(directory.path(), path).map_err(Error::store("publish", path))?;
    // Its name is gone, there is nothing left to remove.
    let _ = directory.keep();
    sync_parent(path)
}

/// Removes a file, unless it is gone already.
pub(super) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::store("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Removes a file or a directory with everything in it, unless it is gone already.
pub(super) fn remove(path: &Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => return remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::store("remove", path)(error)),
        _ => Ok(()),
    }
}

/// The paths of everything in a directory; none if there is no such directory.
pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>();
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result.map_err(Error::store("list", directory)),
    }
}

/// What everything under `root` takes, but for what cannot be looked at.
pub(super) fn usage(root: &Path) -> Result<Usage> {
    let mut usage = Usage { bytes: 0, inodes: 0, mount_point: root.to_owned() };
    root.symlink_metadata().map_err(Error::store("look at", root))?;
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        // Removed while we look, or on a broken part of the disk: all the others count nevertheless.
        let Ok(metadata) = path.symlink_metadata() else { continue };
        usage.inodes += 1;
        usage.bytes += metadata.blocks() * 512;
        // The root itself may be a link.
        if metadata.is_dir() || path == root {
            match entries(&path) {
                Ok(entries) => pending.extend(entries),
                Err(error) => tracing::debug!(%error, "not counted"),
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
