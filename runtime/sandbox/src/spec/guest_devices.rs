//! Devices that a guest's kernel has of its own.
//!
//! They are asked for by their names on a host, as a mount or as a device, by containers that are not privileged: a VPN's
//! tunnel, a file system in user space. Nothing of the host's is opened for that: the guest's device of that name works on the
//! guest's network and mounts, which are the pod's.

use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType};

use super::internal;
use crate::Result;
use crate::model::{ContainerConfig, MountSource};

/// Name, and number as in the kernel's list of devices (Documentation/admin-guide/devices.txt).
#[derive(Debug, PartialEq, Eq)]
struct Device(&'static str, i64, i64);

const DEVICES: [Device; 7] = [
    Device("/dev/fuse", 10, 229),
    Device("/dev/net/tun", 10, 200),
    Device("/dev/null", 1, 3),
    Device("/dev/zero", 1, 5),
    Device("/dev/full", 1, 7),
    Device("/dev/random", 1, 8),
    Device("/dev/urandom", 1, 9),
];

fn find(path: &Path) -> Option<&'static Device> {
    DEVICES.iter().find(|Device(name, ..)| path == Path::new(name))
}

/// Whether what the host calls `path` is a device that every guest has itself.
pub fn has(path: &Path) -> bool {
    find(path).is_some()
}

/// What a container may use for having asked for it by name: mounted, as its file's mode says; as a device, as far as it asks.
pub fn rules(config: &ContainerConfig) -> Result<Vec<LinuxDeviceCgroup>> {
    let mounts = config.mounts.iter().filter_map(|mount| match &mount.source {
        MountSource::Host(path) => Some((path.as_path(), "rw")),
        MountSource::Image { .. } => None,
    });
    let devices = config.devices.iter().map(|device| (device.host_path.as_path(), device.permissions.as_str()));
    let rule = |(path, access)| {
        let &Device(_, major, minor) = find(path)?;
        let rule = LinuxDeviceCgroupBuilder::default().allow(true).typ(LinuxDeviceType::C).major(major).minor(minor);
        Some(rule.access(access).build().map_err(internal))
    };
    mounts.chain(devices).filter_map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BlockDevice, Mount, MountAccess, Propagation};

    #[test]
    fn what_a_container_asked_for_by_name_it_may_use_and_nothing_else() {
        let mount = |path: &str| Mount {
            container_path: "/x".into(),
            source: MountSource::Host(path.into()),
            access: MountAccess::Read,
            propagation: Propagation::Private,
            mapped: None,
            options: Vec::new(),
        };
        let device = |path: &str, permissions: &str| BlockDevice {
            host_path: path.into(),
            container_path: "/y".into(),
            permissions: permissions.into(),
        };
        let config = ContainerConfig {
            mounts: vec![mount("/dev/net//tun"), mount("/dev"), mount("/srv")],
            devices: vec![device("/dev/fuse", "rwm"), device("/dev/loop0", "rw")],
            ..ContainerConfig::default()
        };
        let rules = rules(&config).unwrap();
        let seen: Vec<_> =
            rules.iter().map(|rule| (rule.major(), rule.minor(), rule.access().clone().unwrap())).collect();
        assert_eq!(seen, [(Some(10), Some(200), "rw".into()), (Some(10), Some(229), "rwm".into())]);
        assert!(!has(Path::new("/dev/kvm")) && !has(Path::new("/dev/net")));
    }
}
