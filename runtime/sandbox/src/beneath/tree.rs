//! Removing a directory that others have filled.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, ResolveFlags};
use rustix::io::Errno;

use super::{DIRECTORY, RESOLVE, entries, lookup};

/// Most entries that are removed in one go: who fills a directory while it is removed is not outrun for ever.
const MOST: usize = 1 << 20;
/// As [`RESOLVE`], and never into what is mounted.
const WITHIN: ResolveFlags = RESOLVE.union(ResolveFlags::NO_XDEV);

/// Removes `name` in `parent`, whatever it is, with all that is below it on the same mount.
///
/// However deep the tree, three descriptors and no stack: a directory that is not empty moves up to the top of the tree,
/// where it is emptied in its turn.
pub fn remove(parent: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
    match remove_empty(parent, name) {
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        other => return other.map_err(|error| mounted(error.into())),
    }
    let top = lookup(parent, name, DIRECTORY, Mode::empty(), WITHIN).map_err(mounted)?;
    let mut emptied = Emptied { top, next: 0, left: MOST, failed: None };
    // Each round takes a level off.
    while emptied.round()? {}
    match emptied.failed {
        Some(error) => Err(error),
        None => Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?),
    }
}

struct Emptied {
    top: OwnedFd,
    /// Part of the next name that a directory gets at the top.
    next: u64,
    /// How many more entries may be removed.
    left: usize,
    /// The first thing that could not be.
    failed: Option<io::Error>,
}

impl Emptied {
    /// Goes through what is at the top; returns whether something was moved there.
    fn round(&mut self) -> io::Result<bool> {
        let mut moved = false;
        // Collected first: a directory that changes may name an entry twice, or never.
        let names: Vec<_> = entries(self.top.as_fd())?.take(self.left).collect::<io::Result<_>>()?;
        for name in names {
            match self.remove_one(&name) {
                Ok(again) => moved |= again,
                Err(error) => {
                    self.failed.get_or_insert(error);
                }
            }
        }
        Ok(moved)
    }

    /// Removes one entry of the top; returns whether there is more to be done.
    fn remove_one(&mut self, name: &OsString) -> io::Result<bool> {
        self.count()?;
        match remove_if_there(self.top.as_fd(), Path::new(name)) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            other => return other.map(|()| false).map_err(|error| named(name, error)),
        }
        let directory = lookup(&self.top, Path::new(name), DIRECTORY, Mode::empty(), WITHIN);
        let directory = directory.map_err(mounted).map_err(|error| in_words(name, &error))?;
        let (mut moved, mut failed) = (false, None);
        for inner in entries(directory.as_fd())? {
            let inner = inner?;
            self.count()?;
            let removed = match remove_if_there(directory.as_fd(), Path::new(&inner)) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => {
                    moved = true;
                    self.move_up(directory.as_fd(), Path::new(&inner))
                }
                other => other,
            };
            if let Err(error) = removed {
                failed.get_or_insert(named(&inner, error));
            }
        }
        match (failed, rustix::fs::unlinkat(&self.top, Path::new(name), AtFlags::REMOVEDIR)) {
            (Some(error), Err(_)) => {
                self.failed.get_or_insert(error);
                Ok(moved)
            }
            // Filled again meanwhile.
            (None, Err(Errno::NOTEMPTY | Errno::EXIST)) => Ok(true),
            (None, Err(error)) => Err(named(name, error)),
            (_, Ok(())) => Ok(moved),
        }
    }

    fn move_up(&mut self, from: BorrowedFd<'_>, name: &Path) -> Result<(), Errno> {
        loop {
            let up = PathBuf::from(format!("removed-{}", self.next));
            self.next += 1;
            let flags = rustix::fs::RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(from, name, &self.top, &up, flags) {
                Err(Errno::EXIST) if self.next < MOST as u64 => {}
                other => return other,
            }
        }
    }

    fn count(&mut self) -> io::Result<()> {
        self.left = self.left.checked_sub(1).ok_or_else(|| {
            io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {MOST} entries are in it: try again"))
        })?;
        Ok(())
    }
}

/// Removes a file, a link or an empty directory.
fn remove_empty(parent: BorrowedFd<'_>, name: &Path) -> Result<(), Errno> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR),
        other => other,
    }
}

/// As [`remove_empty`], of what may be gone already.
fn remove_if_there(parent: BorrowedFd<'_>, name: &Path) -> Result<(), Errno> {
    match remove_empty(parent, name) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

fn named(name: impl AsRef<Path>, error: Errno) -> io::Error {
    in_words(name, &mounted(error.into()))
}

fn in_words(name: impl AsRef<Path>, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", name.as_ref().display()))
}

/// What a place where something is mounted refuses to be removed and entered with.
fn mounted(error: io::Error) -> io::Error {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::XDEV | Errno::BUSY) => io::Error::other("something is mounted there"),
        _ => error,
    }
}
