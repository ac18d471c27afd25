//! The root file system of a container: the image's EROFS below, an upper layer of the
//! pod's scratch disk above.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move, unmount};

use crate::error::{Error, Result};
use crate::namespaces::{PodNamespaces, mount_mapped};
use crate::paths::Paths;
use crate::patience::scaled;

/// How long a busy mount is waited for before it is only detached.
const PATIENCE: Duration = Duration::from_secs(1);

/// The directories and mounts of one container.
#[derive(Debug)]
pub struct RootFs {
    directory: PathBuf,
    upper: PathBuf,
}

impl RootFs {
    /// The places for container `id`; nothing is made yet.
    pub fn new(paths: &Paths, id: &str) -> Self {
        Self { directory: paths.container(id), upper: paths.upper(id) }
    }

    /// Where the container's root is mounted.
    pub fn root(&self) -> PathBuf {
        self.directory.join("rootfs")
    }

    fn lower(&self) -> PathBuf {
        self.directory.join("lower")
    }

    fn mapped(&self) -> PathBuf {
        self.directory.join("mapped")
    }

    /// Mounts the image on `device` and the overlay over it. To the pod's user namespace, if
    /// it has one, the files belong to whom they belong to in the image. Blocks.
    pub fn mount(&self, device: &Path, namespaces: Option<&PodNamespaces>) -> Result<()> {
        let (lower, root) = (self.lower(), self.root());
        let (upper, work) = (self.upper.join("upper"), self.upper.join("work"));
        for directory in [&lower, &root, &upper, &work] {
            fs::create_dir_all(directory).map_err(Error::path("make the directory", directory))?;
        }
        let image = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOATIME;
        mount_at(device, &lower, "erofs", image, "")?;
        if let Some(namespaces) = namespaces {
            // An overlay as a whole cannot be mapped, what it is made of can. The upper layer
            // holds the ids of the guest.
            self.map_lower(namespaces)?;
            namespaces.give(&upper)?;
        }
        // The upper layer dies with the pod: nothing is gained by waiting for the disk.
        let options = format!(
            "lowerdir={},upperdir={},workdir={},volatile,xino=off",
            lower.display(),
            upper.display(),
            work.display()
        );
        mount_at(Path::new("overlay"), &root, "overlay", MountFlags::NOATIME, &options)
    }

    /// Puts a mapped view of the image in the place of the image.
    fn map_lower(&self, namespaces: &PodNamespaces) -> Result<()> {
        let (lower, mapped) = (self.lower(), self.mapped());
        fs::create_dir_all(&mapped).map_err(Error::path("make the directory", &mapped))?;
        mount_mapped(&lower, &mapped, namespaces.user(), false)?;
        unmount_at(&lower)?;
        mount_move(&mapped, &lower).map_err(|error| Error::path("move to its place", mapped)(error.into()))
    }

    /// Undoes [`RootFs::mount`], however far it came. Blocks.
    pub fn unmount(&self) -> Result<()> {
        unmount_at(&self.root())?;
        unmount_at(&self.mapped())?;
        unmount_at(&self.lower())
    }

    /// Removes the container's directories; they must hold no mount any more. Blocks.
    pub fn remove(&self) -> Result<()> {
        for directory in [&self.directory, &self.upper] {
            match fs::remove_dir_all(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::path("remove the directory", directory)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Mounts `source`, naming it in the error.
pub fn mount_at(source: &Path, target: &Path, kind: &'static str, flags: MountFlags, options: &str) -> Result<()> {
    let options = std::ffi::CString::new(options).map_err(|_| Error::invalid("mount options", "they contain a NUL"))?;
    mount(source, target, kind, flags, options.as_c_str()).map_err(|error| {
        let action = match kind {
            "erofs" => "mount as erofs",
            "ext4" => "mount as ext4",
            "virtiofs" => "mount as virtiofs",
            "overlay" => "mount the overlay on",
            _ => "mount",
        };
        let subject = if kind == "overlay" { target } else { source };
        Error::path(action, subject)(error.into())
    })
}

/// Unmounts `target`; one that is no mount point is fine.
pub fn unmount_at(target: &Path) -> Result<()> {
    let deadline = Instant::now() + scaled(PATIENCE);
    loop {
        match unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            // The mount namespace of a killed process may take a moment to go.
            Err(Errno::BUSY) if Instant::now() < deadline => sleep(Duration::from_millis(5)),
            Err(Errno::BUSY) => {
                return unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
                    .map_err(|error| Error::path("detach", target)(error.into()));
            }
            Err(error) => return Err(Error::path("unmount", target)(error.into())),
        }
    }
}
