//! What a container's specification mounts: volumes, images, and disks as devices.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::OciSpecError;
use libcontainer::oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, Spec,
};
use nacelle_proto::agent::v1::{BlockDevice, CreateContainerRequest, Device, ImageVolume};
use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
use rustix::mount::MountFlags;

use super::check_id;
use super::rootfs::{mount_at, unmount_at};
use crate::agent::Agent;
use crate::error::{Error, Result};

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
        for mount in spec.mounts_mut().iter_mut().flatten() {
            let is_bind = mount.typ().as_deref() == Some("bind");
            let Some(source) = mount.source().clone().filter(|source| is_bind && source.is_relative()) else {
                continue;
            };
            let path = self.source(&directory, request, &source)?;
            mount.set_source(Some(path));
        }
        Ok(())
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

    /// Lets go of the images that a container mounts. Blocks.
    pub(super) fn unmount_images(&self, id: &str) -> Result<()> {
        let directory = self.paths.container(id).join("images");
        fs::read_dir(directory).into_iter().flatten().flatten().try_for_each(|entry| unmount_at(&entry.path()))
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
fn within(root: &Path, sub: &str) -> Result<PathBuf> {
    if sub.is_empty() {
        return Ok(root.to_owned());
    }
    let failed = |error: rustix::io::Errno| match error {
        // Also where a link of the image leads to itself, or through a file.
        rustix::io::Errno::NOENT | rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR => {
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
