//! Reading directories.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::sync::PoisonError;

use fuse_backend_rs::api::filesystem::DirEntry;
use rustix::fs::{FileType, RawDir, SeekFrom, fstatfs, seek};

use super::handles::Handle;

/// Most bytes of a directory taken from the host at once.
const CHUNK: usize = 32 * 1024;
/// Least that any entry fits into.
const CHUNK_LEAST: usize = 512;

/// An entry as the host has it.
#[derive(Debug)]
pub struct HostEntry<'a> {
    /// Its name.
    pub name: &'a CStr,
    inode: u64,
    kind: FileType,
    /// Where the entry after it begins.
    next: u64,
}

impl HostEntry<'_> {
    /// Whether it is the directory itself or the one above.
    pub fn is_dot(&self) -> bool {
        matches!(self.name.to_bytes(), b"." | b"..")
    }

    /// Its inode number. What lies above a volume is not told of.
    pub fn inode(&self, directory: u64) -> u64 {
        if self.is_dot() { directory } else { self.inode }
    }

    /// In the protocol's words.
    pub fn of_protocol(&self) -> DirEntry<'_> {
        let kind = match self.kind {
            FileType::RegularFile => libc::DT_REG,
            FileType::Directory => libc::DT_DIR,
            FileType::Symlink => libc::DT_LNK,
            FileType::Fifo => libc::DT_FIFO,
            FileType::Socket => libc::DT_SOCK,
            FileType::CharacterDevice => libc::DT_CHR,
            FileType::BlockDevice => libc::DT_BLK,
            FileType::Unknown => libc::DT_UNKNOWN,
        };
        DirEntry { ino: self.inode, offset: self.next, type_: kind.into(), name: self.name.to_bytes() }
    }
}

/// Shows the entries from `offset` on to `add`, about `size` bytes of them, until it has no
/// more room and returns 0.
pub fn read(
    handle: &Handle,
    size: u32,
    offset: u64,
    mut add: impl FnMut(HostEntry<'_>) -> io::Result<usize>,
) -> io::Result<()> {
    let mut buffer = vec![MaybeUninit::uninit(); (size as usize).clamp(CHUNK_LEAST, CHUNK)];
    let _position = handle.position.lock().unwrap_or_else(PoisonError::into_inner);
    seek(&handle.file, SeekFrom::Start(offset))?;
    let mut entries = RawDir::new(&handle.file, &mut buffer);
    let mut first = true;
    loop {
        // One call of the host's is enough for one answer.
        if !first && entries.is_buffer_empty() {
            return Ok(());
        }
        let Some(entry) = entries.next() else { return Ok(()) };
        let entry = entry?;
        let added = add(HostEntry {
            name: entry.file_name(),
            inode: entry.ino(),
            kind: entry.file_type(),
            next: entry.next_entry_cookie(),
        });
        match added {
            Ok(0) => return Ok(()),
            Ok(_) => first = false,
            // What was added counts; the error comes again with the next request.
            Err(_) if !first => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Whether closing a file on this file system does nothing that could fail.
pub fn is_local(file: &File) -> bool {
    /// ext4, XFS, Btrfs, tmpfs, overlay, F2FS: `statfs(2)`.
    const LOCAL: [i64; 6] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x794c_7630, 0xf2f5_2010];
    fstatfs(file).is_ok_and(|stat| LOCAL.contains(&stat.f_type))
}
