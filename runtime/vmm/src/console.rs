//! The end of what a guest, or its VMM, has said, kept in a bounded file.
//!
//! The file is a ring that the VMM writes through a shared mapping, so that its contents outlive the VMM however that
//! ends. Layout: 8 bytes of magic, the number of bytes ever written (u64, little endian), zeros up to byte 64, then the
//! ring. There are two: of the guest's serial console, of [`SIZE`] bytes, and of the VMM's own messages, of
//! [`MESSAGES_SIZE`].
//!
//! What is in the file is hostile, and so may be what is at its path: both are read with that in mind.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::sys::SharedMap;

/// Size of the console's file in bytes.
pub const SIZE: usize = 64 * 1024;
/// Size of the file of the VMM's messages in bytes.
pub const MESSAGES_SIZE: usize = 16 * 1024;
const MAGIC: [u8; 8] = *b"naclcon1";
const TOTAL_OFFSET: usize = 8;
const HEADER: usize = 64;
/// A line is cut here when read, so that one line cannot flood a message.
const LINE_LIMIT: usize = 1024;

/// A ring's file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// It cannot be made.
    #[error("cannot create the ring {path}: it must not exist, and its directory must be writable")]
    Create {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be read.
    #[error("cannot read the ring {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is something else.
    #[error("{path} is no ring of a console or of messages")]
    Format {
        /// The file.
        path: PathBuf,
    },
}

/// The writing side of the ring.
#[derive(Debug)]
pub struct Ring {
    map: SharedMap,
    capacity: usize,
    total: u64,
    position: usize,
}

impl Ring {
    /// Creates the file of `size` bytes, which is one of the two, readable by its owner only; it must not exist. Its space is
    /// taken at once.
    pub fn create(path: &Path, size: usize) -> Result<Self, ConsoleError> {
        let open = || {
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
            file.set_len(size as u64)?;
            // A page that is not there yet, in a file system that is full by then, would end the process when the guest
            // says something.
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size as u64) {
                Ok(()) | Err(Errno::OPNOTSUPP) => SharedMap::new(&file, size),
                Err(error) => Err(error.into()),
            }
        };
        let map = open().map_err(|source| ConsoleError::Create { path: path.to_owned(), source })?;
        for (offset, byte) in MAGIC.into_iter().enumerate() {
            map.store(offset, byte);
        }
        Ok(Self { map, capacity: size.saturating_sub(HEADER), total: 0, position: 0 })
    }

    fn push(&mut self, byte: u8) {
        self.map.store(HEADER + self.position, byte);
        self.position = if self.position + 1 >= self.capacity { 0 } else { self.position + 1 };
        self.total = self.total.wrapping_add(1);
    }
}

impl Write for Ring {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.push(*byte);
        }
        self.map.store_u64(TOTAL_OFFSET, self.total);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The last `max_lines` lines that were written, oldest first. They may be hostile: control characters are dropped, other
/// bytes outside printable ASCII become `?`, and long lines are cut.
///
/// # Errors
/// If there is no such file at `path`. Links are not followed, and nothing but a regular file is waited for.
pub fn tail(path: &Path, max_lines: usize) -> Result<Vec<String>, ConsoleError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::InvalidData => ConsoleError::Format { path: path.to_owned() },
        _ => ConsoleError::Read { path: path.to_owned(), source },
    };
    open(path).and_then(|file| tail_of(&file, max_lines)).map_err(failed)
}

/// Opens the file at `path` for [`tail_of`], if it is a regular one.
///
/// # Errors
/// If it cannot be opened, or is something else, a link included.
pub fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(senseless()) }
}

/// As [`tail`], of a file that is open, wherever it is read at.
///
/// # Errors
/// What reading reports; [`io::ErrorKind::InvalidData`] if it is no such file.
pub fn tail_of(file: &File, max_lines: usize) -> io::Result<Vec<String>> {
    if !file.metadata()?.is_file() {
        return Err(senseless());
    }
    let mut content = vec![0; SIZE];
    let mut length = 0;
    while let Some(rest) = content.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, length as u64) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    content.truncate(length);
    unwind(&content, max_lines).ok_or_else(senseless)
}

fn senseless() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is no ring of a console or of messages")
}

/// The last lines of such a file; none if it is something else.
fn unwind(content: &[u8], max_lines: usize) -> Option<Vec<String>> {
    let (header, ring) = content.split_at_checked(HEADER)?;
    let (magic, rest) = header.split_first_chunk::<8>()?;
    let total = u64::from_le_bytes(*rest.first_chunk()?);
    if *magic != MAGIC || ![SIZE, MESSAGES_SIZE].contains(&content.len()) {
        return None;
    }
    let capacity = u64::try_from(ring.len()).ok()?;
    let wrapped = total > capacity;
    let position = usize::try_from(total % capacity).ok()?;
    let (newer, older) = ring.split_at_checked(position)?;
    let bytes = if wrapped || position == 0 && total > 0 { [older, newer].concat() } else { newer.to_vec() };
    Some(lines(&bytes, max_lines, wrapped))
}

fn lines(bytes: &[u8], max_lines: usize, cut_first: bool) -> Vec<String> {
    let skip = usize::from(cut_first);
    let mut lines: Vec<String> =
        bytes.split(|byte| *byte == b'\n').skip(skip).map(printable).filter(|line| !line.trim().is_empty()).collect();
    lines.split_off(lines.len().saturating_sub(max_lines))
}

/// Text that is safe to show on a terminal and in a log, escape sequences removed.
fn printable(line: &[u8]) -> String {
    let mut text = String::new();
    let mut bytes = line.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if text.len() >= LINE_LIMIT {
            text.push_str("...");
            break;
        }
        match byte {
            0x1b => skip_escape(&mut bytes),
            b'\t' => text.push(' '),
            0x20..=0x7e => text.push(char::from(byte)),
            0..=0x1f | 0x7f => {}
            _ => text.push('?'),
        }
    }
    text
}

/// Skips what follows an escape character: `[`, parameters and one final byte, or a
/// single byte.
fn skip_escape(bytes: &mut std::iter::Peekable<impl Iterator<Item = u8>>) {
    if bytes.next_if_eq(&b'[').is_some() {
        while bytes.next_if(|byte| matches!(byte, 0x20..=0x3f)).is_some() {}
        bytes.next_if(|byte| matches!(byte, 0x40..=0x7e));
    } else {
        bytes.next_if(|byte| matches!(byte, 0x30..=0x7e));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use proptest::prelude::*;

    fn written(pieces: &[&[u8]]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut ring = Ring::create(&path, SIZE).unwrap();
        for piece in pieces {
            ring.write_all(piece).unwrap();
        }
        (dir, path)
    }

    #[test]
    fn last_lines_come_back_in_order() {
        let (_dir, path) = written(&[b"one\ntwo\r\nthree\nunfinished"]);
        assert_eq!(tail(&path, 2).unwrap(), ["three", "unfinished"]);
        assert_eq!(tail(&path, 9).unwrap(), ["one", "two", "three", "unfinished"]);
    }

    #[test]
    fn a_wrapped_ring_keeps_the_newest() {
        let mut text = Vec::new();
        for number in 0..20_000 {
            writeln!(text, "line {number}").unwrap();
        }
        let (_dir, path) = written(&[&text]);
        let lines = tail(&path, usize::MAX).unwrap();
        assert_eq!(lines.last().unwrap(), "line 19999");
        let first: usize = lines[0].strip_prefix("line ").unwrap().parse().unwrap();
        assert_eq!(lines.len(), 20_000 - first, "no line is missing or cut");
        assert!(lines.len() > 5000);
    }

    #[test]
    fn a_full_but_unwrapped_ring_is_read_whole() {
        let (_dir, path) = written(&[&[b'x'; SIZE - HEADER - 2], b"\ny"]);
        assert_eq!(tail(&path, 1).unwrap(), ["y"]);
    }

    #[test]
    fn hostile_bytes_do_not_reach_a_terminal() {
        let (_dir, path) = written(&[b"\x1b[2J\x1b[31mred\x1b[0m\x07 \xff\x00 \x1b]0;title\x07end"]);
        assert_eq!(tail(&path, 1).unwrap(), ["red ? 0;titleend"]);
    }

    #[test]
    fn both_sizes_are_read_from_an_open_file_wherever_that_stands() {
        for size in [SIZE, MESSAGES_SIZE] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("ring");
            let mut ring = Ring::create(&path, size).unwrap();
            for number in 0..20_000 {
                writeln!(ring, "line {number}").unwrap();
            }
            let file = open(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            for _ in 0..2 {
                assert_eq!(tail_of(&file, 2).unwrap(), ["line 19998", "line 19999"]);
            }
        }
    }

    #[test]
    fn a_file_system_that_is_full_later_takes_all_that_a_ring_holds() {
        for size in [SIZE, MESSAGES_SIZE] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("ring");
            let _ring = Ring::create(&path, size).unwrap();
            let metadata = std::fs::metadata(&path).unwrap();
            assert!(metadata.blocks() * 512 >= size as u64, "{} blocks of {size} bytes", metadata.blocks());
        }
    }

    #[test]
    fn nothing_but_a_regular_file_is_opened_or_waited_for() {
        let (dir, path) = written(&[b"secret\n"]);
        let place = |name: &str| dir.path().join(name);
        std::os::unix::fs::symlink(&path, place("link")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, place("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(matches!(tail(&place("link"), 1), Err(ConsoleError::Read { .. })));
        for name in ["pipe", "."] {
            assert!(matches!(tail(&place(name), 1), Err(ConsoleError::Format { .. })), "{name}");
        }
        assert!(matches!(tail("/dev/zero".as_ref(), 1), Err(ConsoleError::Format { .. })), "it has no end");
        assert_eq!(tail_of(&File::open("/dev/zero").unwrap(), 1).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn an_existing_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(Ring::create(&path, SIZE), Err(ConsoleError::Create { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert!(matches!(tail(&path, 1), Err(ConsoleError::Format { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_become_printable_text(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let (_dir, path) = written(&[&bytes]);
            for line in tail(&path, 50).unwrap() {
                prop_assert!(line.len() <= LINE_LIMIT + 3);
                prop_assert!(line.bytes().all(|byte| (0x20..=0x7e).contains(&byte)));
            }
        }

        #[test]
        fn any_file_is_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), pad: bool) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("console");
            bytes.splice(0..0, MAGIC);
            if pad {
                bytes.resize(if bytes.len() % 2 == 0 { SIZE } else { MESSAGES_SIZE }, b'\n');
            }
            std::fs::write(&path, bytes).unwrap();
            let _ = tail(&path, 5);
        }
    }
}
