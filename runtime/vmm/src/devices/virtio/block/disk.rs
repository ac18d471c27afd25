//! The files a disk is made of.
//!
//! A read-only disk is the concatenation of its files, each padded with zeros to a multiple
//! of [`PADDING`] bytes, so that a file system's metadata and the layers it refers to can be
//! shared between disks. A writable disk is one file. Lengths are taken once: a file that
//! shrinks later gives read errors, one that grows changes nothing.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, fcntl_getfl, fdatasync, seek};
use rustix::io::Errno;

use crate::devices::virtio::chain::GuestBytes;
use crate::devices::virtio::workers::Way;

/// Bytes of a sector, the unit of every position on a disk.
pub const SECTOR: u64 = 512;
/// What the files of a read-only disk are padded to.
pub const PADDING: u64 = 4096;
/// What is written at once where the file system has no zeroes of its own.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Why files make no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is nothing to read.
    #[error("disk has no data: give it at least one file that is not empty")]
    Empty,
    /// Several files are one disk only if nothing is written to them.
    #[error("writable disk has {0} files: give it exactly one, or attach it read-only")]
    WritableParts(usize),
    /// The guest addresses whole sectors.
    #[error("writable disk has {0} bytes: extend the file to a multiple of 512")]
    UnevenSize(u64),
    /// It is longer than a disk can be.
    #[error("disk is longer than 2^63 bytes")]
    TooLong,
    /// A directory, pipe or socket.
    #[error("file {0} of the disk is neither a regular file nor a block device")]
    NotAFile(usize),
    /// The descriptor does not allow what the disk needs.
    #[error("file {index} of the disk is not open for {need}: open it with {flags}")]
    Access {
        /// Which of the files.
        index: usize,
        /// What is not allowed.
        need: &'static str,
        /// What would allow it.
        flags: &'static str,
    },
    /// The file could not be looked at.
    #[error("cannot look at file {index} of the disk")]
    Inspect {
        /// Which of the files.
        index: usize,
        /// Why.
        source: io::Error,
    },
}

/// One file and the range of the disk it backs.
#[derive(Debug)]
struct Part {
    file: File,
    start: u64,
    /// Bytes in the file; the rest up to `end` is zeros.
    length: u64,
    end: u64,
}

/// A disk: a read-only or writable run of sectors.
#[derive(Debug)]
pub struct Disk {
    parts: Vec<Part>,
    size: u64,
    read_only: bool,
    /// Whether nobody looks at it when its machine has ended.
    volatile: bool,
    id: [u8; 20],
    /// Whether its files were seen to lack the means to tell what of them is in memory.
    cannot_tell: AtomicBool,
    /// Whether the file system was seen to lack holes, or zeroed ranges.
    no_holes: AtomicBool,
    no_zero_range: AtomicBool,
}

impl Disk {
    /// The disk that `files` make, in order.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn new(files: Vec<File>, read_only: bool) -> Result<Self, DiskError> {
        if !read_only && files.len() != 1 {
            return Err(DiskError::WritableParts(files.len()));
        }
        let mut parts = Vec::with_capacity(files.len());
        let mut size = 0_u64;
        for (index, file) in files.into_iter().enumerate() {
            check_access(&file, index, read_only)?;
            let length = length(&file, index)?;
            let padded = if read_only { length.checked_next_multiple_of(PADDING) } else { Some(length) };
            let end = padded.and_then(|padded| size.checked_add(padded)).filter(|end| i64::try_from(*end).is_ok());
            let end = end.ok_or(DiskError::TooLong)?;
            if length > 0 {
                parts.push(Part { file, start: size, length, end });
            }
            size = end;
        }
        if size == 0 {
            return Err(DiskError::Empty);
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(DiskError::UnevenSize(size));
        }
        Ok(Self {
            parts,
            size,
            read_only,
            volatile: false,
            id: [0; 20],
            cannot_tell: AtomicBool::new(false),
            no_holes: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
        })
    }

    /// Gives the disk a name that the guest can ask for, cut to 20 bytes.
    #[must_use]
    pub fn with_id(mut self, id: &str) -> Self {
        self.id.fill(0);
        for (to, from) in self.id.iter_mut().zip(id.as_bytes()) {
            *to = *from;
        }
        self
    }

    /// Says whether nobody looks at the disk when its machine has ended. Then nothing has to be durable, and a flush,
    /// which orders what the guest reads back, has nothing to do: the host's kernel has it all.
    #[must_use]
    pub fn volatile(self, volatile: bool) -> Self {
        Self { volatile, ..self }
    }

    /// The disk's name, filled up with zero bytes.
    pub(super) fn id(&self) -> &[u8; 20] {
        &self.id
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the guest is refused writes.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The byte range of `length` bytes from `sector` on, or none if it is not all on the
    /// disk or not whole sectors.
    pub(super) fn range(&self, sector: u64, length: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(length)?;
        (end <= self.size && length.is_multiple_of(SECTOR)).then_some(start)
    }

    /// Reads the disk from `offset` on until `data` is full. The range is on the disk. Makes `way` for what is not in
    /// memory.
    pub(super) fn read(&self, mut offset: u64, data: &mut GuestBytes<'_>, way: &mut dyn Way) -> io::Result<()> {
        let first = self.parts.partition_point(|part| part.end <= offset);
        for part in self.parts.iter().skip(first) {
            if data.is_empty() {
                return Ok(());
            }
            let within = offset.saturating_sub(part.start);
            let here = (data.len() as u64).min(part.end - offset);
            let stored = part.length.saturating_sub(within).min(here);
            let cached = self.read_cached(part, within, stored, data)?;
            if cached < stored {
                way.make();
                if !data.read_from_file(part.file.as_fd(), within + cached, (stored - cached) as usize)? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            data.write_zeros((here - stored) as usize);
            offset += here;
        }
        if data.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Reads what the page cache has of these `length` bytes, from the first on. Returns how many.
    fn read_cached(&self, part: &Part, offset: u64, length: u64, data: &mut GuestBytes<'_>) -> io::Result<u64> {
        if length == 0 || self.cannot_tell.load(Ordering::Relaxed) {
            return Ok(0);
        }
        match data.read_cached_from_file(part.file.as_fd(), offset, length as usize) {
            Ok(count) => Ok(count as u64),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                self.cannot_tell.store(true, Ordering::Relaxed);
                Ok(0)
            }
            Err(error) => Err(error),
        }
    }

    /// Writes all of `data` to the disk at `offset`. The range is on the disk.
    pub(super) fn write(&self, offset: u64, data: &mut GuestBytes<'_>) -> io::Result<()> {
        let count = data.len();
        data.write_to_file(self.writable()?, offset, count)
    }

    /// Whether a flush has anything to do.
    pub(super) fn has_to_last(&self) -> bool {
        !self.read_only && !self.volatile
    }

    /// Makes all that was written durable, where it [has to](Self::has_to_last) be.
    pub(super) fn flush(&self) -> io::Result<()> {
        if !self.has_to_last() {
            return Ok(());
        }
        Ok(fdatasync(self.writable()?)?)
    }

    /// Gives the space of a range back if the file system can; its content is then zeros,
    /// otherwise it is left.
    pub(super) fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        if !self.no_holes.load(Ordering::Relaxed) && !self.punch(offset, length)? {
            self.no_holes.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Makes a range read as zeros, and gives its space back if `unmap` and the file system
    /// can.
    pub(super) fn write_zeroes(&self, mut offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        if unmap && !self.no_holes.load(Ordering::Relaxed) {
            if self.punch(offset, length)? {
                return Ok(());
            }
            self.no_holes.store(true, Ordering::Relaxed);
        }
        let file = self.writable()?;
        if !self.no_zero_range.load(Ordering::Relaxed) {
            match fallocate(file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, length) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                result => return Ok(result?),
            }
        }
        let end = offset + length;
        while offset < end {
            let count = (end - offset).min(ZEROS.len() as u64) as usize;
            match rustix::io::pwrite(file, &ZEROS[..count], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => offset += written as u64,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.no_zero_range.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Punches a hole. False if the file system has none.
    fn punch(&self, offset: u64, length: u64) -> io::Result<bool> {
        let file = self.writable()?;
        match fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn writable(&self) -> io::Result<BorrowedFd<'_>> {
        match self.parts.first() {
            Some(part) if !self.read_only => Ok(part.file.as_fd()),
            _ => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        }
    }
}

fn check_access(file: &File, index: usize, read_only: bool) -> Result<(), DiskError> {
    let flags = fcntl_getfl(file).map_err(|error| DiskError::Inspect { index, source: error.into() })?;
    let mode = flags & OFlags::RWMODE;
    if mode == OFlags::WRONLY || flags.contains(OFlags::PATH) {
        return Err(DiskError::Access { index, need: "reading", flags: "O_RDONLY or O_RDWR" });
    }
    if !read_only && mode != OFlags::RDWR {
        return Err(DiskError::Access { index, need: "writing", flags: "O_RDWR" });
    }
    if !read_only && flags.contains(OFlags::APPEND) {
        // It would turn every write into one at the end of the file.
        return Err(DiskError::Access { index, need: "writing in place", flags: "O_RDWR, without O_APPEND" });
    }
    Ok(())
}

fn length(file: &File, index: usize) -> Result<u64, DiskError> {
    let metadata = file.metadata().map_err(|source| DiskError::Inspect { index, source })?;
    if metadata.is_file() {
        Ok(metadata.len())
    } else if metadata.file_type().is_block_device() {
        seek(file, SeekFrom::End(0)).map_err(|error| DiskError::Inspect { index, source: error.into() })
    } else {
        Err(DiskError::NotAFile(index))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn files_are_padded_and_counted() {
        let disk = Disk::new(vec![file(&[1; 4097]), file(&[]), file(&[2; 4096]), file(&[3; 1])], true).unwrap();
        assert_eq!(disk.size(), 8192 + 4096 + 4096);
        let disk = Disk::new(vec![file(&[1; 1536])], false).unwrap();
        assert_eq!(disk.size(), 1536);
    }

    #[test]
    fn what_cannot_be_a_disk_is_refused_with_the_reason() {
        let error = |files, read_only| Disk::new(files, read_only).unwrap_err();
        assert!(matches!(error(vec![], true), DiskError::Empty));
        assert!(matches!(error(vec![file(&[])], true), DiskError::Empty));
        assert!(matches!(error(vec![file(&[])], false), DiskError::Empty));
        assert!(matches!(error(vec![], false), DiskError::WritableParts(0)));
        assert!(matches!(error(vec![file(&[1; 512]), file(&[1; 512])], false), DiskError::WritableParts(2)));
        assert!(matches!(error(vec![file(&[1; 513])], false), DiskError::UnevenSize(513)));
        assert!(matches!(error(vec![File::open("/").unwrap()], true), DiskError::NotAFile(0)));

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, [0; 512]).unwrap();
        let read_only = File::open(&path).unwrap();
        assert!(matches!(error(vec![read_only], false), DiskError::Access { need: "writing", .. }));
        let write_only = File::options().write(true).open(&path).unwrap();
        assert!(matches!(error(vec![write_only], true), DiskError::Access { need: "reading", .. }));
        let append = File::options().read(true).append(true).open(&path).unwrap();
        assert!(matches!(error(vec![append], false), DiskError::Access { need: "writing in place", .. }));
    }

    #[test]
    fn ranges_beyond_the_disk_are_none() {
        let disk = Disk::new(vec![file(&[1; 4096])], true).unwrap();
        assert_eq!(disk.range(0, 4096), Some(0));
        assert_eq!(disk.range(7, 512), Some(3584));
        assert_eq!(disk.range(8, 0), Some(4096));
        assert_eq!(disk.range(8, 512), None);
        assert_eq!(disk.range(0, 100), None);
        assert_eq!(disk.range(u64::MAX, 512), None);
        assert_eq!(disk.range(u64::MAX / 512, 512), None);
        assert_eq!(disk.range(0, u64::MAX - 511), None);
    }
}
