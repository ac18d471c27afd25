//! What of the host a container gets: directories and files by the pod's virtio-fs device,
//! block devices as disks, images as disks of their own.
//!
//! A path of the host is the kubelet's, which has resolved what a pod may have put there (sub-paths are bind mounts of its
//! making): links are followed as they lie now. It is looked up **once**, and everything else (its kind, the copy of its mounts)
//! is of the descriptor that this gave. What is missing is made without following a link.
//!
//! For a mount that is to stay as it is, the guest's device gets a detached copy of the mounts below its path: what the host
//! mounts or unmounts there later changes nothing in it, and what is read-only is so by the host's kernel. For one that is to
//! follow the host, see [`follow`].
//!
//! All of it may hang where a file system of the host does: see [`deadline`].

mod deadline;
mod follow;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nacelle_vmm::control::Access;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::beneath::Directory;
use crate::model::{BlockDevice, ContainerConfig, MountAccess, MountSource, Propagation};
use crate::spec::guest_has;
use crate::{Error, Result};

/// Digits of a container's id in the name of a volume.
const NAME: usize = 40;
/// Mode of a directory that is made because a pod mounts it.
const MADE: u32 = 0o755;

/// A directory or file of the host, open.
#[derive(Debug)]
pub struct HostVolume {
    /// Held by `O_PATH`: a copy of its mounts, or, if it follows the host, the place itself, which is not for a VMM.
    file: File,
    /// Whether later mounts of the host are to be seen.
    follows: Option<MountAccess>,
    /// Its path, for messages.
    path: PathBuf,
    /// What the guest may do with it.
    pub access: Access,
    /// Whether the container sees it read-only as a whole.
    pub read_only: bool,
    /// Whether nothing is mounted below it, now and later: what containers have of the same directory is one to the guest then.
    pub plain: bool,
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

/// What a container mounts of the host, open: directories and files by the mount's number, and block devices.
pub type Opened = (Vec<(usize, HostVolume)>, Vec<File>);

/// Opens everything of the host that a container of `pod` asks for.
///
/// # Errors
/// By the field that it concerns, [`Error::Deadline`] for a path that does not answer within `limit`.
pub async fn open_all(pod: &str, config: &ContainerConfig, limit: Duration) -> Result<Opened> {
    let config = config.clone();
    let work = move |step: &deadline::Step| {
        let begin = |field: &str, index: usize, path: &Path| {
            step.begin(format!("config.{field}[{index}].host_path: {}", silent(path, "opening")));
        };
        let (mut host, mut block) = (Vec::new(), Vec::new());
        for (index, mount) in config.mounts.iter().enumerate() {
            // What the guest has itself is nothing of the host's.
            if let MountSource::Host(path) = &mount.source
                && !guest_has(path)
            {
                begin("mounts", index, path);
                host.push((index, open_host(index, path, mount.access, mount.propagation)?));
            }
        }
        for (index, device) in config.devices.iter().enumerate().filter(|(_, device)| !guest_has(&device.host_path)) {
            begin("devices", index, &device.host_path);
            block.push(open_block(index, device)?);
        }
        Ok((host, block))
    };
    deadline::within(pod, limit, work).await
}

fn silent(path: &Path, action: &str) -> String {
    format!("{} does not answer (is the server or the process gone that it is from?): {action} it", path.display())
}

impl HostVolume {
    /// What the VMM behind the pidfd `vmm` gets as volume `name`.
    ///
    /// # Errors
    /// If the host's mounts cannot be followed, or do not answer within `limit`.
    pub async fn for_vmm(self, pod: &str, vmm: Arc<OwnedFd>, name: String, limit: Duration) -> Result<File> {
        let Some(access) = self.follows else { return Ok(self.file) };
        let work = move |step: &deadline::Step| {
            step.begin(silent(&self.path, "copying the mounts of"));
            let wrong = |error| Error::Invalid(format!("cannot mount {}: {error}", self.path.display()));
            follow::attach(vmm.as_fd(), &name, &self.file, access).map(File::from).map_err(wrong)
        };
        deadline::within(pod, limit, work).await
    }
}

/// Takes back what [`HostVolume::for_vmm`] has made for a volume that follows the host. One that is not there is fine.
///
/// # Errors
/// If the VMM is gone, or does not answer within `limit`.
pub async fn unfollow(pod: &str, vmm: Arc<OwnedFd>, name: String, limit: Duration) -> Result<()> {
    let work = move |step: &deadline::Step| {
        step.begin(format!("taking back the mounts of volume {name}"));
        let failed = Error::io("take back the mounts of volume", &name);
        follow::detach(vmm.as_fd(), &name).map_err(failed)
    };
    deadline::within(pod, limit, work).await
}

/// Opens what `mounts[index]` of a container means. What does not exist becomes a directory,
/// as with other runtimes. Blocks, for ever where the file system does.
fn open_host(index: usize, path: &Path, access: MountAccess, propagation: Propagation) -> Result<HostVolume> {
    let wrong = |problem: String| Error::Invalid(format!("config.mounts[{index}].host_path: {problem}"));
    let failed = |action: &str, error: io::Error| wrong(format!("cannot {action} {}: {error}", path.display()));
    let place = match hold(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make(path).map_err(|error| wrong(format!("cannot make the directory {}: {error}", path.display())))?;
            tracing::info!(path = %path.display(), "made a directory that a container mounts");
            hold(path)
        }
        other => other,
    };
    let place = place.map_err(|error| failed("open", error))?;
    // Only its name: what is there by now is of no interest.
    let real = fs::read_link(own(&place)).map_err(|error| failed("resolve", error))?;
    let (file, follows) = match propagation {
        Propagation::Private => (detached(&place, access).map_err(|error| failed("open", error))?, None),
        Propagation::HostToContainer => (place, Some(access)),
    };
    let kind = file.metadata().map_err(|error| failed("look at", error))?.file_type();
    if let Some(name) = special(kind) {
        let hint = if kind.is_block_device() { "give it to the container as a device (volumeDevices)" } else { HINT };
        return Err(wrong(format!(
            "{} is a {name} of the host, which leads to nothing in a guest: {hint}",
            path.display()
        )));
    }
    let plain = follows.is_none() && (kind.is_file() || !has_mounts_below(&real));
    let (access, read_only) = match access {
        MountAccess::Write => (Access::Write, false),
        MountAccess::ReadAll => (Access::ReadAll, true),
        // The guest sees one mount where the host has several, so where some of them are
        // writable the device tells them apart.
        MountAccess::Read => (Access::Read, plain),
    };
    Ok(HostVolume { file, follows, path: path.into(), access, read_only, plain })
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

/// The place itself, mounted first where that is done when it is wanted.
fn hold(path: &Path) -> io::Result<File> {
    Ok(open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLOEXEC)?.into())
}

/// The path of a descriptor of this process.
fn own(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Makes a directory that is missing, and those above it. What is there already is the host's; no link that somebody has put in
/// place of what is missing is followed.
fn make(path: &Path) -> Result<()> {
    for above in path.ancestors().skip(1) {
        match Directory::open(above) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            above_it => {
                let above_it = above_it?;
                let missing = path.strip_prefix(above).map_err(|error| Error::Internal(error.to_string()))?;
                return above_it.create_directories(missing, MADE).map(drop);
            }
        }
    }
    Err(Error::Invalid("it is no absolute path".into()))
}

/// A copy of the mounts from a place down, which nobody else sees and nothing changes.
fn detached(place: &File, access: MountAccess) -> io::Result<File> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(place, c"", flags)?;
    // Where the kernel cannot, nothing propagates to it for want of a namespace, and the device sees to what is read-only.
    set_mounts(&tree, true, libc::MS_PRIVATE, 0)?;
    protect(&tree, access)?;
    Ok(tree.into())
}

/// Makes a copy of mounts read-only as far as it is to be.
fn protect(tree: &OwnedFd, access: MountAccess) -> io::Result<()> {
    let recursive = match access {
        MountAccess::Write => return Ok(()),
        MountAccess::Read => false,
        MountAccess::ReadAll => true,
    };
    set_mounts(tree, recursive, 0, libc::MOUNT_ATTR_RDONLY).map(drop)
}

/// Changes a mount, or all mounts from it down. False if the kernel cannot: it is from before Linux 5.12.
fn set_mounts(tree: &OwnedFd, recursive: bool, propagation: libc::c_ulong, attributes: u64) -> io::Result<bool> {
    // SAFETY: all bytes zero are a valid value of the structure: nothing is changed.
    let mut change: libc::mount_attr = unsafe { std::mem::zeroed() };
    change.propagation = propagation;
    change.attr_set = attributes;
    change_mounts(tree, recursive, &change)
}

/// Makes a mount writable; see [`set_mounts`].
fn clear_read_only(tree: &OwnedFd) -> io::Result<bool> {
    // SAFETY: as in [`set_mounts`].
    let mut change: libc::mount_attr = unsafe { std::mem::zeroed() };
    change.attr_clr = libc::MOUNT_ATTR_RDONLY;
    change_mounts(tree, false, &change)
}

fn change_mounts(tree: &OwnedFd, recursive: bool, change: &libc::mount_attr) -> io::Result<bool> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path ends with NUL, and the structure has the length that is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(change),
            size_of::<libc::mount_attr>(),
        )
    };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(true),
        error if error.raw_os_error() == Some(Errno::NOSYS.raw_os_error()) => Ok(false),
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
fn open_block(index: usize, device: &BlockDevice) -> Result<File> {
    let path = &device.host_path;
    let wrong = |problem: String| Error::Invalid(format!("config.devices[{index}].host_path: {problem}"));
    let failed = |error: io::Error| wrong(format!("cannot open {}: {error}", path.display()));
    let place = hold(path).map_err(failed)?;
    if !place.metadata().map_err(failed)?.file_type().is_block_device() {
        let problem = format!(
            "{} is no block device of the host, and none that a guest has itself (/dev/fuse, /dev/net/tun); no other device \
             can be given to a guest: run the pod by another runtime class",
            path.display()
        );
        return Err(wrong(problem));
    }
    let access = if writable(device) { OFlags::RDWR } else { OFlags::RDONLY };
    // What was looked at, whatever has its name by now.
    let opened = rustix::fs::openat(CWD, own(&place), access | OFlags::CLOEXEC, Mode::empty());
    opened.map(File::from).map_err(|error| failed(error.into()))
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
        for (path, word) in [(socket.as_path(), "socket"), (Path::new("/dev/tty"), "character device")] {
            let error = open(path).unwrap_err().to_string();
            assert!(error.starts_with("config.mounts[3].host_path: ") && error.contains(word), "{error}");
        }
        let error = open(&dangling).unwrap_err().to_string();
        assert!(error.contains("dangling"), "{error}");
        assert!(!Path::new("/no/such/place").exists());
    }

    #[test]
    fn what_is_missing_is_not_made_where_a_planted_link_leads() {
        let (directory, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(outside.path().join("gone"), directory.path().join("planted")).unwrap();
        let error = open(&directory.path().join("planted/a/b")).unwrap_err().to_string();
        assert!(error.starts_with("config.mounts[3].host_path: ") && error.contains("symbolic link"), "{error}");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        // What is there is the host's, links included.
        fs::create_dir(outside.path().join("gone")).unwrap();
        open(&directory.path().join("planted/a/b")).unwrap();
        assert!(outside.path().join("gone/a/b").is_dir());
    }

    #[test]
    fn a_device_that_is_none_is_refused_by_its_field() {
        let device = |path: &str| BlockDevice {
            host_path: path.into(),
            container_path: "/dev/xvda".into(),
            permissions: "rw".into(),
        };
        for path in ["/dev/tty", "/", "/no/such/device"] {
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
