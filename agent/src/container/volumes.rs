//! What a container's specification mounts: volumes, images, and disks as devices.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::OciSpecError;
use libcontainer::oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, Spec,
};
use nacelle_proto::agent::v1::{BlockDevice, CreateContainerRequest, Device, ImageVolume};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, chmod, makedev, mknodat, open, openat2};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::rootfs::{mount_at, unmount_at};
use super::{check_id, user_namespace};
use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::namespaces::{PodNamespaces, mount_mapped};

/// Mode of a disk's file in a container, and the group that most images call "disk".
const DISK_MODE: u32 = 0o660;
const DISK_GROUP: u32 = 6;

/// Slots of the devices that a request names beside the root's.
pub fn slots(request: &CreateContainerRequest) -> Vec<u32> {
    let images = request.images.iter().filter_map(|image| image.device.as_ref());
    let disks = request.block_devices.iter().filter_map(|disk| disk.device.as_ref());
    images.chain(disks).map(|device| device.slot).collect()
}

fn slot(field: &'static str, device: Option<&Device>) -> Result<u32> {
    device.map(|device| device.slot).ok_or_else(|| Error::invalid(field, "has no device"))
}

impl Agent {
    /// Makes the sources of the specification's bind mounts paths of the guest. Blocks.
    pub(super) fn bind_sources(&self, id: &str, request: &CreateContainerRequest, spec: &mut Spec) -> Result<()> {
        if let Some(device) = &request.volumes {
            self.mount_volumes(device.slot)?;
        }
        let directory = self.paths.container(id).join("images");
        for image in &request.images {
            self.mount_image(&directory, image)?;
        }
        for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
            let is_bind = mount.typ().as_deref() == Some("bind");
            let Some(source) = mount.source().clone().filter(|source| is_bind && source.is_relative()) else {
                continue;
            };
            let mut path = self.source(&directory, request, &source)?;
            if user_namespace::take_mapping(mount, self.sandbox.namespaces().map(|namespaces| namespaces.ids))? {
                path = self.map_source(id, index, &path)?;
            }
            mount.set_source(Some(path));
        }
        Ok(())
    }

    /// A view of `source` whose ids are the pod's, for one container.
    fn map_source(&self, id: &str, index: usize, source: &Path) -> Result<PathBuf> {
        let Some(namespaces) = self.sandbox.namespaces() else { return Ok(source.to_owned()) };
        let directory = self.paths.container(id).join("mapped-volumes");
        fs::create_dir_all(&directory).map_err(Error::path("make the directory", &directory))?;
        let target = directory.join(index.to_string());
        // Of its kind, for one to be mounted on the other. Looking also waits for the device's
        // answer on what it can do, which a mapped mount depends on.
        let metadata = fs::metadata(source).map_err(Error::path("look at", source))?;
        let made = if metadata.is_dir() { fs::create_dir(&target) } else { File::create(&target).map(drop) };
        made.map_err(Error::path("make the mount point", &target))?;
        mount_mapped(source, &target, namespaces.user(), true)?;
        Ok(target)
    }

    /// The path of `volumes/NAME` or `images/NAME`.
    fn source(&self, images: &Path, request: &CreateContainerRequest, source: &Path) -> Result<PathBuf> {
        let unknown =
            || Error::invalid("spec_json: mounts.source", format!("nothing is known of {}", source.display()));
        let (kind, name) = source.to_str().and_then(|source| source.split_once('/')).ok_or_else(unknown)?;
        check_id("spec_json: mounts.source", name)?;
        match kind {
            "volumes" if request.volumes.is_some() => Ok(self.paths.volumes().join(name)),
            "images" => {
                let image = request.images.iter().find(|image| image.name == name).ok_or_else(unknown)?;
                within(&images.join(name), &image.sub_path)
            }
            _ => Err(unknown()),
        }
    }

    fn mount_image(&self, directory: &Path, image: &ImageVolume) -> Result<()> {
        check_id("images.name", &image.name)?;
        let device = self.bus.block_device(slot("images", image.device.as_ref())?)?;
        let target = directory.join(&image.name);
        fs::create_dir_all(&target).map_err(Error::path("make the directory", &target))?;
        let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME;
        mount_at(&device, &target, "erofs", flags, "")
    }

    /// Lets go of what a container mounts, and of its device files. Blocks.
    pub(super) fn unmount_sources(&self, id: &str) -> Result<()> {
        for name in ["mapped-volumes", "images"] {
            let directory = self.paths.container(id).join(name);
            fs::read_dir(directory).into_iter().flatten().flatten().try_for_each(|entry| unmount_at(&entry.path()))?;
        }
        let devices = self.paths.devices().join(id);
        match fs::remove_dir_all(&devices) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::path("remove the directory", devices)(error))
            }
            _ => Ok(()),
        }
    }

    /// Has a container in the pod's user namespace, which may not make device files, find this
    /// one in its /dev. Blocks.
    pub(super) fn bind_disk(
        &self,
        id: &str,
        spec: &mut Spec,
        device: &LinuxDevice,
        namespaces: &PodNamespaces,
    ) -> Result<()> {
        let devices = self.paths.devices();
        if !devices.exists() {
            fs::create_dir_all(&devices).map_err(Error::path("make the directory", &devices))?;
            // The agent's other places are on file systems where device files do not work.
            let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
            mount_at(Path::new("tmpfs"), &devices, "tmpfs", flags, "mode=755,size=1m")?;
        }
        let directory = devices.join(id);
        fs::create_dir_all(&directory).map_err(Error::path("make the directory", &directory))?;
        let number = |number: i64| u32::try_from(number).unwrap_or_default();
        let (major, minor) = (number(device.major()), number(device.minor()));
        let file = directory.join(format!("{major}:{minor}"));
        let failed = |error: Errno| Error::path("make the device file", &file)(error.into());
        let mode = Mode::from_raw_mode(DISK_MODE);
        mknodat(CWD, &file, FileType::BlockDevice, mode, makedev(major, minor)).map_err(failed)?;
        // Whatever the umask.
        chmod(&file, mode).map_err(failed)?;
        let owner = (namespaces.ids.root().0, namespaces.ids.group_or_root(DISK_GROUP));
        std::os::unix::fs::chown(&file, Some(owner.0), Some(owner.1))
            .map_err(Error::path("give to the pod's root", &file))?;
        user_namespace::bind_device(spec, file, device.path().clone())
    }

    /// The container's disks, as its device files and what its policy allows. Blocks.
    pub(super) fn disks(&self, request: &CreateContainerRequest) -> Result<Vec<(LinuxDevice, LinuxDeviceCgroup)>> {
        request.block_devices.iter().map(|disk| self.disk(disk)).collect()
    }

    fn disk(&self, disk: &BlockDevice) -> Result<(LinuxDevice, LinuxDeviceCgroup)> {
        let file = self.bus.block_device(slot("block_devices", disk.device.as_ref())?)?;
        let number = fs::metadata(&file).map_err(Error::path("look at", &file))?.rdev();
        let (major, minor) = (i64::from(libc::major(number)), i64::from(libc::minor(number)));
        let invalid = |error: OciSpecError| Error::invalid("block_devices", error.to_string());
        let device = LinuxDeviceBuilder::default()
            .path(&disk.path)
            .typ(LinuxDeviceType::B)
            .major(major)
            .minor(minor)
            .file_mode(DISK_MODE)
            .uid(0_u32)
            .gid(DISK_GROUP)
            .build()
            .map_err(invalid)?;
        let allowed = LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .typ(LinuxDeviceType::B)
            .major(major)
            .minor(minor)
            .access(&disk.permissions)
            .build()
            .map_err(invalid)?;
        Ok((device, allowed))
    }
}

/// The path of `sub` in the mounted image at `root`, whose links are followed inside of it.
pub(super) fn within(root: &Path, sub: &str) -> Result<PathBuf> {
    if sub.is_empty() {
        return Ok(root.to_owned());
    }
    let failed = |error: Errno| match error {
        // Also where a link of the image leads to itself, or through a file.
        Errno::NOENT | Errno::LOOP | Errno::NOTDIR => {
            Error::invalid("images.sub_path", format!("the image has no {sub:?}"))
        }
        error => Error::Path { action: "find in the image", path: sub.into(), source: error.into() },
    };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let top = open(root, flags | OFlags::DIRECTORY, Mode::empty()).map_err(failed)?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let found = openat2(&top, sub, flags, Mode::empty(), resolve).map_err(failed)?;
    let link = format!("/proc/self/fd/{}", found.as_raw_fd());
    fs::read_link(&link).map_err(Error::path("resolve", link))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_an_image_is_found_inside_of_it_only() {
        let image = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(image.path()).unwrap();
        fs::create_dir_all(root.join("a/b")).unwrap();
        std::os::unix::fs::symlink("/a", root.join("link")).unwrap();
        std::os::unix::fs::symlink("/etc", root.join("etc")).unwrap();
        assert_eq!(within(&root, "").unwrap(), root);
        assert_eq!(within(&root, "link/b").unwrap(), root.join("a/b"));
        assert_eq!(within(&root, "../../a").unwrap(), root.join("a"));
        for missing in ["nothing", "etc", "etc/passwd"] {
            assert!(
                matches!(within(&root, missing), Err(Error::Invalid { field: "images.sub_path", .. })),
                "{missing}"
            );
        }
    }
}
