//! The namespaces of a VMM, and its root directory.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, mount_remount,
    move_mount, open_tree, unmount,
};
use rustix::thread::UnshareFlags;

use super::{JailError, failed};
use crate::config::{MachineConfig, Start};

/// The device of KVM.
const KVM: &str = "/dev/kvm";
/// Its own open files, by which a file without a name is opened anew. Nothing else of /proc.
const OWN_FILES: &str = "/proc/self/fd";

/// Something of the host's that is in the jail, too, at the same path.
struct Shown {
    path: PathBuf,
    tree: OwnedFd,
    directory: bool,
    flags: MountFlags,
}

/// Leaves the host's namespaces and root directory.
pub fn enter(config: &MachineConfig) -> Result<(), JailError> {
    let namespaces = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: descriptors stay shared with nobody's but this process's, which has one thread.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }
        .map_err(failed("leave the host's namespaces, which takes root"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(failed("keep its mounts to itself"))?;

    let locked = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let device = MountFlags::NOSUID | MountFlags::NOEXEC;
    let mut shown = vec![take(KVM.as_ref(), device)?, take(OWN_FILES.as_ref(), locked)?];
    let files = match &config.start {
        Start::Boot | Start::Template(_) => [&config.kernel, &config.initramfs],
        Start::Clone(files) => [&files.memory, &files.state],
    };
    for file in BTreeSet::from(files) {
        shown.push(take(file, locked | MountFlags::RDONLY)?);
    }
    // A template is saved to its own. In the pod's everything is made by now: who is there shows what the guest's
    // connections may reach, and whoever opens a name in it on the host finds what was there before the guest ran.
    let saved = match &config.start {
        Start::Template(files) => Some([&files.memory, &files.state]),
        Start::Boot | Start::Clone(_) => None,
    };
    let parents = |paths: &[&PathBuf]| -> BTreeSet<PathBuf> {
        paths.iter().filter_map(|path| path.parent()).map(Path::to_owned).collect()
    };
    let written = parents(saved.as_ref().map_or(&[], |files| files.as_slice()));
    let directories = &parents(&[&config.vsock, &config.control, &config.console]) | &written;
    for directory in &directories {
        let reading = if written.contains(directory) { MountFlags::empty() } else { MountFlags::RDONLY };
        shown.push(take(directory, locked | reading)?);
    }

    // It needs a place until it is the root: what is shown of this one has been taken already.
    let place = directories.first().map_or(Path::new("/"), PathBuf::as_path);
    mount("nacelle-vmm", place, "tmpfs", locked, c"mode=0755,size=64k").map_err(failed("make a root directory"))?;
    rustix::process::chdir(place).map_err(failed("go to its root directory"))?;
    rustix::process::pivot_root(".", ".").map_err(failed("change its root directory"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("leave the host's root directory"))?;
    rustix::process::chdir("/").map_err(failed("go to its root directory"))?;
    for shown in shown {
        attach(shown)?;
    }
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | locked, c"")
        .map_err(failed("make its root directory read-only"))
}

/// Takes hold of what is at `path`, without what is mounted below.
fn take(path: &Path, flags: MountFlags) -> Result<Shown, JailError> {
    let name = || format!("take hold of {}", path.display());
    let directory = fs::metadata(path).map_err(failed(name()))?.is_dir();
    let tree = open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
        .map_err(failed(name()))?;
    Ok(Shown { path: path.into(), tree, directory, flags })
}

/// Puts it into the jail.
fn attach(shown: Shown) -> Result<(), JailError> {
    let Shown { path, tree, directory, flags } = shown;
    let name = || format!("show {} in its root directory", path.display());
    let parent = if directory { Some(path.as_path()) } else { path.parent() };
    parent.map_or(Ok(()), fs::create_dir_all).map_err(failed(name()))?;
    if !directory {
        File::create(&path).map_err(failed(name()))?;
    }
    move_mount(&tree, c"", CWD, &path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed(name()))?;
    mount_remount(&path, MountFlags::BIND | flags, c"").map_err(failed(name()))
}
