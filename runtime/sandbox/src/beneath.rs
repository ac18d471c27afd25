//! Opening what others can influence, below a directory that is trusted.
//!
//! A pod with a volume, a VMM that was broken out of or a local user can put a symbolic link, a named pipe, a device,
//! a socket of somebody else's or an endless file where this program expects a file of its own. So everything in a
//! directory that any of them can write to is reached by a [`Directory`]:
//!
//! * **Beneath.** A name is a relative path without `..`. No symbolic link is followed in it, at no component, and no
//!   magic link of /proc. What was looked up is held by a descriptor: what has its name later does not matter.
//! * **Of the kind that is wanted.** A file is held without opening it (`O_PATH`), its kind is looked at, and only then is it
//!   opened, by that descriptor. So no device is ever opened, which can have effects of its own, and no named pipe.
//! * **Bounded.** What is read or listed has a limit that the caller gives, and what exceeds it is an error.
//! * **Never waiting for anybody.** No call here waits for another process to open, read or accept something, only for
//!   the disk. Where that may be a disk that hangs, call from a thread that may hang, too.
//!
//! The directory itself is trusted: links in *its* path were made by root, and are followed when it is opened, once.
//!
//! `openat2` is in Linux since 5.6.

// The records, run directories and sockets of pods come to be opened by it one by one.

mod socket;
#[cfg(test)]
mod tests;
mod tree;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

pub use self::socket::{Socket, connect_to};
use crate::{Error, Result};

/// How a name below a trusted directory is looked up.
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
/// How something is held, whatever it is, a symbolic link too.
const HOLD: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// How a directory is held.
const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// How often something is tried again that another process has made fail by chance, or on purpose.
const TRIES: usize = 64;

/// A trusted directory, held open: it stays this one whatever becomes of its name.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    /// For messages, and for who needs a name.
    path: PathBuf,
}

impl Directory {
    /// Opens a directory whose whole path is trusted: links in it are followed.
    ///
    /// # Errors
    /// If it does not exist, or is no directory.
    pub fn open(path: &Path) -> Result<Self> {
        let fd = rustix::fs::openat(CWD, path, DIRECTORY, Mode::empty());
        Ok(Self { fd: fd.map_err(failed("open directory", path))?, path: path.into() })
    }

    /// The path of `name` in it, for messages.
    pub fn path_of(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// A directory below it.
    ///
    /// # Errors
    /// If there is none, or a link or anything else in its place.
    #[cfg(test)]
    pub fn directory(&self, name: impl AsRef<Path>) -> Result<Self> {
        let path = self.path_of(&name);
        match lookup(&self.fd, name.as_ref(), DIRECTORY, Mode::empty(), RESOLVE) {
            Ok(fd) => Ok(Self { fd, path }),
            Err(error) => Err(Error::io("open directory", path)(error)),
        }
    }

    /// A directory below it, made with all those in between that are missing, each with `mode` (less the umask).
    ///
    /// # Errors
    /// If one cannot be made, or something else is in its place.
    pub fn create_directories(&self, name: impl AsRef<Path>, mode: u32) -> Result<Self> {
        let path = self.path_of(&name);
        let mut here: Option<OwnedFd> = None;
        for part in parts(name.as_ref()).map_err(Error::io("make directory", &path))? {
            let above = here.as_ref().unwrap_or(&self.fd);
            match rustix::fs::mkdirat(above, part, Mode::from_raw_mode(mode)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(failed("make directory", &path)(error)),
            }
            let next = lookup(above, part, DIRECTORY, Mode::empty(), RESOLVE);
            here = Some(next.map_err(Error::io("make directory", &path))?);
        }
        match here {
            Some(fd) => Ok(Self { fd, path }),
            None => Err(Error::io("make directory", path)(io::ErrorKind::InvalidInput.into())),
        }
    }

    /// A regular file below it, opened with `flags`: `RDONLY`, `WRONLY` or `RDWR`, with any of `APPEND`, `TRUNC`, `CREATE`
    /// (then with `mode`, less the umask) and `EXCL`.
    ///
    /// # Errors
    /// If there is none (unless it is created), or something else in its place.
    pub fn file(&self, name: impl AsRef<Path>, flags: OFlags, mode: u32) -> Result<File> {
        let action = if flags.contains(OFlags::CREATE) { "create" } else { "open" };
        self.open_file(name.as_ref(), flags, mode).map_err(Error::io(action, self.path_of(&name)))
    }

    fn open_file(&self, name: &Path, flags: OFlags, mode: u32) -> io::Result<File> {
        let create = flags.contains(OFlags::CREATE);
        let exclusive = create && flags.contains(OFlags::EXCL);
        let flags = (flags - OFlags::CREATE - OFlags::EXCL) | OFlags::CLOEXEC | OFlags::NOCTTY;
        for _ in 0..TRIES {
            if !exclusive {
                match self.hold(name) {
                    Ok((held, kind)) => return reopen(&held, kind, flags),
                    Err(error) if create && error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
            let new = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            match lookup(&self.fd, name, new, Mode::from_raw_mode(mode), RESOLVE) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !exclusive => {}
                made => return made.map(File::from),
            }
        }
        Err(io::Error::other("it comes and goes"))
    }

    /// Holds what is at `name`, whatever it is.
    fn hold(&self, name: &Path) -> io::Result<(OwnedFd, FileType)> {
        let held = lookup(&self.fd, name, HOLD, Mode::empty(), RESOLVE)?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&held)?.st_mode);
        Ok((held, kind))
    }

    /// What is at `name`, the link itself if it is one; `None` if nothing is.
    ///
    /// # Errors
    /// If that cannot be told.
    pub fn stat(&self, name: impl AsRef<Path>) -> Result<Option<Stat>> {
        let held = lookup(&self.fd, name.as_ref(), HOLD, Mode::empty(), RESOLVE);
        match held.and_then(|held| Ok(rustix::fs::fstat(held)?)) {
            Ok(stat) => Ok(Some(stat)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("look at", self.path_of(&name))(error)),
        }
    }

    /// A unix socket below it.
    ///
    /// # Errors
    /// If there is none, or something else in its place.
    pub fn socket(&self, name: impl AsRef<Path>) -> Result<Socket> {
        let path = self.path_of(&name);
        let held = self.hold(name.as_ref()).and_then(|(held, kind)| match kind {
            FileType::Socket => Ok(held),
            other => Err(is_no("socket", other)),
        });
        Ok(Socket::new(held.map_err(Error::io("open socket", path))?))
    }

    /// All of a file, if that is at most `limit` bytes.
    ///
    /// # Errors
    /// If there is none, something else in its place, or more.
    pub fn read(&self, name: impl AsRef<Path>, limit: u64) -> Result<Vec<u8>> {
        let read = || {
            let file = self.open_file(name.as_ref(), OFlags::RDONLY, 0)?;
            let mut bytes = Vec::new();
            file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > limit {
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {limit} bytes")));
            }
            Ok(bytes)
        };
        read().map_err(Error::io("read", self.path_of(&name)))
    }

    /// Puts a file with these bytes and exactly this mode in place of what is at `name`, in one step: at any time there is the
    /// old one or the new. Of several callers at a time the last one wins. Not synced to the disk.
    ///
    /// # Errors
    /// If that cannot be done; then what was there is there.
    pub fn replace(&self, name: impl AsRef<Path>, bytes: &[u8], mode: u32) -> Result<()> {
        self.try_replace(name.as_ref(), bytes, mode).map_err(Error::io("replace", self.path_of(&name)))
    }

    fn try_replace(&self, name: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
        let (parent, name) = self.parent(name)?;
        let (temporary, mut file) = create_temporary(parent.as_fd(), name)?;
        let written = (|| {
            file.write_all(bytes)?;
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
            Ok(rustix::fs::renameat(&parent, &temporary, &parent, name)?)
        })();
        if written.is_err() {
            let _ = rustix::fs::unlinkat(&parent, &temporary, AtFlags::empty());
        }
        written
    }

    /// Removes what is at `name` unless it is a directory; the link itself if it is one. Returns whether something was there.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove_file(&self, name: impl AsRef<Path>) -> Result<bool> {
        let remove = || {
            let (parent, name) = self.parent(name.as_ref())?;
            Ok(rustix::fs::unlinkat(&parent, name, AtFlags::empty())?)
        };
        gone(remove()).map_err(Error::io("remove", self.path_of(&name)))
    }

    /// Removes what is at `name` and everything below. Nothing that is mounted there is entered: it stays, with a directory to
    /// be in, and all else goes. Returns whether something was there.
    ///
    /// # Errors
    /// The first thing that could not be removed.
    pub fn remove_tree(&self, name: impl AsRef<Path>) -> Result<bool> {
        let remove = || {
            let (parent, name) = self.parent(name.as_ref())?;
            tree::remove(parent.as_fd(), name)
        };
        gone(remove()).map_err(Error::io("remove", self.path_of(&name)))
    }

    /// The names of what is in it, in no order, if there are at most `limit`.
    ///
    /// # Errors
    /// If it cannot be read, or there are more.
    pub fn names(&self, limit: usize) -> Result<Vec<OsString>> {
        let list = || {
            let mut names = Vec::new();
            for name in entries(self.fd.as_fd())? {
                if names.len() == limit {
                    let many = format!("more than {limit} entries are in it");
                    return Err(io::Error::new(io::ErrorKind::FileTooLarge, many));
                }
                names.push(name?);
            }
            Ok(names)
        };
        list().map_err(Error::io("read directory", &self.path))
    }

    /// The directory that `name` is in, and its last component.
    fn parent<'a>(&self, name: &'a Path) -> io::Result<(OwnedFd, &'a Path)> {
        let last = parts(name)?.pop().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = match name.parent() {
            Some(parent) if parent != Path::new("") => lookup(&self.fd, parent, DIRECTORY, Mode::empty(), RESOLVE)?,
            _ => self.fd.try_clone()?,
        };
        Ok((parent, last))
    }
}

impl AsFd for Directory {
    /// Held by `O_PATH`.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The components of a name that leads downwards.
fn parts(name: &Path) -> io::Result<Vec<&Path>> {
    let parts: Option<Vec<_>> = name
        .components()
        .map(|part| match part {
            Component::Normal(part) => Some(Path::new(part)),
            _ => None,
        })
        .collect();
    match parts {
        Some(parts) if !parts.is_empty() => Ok(parts),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no name below a directory")),
    }
}

/// Opens `name` below `directory`.
fn lookup(directory: impl AsFd, name: &Path, flags: OFlags, mode: Mode, resolve: ResolveFlags) -> io::Result<OwnedFd> {
    parts(name)?;
    let mut tries = 0;
    loop {
        match rustix::fs::openat2(&directory, name, flags, mode, resolve) {
            // Something was renamed on the way.
            Err(Errno::AGAIN) if tries < TRIES => tries += 1,
            Err(Errno::INTR) => {}
            Err(Errno::LOOP) => return Err(io::Error::other("a symbolic link is on the way, which is not followed")),
            other => return Ok(other?),
        }
    }
}

/// Opens a file that is held, if it is a regular one.
fn reopen(held: &OwnedFd, kind: FileType, flags: OFlags) -> io::Result<File> {
    if kind != FileType::RegularFile {
        return Err(is_no("regular file", kind));
    }
    // Whoever owns a file can have its opening wait for a lease: not this one.
    let file = rustix::fs::openat(CWD, own(held), flags | OFlags::NONBLOCK, Mode::empty())?;
    rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file.into())
}

/// The path of a descriptor of this process.
fn own(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// A new, empty file beside `name`.
fn create_temporary(parent: BorrowedFd<'_>, name: &Path) -> io::Result<(PathBuf, File)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    for _ in 0..TRIES {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let temporary = PathBuf::from(format!("{}.{}-{number}.new", name.display(), std::process::id()));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match lookup(parent, &temporary, flags, Mode::RUSR | Mode::WUSR, RESOLVE) {
            // Left by a process that had this one's number.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return Ok((temporary, made?.into())),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// The names in a directory that is held.
fn entries(directory: BorrowedFd<'_>) -> io::Result<impl Iterator<Item = io::Result<OsString>>> {
    // One that is held by its place cannot be read.
    let readable = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let entries = Dir::new(rustix::fs::openat(directory, c".", readable, Mode::empty())?)?;
    Ok(entries.filter_map(|entry| match entry.map(|entry| entry.file_name().to_bytes().to_vec()) {
        Ok(name) if matches!(name.as_slice(), b"." | b"..") => None,
        Ok(name) => Some(Ok(OsString::from_vec(name))),
        Err(error) => Some(Err(error.into())),
    }))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    let error = Error::io(action, path);
    move |errno| error(errno.into())
}

fn gone(removed: io::Result<()>) -> io::Result<bool> {
    match removed {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_no(wanted: &str, kind: FileType) -> io::Error {
    let kind = match kind {
        FileType::RegularFile => "regular file",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::Fifo => "named pipe",
        FileType::Socket => "socket",
        FileType::CharacterDevice | FileType::BlockDevice => "device",
        FileType::Unknown => "file of an unknown kind",
    };
    io::Error::other(format!("it is a {kind}, and a {wanted} is wanted"))
}
