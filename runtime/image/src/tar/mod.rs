//! A streaming reader of tar archives for hostile input.
//!
//! Understands what image builders write: ustar, GNU (long names, base-256 numbers, sparse files) and POSIX pax
//! (names, numbers, times with nanoseconds, `SCHILY.xattr.*`, sparse formats 0.0, 0.1 and 1.0). It keeps one entry's
//! metadata in memory, never its content, and each piece of metadata is bounded before it is read: a hostile
//! archive costs the time to read it and no more. Names are returned as they are; what they may be is decided by
//! whoever builds a tree from them.

mod extended;
mod header;
mod reader;
mod sparse;

pub(crate) use reader::Reader;

use std::io;

/// One block: headers are one block, content is padded to a multiple of it.
pub(crate) const BLOCK: usize = 512;

/// The archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    /// It is not a tar archive, or a damaged one. Offsets are in bytes of the uncompressed archive.
    #[error("malformed tar archive at byte {offset}: {reason}")]
    Malformed { offset: u64, reason: &'static str },
    /// Something in it is larger than any honest archive needs.
    #[error("tar archive at byte {offset}: {reason}")]
    TooLarge { offset: u64, reason: &'static str },
    /// The stream below failed.
    #[error("cannot read the archive")]
    Read(#[source] io::Error),
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    HardLink { target: Vec<u8> },
    Symlink { target: Vec<u8> },
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Directory,
    Fifo,
}

/// A stretch of a sparse file that has content; the rest of the file is zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Bytes from the start of the file.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) length: u64,
}

/// One member of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// As in the archive: may be absolute, may hold `..`, is not empty.
    pub(crate) name: Vec<u8>,
    pub(crate) kind: EntryKind,
    /// Permission bits, set-id and sticky included.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the epoch, and nanoseconds below 10^9.
    pub(crate) mtime: (i64, u32),
    /// Full names and values, in no particular order; a name occurs once.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Size of the file in bytes, holes included; 0 for anything but a file.
    pub(crate) size: u64,
    /// Where the stored content belongs, ascending, without overlap, within `size`.
    pub(crate) extents: Vec<Extent>,
}
