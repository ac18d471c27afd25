//! What of the host a container gets: directories and files by the pod's virtio-fs device,
//! block devices as disks, images as disks of their own.
//!
//! Everything is opened here, with links followed on the host as they lie now, and handed
//! over as a descriptor. For a mount that is to stay as it is, that is a detached copy of the
//! mounts below its path: what the host mounts or unmounts there later changes nothing in
//! it, and what is read-only is so by the host's kernel. One that is to follow the host is
//! the place itself.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

use nacelle_vmm::control::Access;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::model::{BlockDevice, MountAccess, Propagation};
use crate::{Error, Result};

/// Digits of a container's id in the name of a volume.
const NAME: usize = 40;
/// Mode of a directory that is made because a pod mounts it.
const MADE: u32 = 0o755;

/// A directory or file of the host, open.
#[derive(Debug)]
pub struct HostVolume {
    /// Held by `O_PATH`.
    pub file: File,
    /// What the guest may do with it.
    pub access: Access,
    /// Whether the container sees it read-only as a whole.
    pub read_only: bool,
}

/// What the device calls the volume of a container's mount: as much of the container's id as
/// tells it from all others, so that the agent's limit of 64 bytes is kept.
pub fn name(container: &str, index: usize) -> String {
    format!("{}.{index}", container.get(..NAME).unwrap_or(container))
}

/// Whether the volume of this name is the container's.
pub fn is_of(volume: &str, container: &str) -> bool {
    volume.strip_prefix(container.get(..NAME).unwrap_or(container)).is_some_and(|rest| rest.starts_with('.'))
}

/// Opens what `mounts[index]` of a container means. What does not exist becomes a directory,
/// as with other runtimes. Blocks.
pub fn open_host(index: usize, path: &Path, access: MountAccess, propagation: Propagation) -> Result<HostVolume> {
    let wrong = |problem: String| Error::Invalid(format!("config.mounts[{index}].host_path: {problem}"));
    let failed = |action: &str, error: io::Error| wrong(format!("cannot {action} {}: {error}", path.display()));
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tracing::info!(path = %path.display(), "made a directory that a container mounts");
            let made = fs::DirBuilder::new().recursive(true).mode(MADE).create(path);
            made.map_err(|error| failed("make the directory", error))?;
        }
        Err(error) => return Err(failed("look at", error)),
        Ok(_) => {}
    }
    let real = fs::canonicalize(path).map_err(|error| failed("resolve", error))?;
    let file = match propagation {
        Propagation::Private => detached(&real, access),
        Propagation::HostToContainer => place(&real).map_err(Into::into),
    };
    let file = File::from(file.map_err(|error| failed("open", error))?);
    let kind = file.metadata().map_err(|error| failed("look at", error))?.file_type();
    if let Some(name) = special(kind) {
        let hint = if kind.is_block_device() { "give it to the container as a device (volumeDevices)" } else { HINT };
        return Err(wrong(format!(
            "{} is a {name} of the host, which leads to nothing in a guest: {hint}",
            path.display()
        )));
    }
    let (access, read_only) = match access {
        MountAccess::Write => (Access::Write, false),
        MountAccess::ReadAll => (Access::ReadAll, true),
        // The guest sees one mount where the host has several, so where some of them are
        // writable the device tells them apart.
        MountAccess::Read => (Access::Read, propagation == Propagation::Private && !has_mounts_below(&real)),
    };
    Ok(HostVolume { file, access, read_only })
}

const HINT: &str = "mount the directory that it is in if only files beside it are needed, or run the pod by another \
                    runtime class";

/// What kind of special file it is, if it is one.
fn special(kind: fs::FileType) -> Option<&'static str> {
    match kind {
        kind if kind.is_dir() || kind.is_file() => None,
        kind if kind.is_socket() => Some("socket"),
        kind if kind.is_fifo() => Some("named pipe"),
        kind if kind.is_char_device() => Some("character device"),
        kind if kind.is_block_device() => Some("block device"),
        _ => Some("special file"),
    }
}

/// The place itself.
fn place(path: &Path) -> rustix::io::Result<OwnedFd> {
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// A copy of the mounts from `path` down, which nobody else sees and nothing changes.
fn detached(path: &Path, access: MountAccess) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = match open_tree(CWD, path, flags) {
        Ok(tree) => tree,
        // Before Linux 5.2. The device sees to what is read-only.
        Err(Errno::NOSYS) => return Ok(place(path)?),
        Err(error) => return Err(error.into()),
    };
    set_mounts(&tree, true, libc::MS_PRIVATE, 0)?;
    match access {
        MountAccess::Write => {}
        MountAccess::Read => set_mounts(&tree, false, 0, libc::MOUNT_ATTR_RDONLY)?,
        MountAccess::ReadAll => set_mounts(&tree, true, 0, libc::MOUNT_ATTR_RDONLY)?,
    }
    Ok(tree)
}

/// Changes a mount, or all mounts from it down.
fn set_mounts(tree: &OwnedFd, recursive: bool, propagation: libc::c_ulong, attributes: u64) -> io::Result<()> {
    // SAFETY: all bytes zero are a valid value of the structure: nothing is changed.
    let mut change: libc::mount_attr = unsafe { std::mem::zeroed() };
    change.propagation = propagation;
    change.attr_set = attributes;
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path ends with NUL, and the structure has the length that is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        // Before Linux 5.12. The device sees to what is read-only.
        error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        error => Err(error),
    }
}

/// Whether the host has mounted anything below `path`, links resolved.
fn has_mounts_below(path: &Path) -> bool {
    // What cannot be read may hold one: the device tells them apart.
    fs::read_to_string("/proc/self/mountinfo").map_or(true, |table| any_below(&table, path))
}

fn any_below(table: &str, path: &Path) -> bool {
    table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape).any(|at| at != path && at.starts_with(path))
}

/// A path as /proc writes it: space, tab, newline and backslash as octal numbers.
fn unescape(text: &str) -> PathBuf {
    let mut path = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                path.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                path.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(path))
}

/// Opens the block device that `devices[index]` of a container means. Blocks.
pub fn open_block(index: usize, device: &BlockDevice) -> Result<File> {
    let path = &device.host_path;
    let wrong = |problem: String| Error::Invalid(format!("config.devices[{index}].host_path: {problem}"));
    let kind = fs::metadata(path).map_err(|error| wrong(format!("cannot look at {}: {error}", path.display())))?;
    if !kind.file_type().is_block_device() {
        let problem = format!(
            "{} is no block device of the host; no other device can be given to a guest: run the pod by another runtime \
             class",
            path.display()
        );
        return Err(wrong(problem));
    }
    let opened = File::options().read(true).write(writable(device)).open(path);
    let file = opened.map_err(|error| wrong(format!("cannot open {}: {error}", path.display())))?;
    // Between the two, another file may have got the name.
    match file.metadata() {
        Ok(metadata) if metadata.file_type().is_block_device() => Ok(file),
        _ => Err(wrong(format!("{} has changed", path.display()))),
    }
}

/// Whether a container may write to a device.
pub fn writable(device: &BlockDevice) -> bool {
    device.permissions.contains('w')
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn open(path: &Path) -> Result<HostVolume> {
        // The place itself, which takes no privileges.
        open_host(3, path, MountAccess::Read, Propagation::HostToContainer)
    }

    #[test]
    fn what_is_missing_is_made_and_links_are_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (made, link) = (directory.path().join("a/b"), directory.path().join("link"));
        let opened = open(&made).unwrap();
        assert!(made.is_dir());
        assert_eq!((opened.access, opened.read_only), (Access::Read, false), "mounts may come below it");
        symlink(&made, &link).unwrap();
        fs::write(made.join("file"), "x").unwrap();
        let opened = open(&link.join("file")).unwrap();
        assert_eq!(opened.file.metadata().unwrap().len(), 1);
    }

    #[test]
    fn what_leads_to_nothing_in_a_guest_is_refused_by_its_field() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        let dangling = directory.path().join("dangling");
        symlink("/no/such/place", &dangling).unwrap();
        for (path, word) in [(socket.as_path(), "socket"), (Path::new("/dev/null"), "character device")] {
            let error = open(path).unwrap_err().to_string();
            assert!(error.starts_with("config.mounts[3].host_path: ") && error.contains(word), "{error}");
        }
        let error = open(&dangling).unwrap_err().to_string();
        assert!(error.contains("dangling"), "{error}");
        assert!(!Path::new("/no/such/place").exists());
    }

    #[test]
    fn a_device_that_is_none_is_refused_by_its_field() {
        let device = |path: &str| BlockDevice {
            host_path: path.into(),
            container_path: "/dev/xvda".into(),
            permissions: "rw".into(),
        };
        for path in ["/dev/null", "/", "/no/such/device"] {
            let error = open_block(1, &device(path)).unwrap_err().to_string();
            assert!(error.starts_with("config.devices[1].host_path: ") && error.contains(path), "{error}");
        }
    }

    #[test]
    fn mounts_below_a_path_are_found() {
        let table = "22 1 0:21 / /proc rw - proc proc rw\n\
                     30 1 0:22 / /var/lib/a\\040b/sub rw shared:1 - tmpfs tmpfs rw\n\
                     31 1 0:23 / /var/lib/other rw - tmpfs tmpfs rw\n";
        for (path, expected) in
            [("/var/lib/a b", true), ("/var/lib/a b/sub", false), ("/var/lib/oth", false), ("/", true), ("/srv", false)]
        {
            assert_eq!(any_below(table, Path::new(path)), expected, "{path}");
        }
    }
}
