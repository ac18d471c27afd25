//! Volumes that follow what the host mounts later.
//!
//! A descriptor of a directory leads upwards, too: `..` of one that was opened in the host's mount namespace goes up to the host's
//! root, whatever root directory the process has that holds it. So a VMM gets none. It gets a copy of the mounts from the
//! volume's path down, as for other volumes, and there is nothing above in it. But mounts propagate to copies only where
//! these are part of somebody's mount namespace (seen on Linux 6.18: not to detached ones). So the copy, a
//! slave of the host's mounts, is attached in the VMM's own namespace, below its root directory, in `/volumes`. Upwards of it there
//! is the jail.
//!
//! Who goes to the namespace of a VMM finds there what that VMM could be made to put there: its root directory is read-only to it,
//! and no path but `/volumes/<name>`, of this program's making, is gone; of /proc, nothing is used. It takes a thread
//! of its own, which does nothing else after.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, mount_remount,
    move_mount, open_tree, unmount,
};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags};

use super::{any_below, clear_read_only, protect, set_mounts};
use crate::model::MountAccess;

/// Where in a VMM's root directory the copies are.
const VOLUMES: &str = "volumes";
/// How often it is tried again to copy mounts that change meanwhile.
const TRIES: usize = 16;
/// How the root directory of a VMM is mounted.
const ROOT: MountFlags = MountFlags::BIND.union(MountFlags::NOSUID).union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Copies the mounts from `place` down into the mount namespace of `vmm` (a pidfd) under `name`, to follow those of the host from
/// now on. An earlier copy of that name goes. Returns a descriptor of the copy, by `O_PATH`.
///
/// For a thread of its own, which ends then. Blocks for as long as what is mounted at `place` does.
///
/// # Errors
/// If the host's mount propagates to nobody, or the VMM is gone.
pub fn attach(vmm: BorrowedFd<'_>, name: &str, place: &File, access: MountAccess) -> io::Result<OwnedFd> {
    let mut mounts = Mounts::new(place)?;
    mounts.check_propagation()?;
    let directory = FileType::from_raw_mode(rustix::fs::fstat(place)?.st_mode) == FileType::Directory;
    let host = File::open("/proc/thread-self/ns/mnt")?;
    for _ in 0..TRIES {
        let before = mounts.below()?;
        let (tree, slave) = copy(place, access)?;
        let jail = Jail::enter(vmm)?;
        jail.remove(name)?;
        let target = jail.make(name, directory)?;
        move_mount(&tree, c"", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        if !slave {
            // Before Linux 5.12.
            mount_change(&target, MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        }
        // What was mounted between the copy and now has not propagated.
        if mounts.below()? == before {
            return Ok(tree);
        }
        jail.remove(name)?;
        // Mounts can be copied in their own namespace only.
        rustix::thread::move_into_link_name_space(host.as_fd(), Some(LinkNameSpaceType::Mount))?;
    }
    Err(io::Error::other("what is mounted below it changes all the time: try again"))
}

/// A detached copy of the mounts from `place` down, and whether it is their slave already.
fn copy(place: &File, access: MountAccess) -> io::Result<(OwnedFd, bool)> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(place, c"", flags)?;
    let slave = set_mounts(&tree, true, libc::MS_SLAVE, 0)?;
    protect(&tree, access)?;
    Ok((tree, slave))
}

/// Takes a copy away. One that is not there is fine. For a thread of its own, which ends then.
///
/// # Errors
/// If the VMM is gone.
pub fn detach(vmm: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    Jail::enter(vmm)?.remove(name)
}

/// The root directory of a VMM, in whose mount namespace this thread is.
struct Jail(());

impl Jail {
    /// Goes there, from the host's namespace.
    fn enter(vmm: BorrowedFd<'_>) -> io::Result<Self> {
        let root = |()| rustix::fs::stat("/").map(|root| (root.st_dev, root.st_ino));
        let host = root(())?;
        // SAFETY: the thread gets a working directory of its own; it shares its descriptors as before.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        rustix::thread::move_into_thread_name_spaces(vmm, ThreadNameSpaceType::MOUNT)?;
        let file_system = rustix::fs::statfs("/")?.f_type;
        if root(())? == host || file_system != libc::TMPFS_MAGIC {
            return Err(io::Error::other("its VMM is not in its jail"));
        }
        Ok(Self(()))
    }

    /// Does something in the directory of the copies, which is read-only to everybody else.
    fn writing<T>(&self, work: impl Fn(BorrowedFd<'_>) -> Result<T, Errno>) -> io::Result<T> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let writable = open_tree(CWD, "/", flags)?;
        let own = clear_read_only(&writable)?;
        if !own {
            // Before Linux 5.12. The VMM might write a page into its root directory meanwhile.
            mount_remount("/", ROOT, c"")?;
        }
        let root = if own { writable.as_fd() } else { CWD };
        let done = (|| {
            let path = if own { PathBuf::from(VOLUMES) } else { Path::new("/").join(VOLUMES) };
            match rustix::fs::mkdirat(root, &path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
            let held = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            work(rustix::fs::openat(root, &path, held, Mode::empty())?.as_fd())
        })();
        if !own {
            mount_remount("/", ROOT | MountFlags::RDONLY, c"")?;
        }
        Ok(done?)
    }

    /// Makes what a copy is attached to.
    fn make(&self, name: &str, directory: bool) -> io::Result<PathBuf> {
        self.writing(|volumes| match directory {
            true => rustix::fs::mkdirat(volumes, name, Mode::RWXU),
            false => {
                let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                rustix::fs::openat(volumes, name, new, Mode::RUSR).map(drop)
            }
        })?;
        Ok(Path::new("/").join(VOLUMES).join(name))
    }

    /// Removes a copy and what it was attached to, if they are there.
    fn remove(&self, name: &str) -> io::Result<()> {
        let target = Path::new("/").join(VOLUMES).join(name);
        loop {
            match unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                Ok(()) => {}
                Err(Errno::NOENT) => return Ok(()),
                // Nothing is mounted there.
                Err(Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.writing(|volumes| match rustix::fs::unlinkat(volumes, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => rustix::fs::unlinkat(volumes, name, AtFlags::REMOVEDIR),
            other => other,
        })
    }
}

/// What the host has mounted at and below a place.
struct Mounts {
    /// Of the namespace that this thread was in when it was opened, wherever it goes.
    table: File,
    path: PathBuf,
    /// The number of the mount that the place is on.
    mount: String,
}

impl Mounts {
    fn new(place: &File) -> io::Result<Self> {
        let held = format!("/proc/self/fdinfo/{}", place.as_raw_fd());
        let about = std::fs::read_to_string(held)?;
        let mount = about.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        let mount = mount.ok_or_else(|| io::Error::other("the kernel does not tell its mount"))?.trim().to_owned();
        let path = std::fs::read_link(format!("/proc/self/fd/{}", place.as_raw_fd()))?;
        Ok(Self { table: File::open("/proc/thread-self/mountinfo")?, path, mount })
    }

    fn read(&mut self) -> io::Result<String> {
        let mut text = String::new();
        self.table.seek(SeekFrom::Start(0))?;
        self.table.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Refuses a mount that nothing propagates from, on which nobody would ever see what the host mounts.
    fn check_propagation(&mut self) -> io::Result<()> {
        match propagates(&self.read()?, &self.mount) {
            true => Ok(()),
            false => Err(io::Error::other(
                "with propagation HostToContainer, it has to be on a mount of the host that is shared, and it is on a \
                 private one: make that shared (mount --make-rshared), or mount it without propagation",
            )),
        }
    }

    /// The lines of what is mounted below.
    fn below(&mut self) -> io::Result<Vec<String>> {
        let text = self.read()?;
        Ok(text.lines().filter(|line| any_below(line, &self.path)).map(str::to_owned).collect())
    }
}

/// Whether a mount is shared or the slave of one that is (proc(5), mountinfo: the optional fields end with a hyphen).
fn propagates(table: &str, mount: &str) -> bool {
    let fields =
        table.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|line| line.first() == Some(&mount));
    let mut optional = fields.iter().flatten().skip(6).take_while(|field| **field != "-");
    optional.any(|field| field.starts_with("shared:") || field.starts_with("master:"))
}

#[cfg(test)]
mod tests;
