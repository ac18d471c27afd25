//! What is mounted in a container beside its root.

use std::path::{Path, PathBuf};

use oci_spec::OciSpecError;
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, Mount, MountBuilder};

use super::guest_devices;
use crate::model::{self, BlockDevice, IdMapping, MountAccess, MountSource, UserNamespace};
use crate::volumes;

/// A mount of the container's own, as the guest is to make it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// In the agent's words: `volumes/NAME` or `images/NAME`; or the path of a device of the guest's own.
    pub source: String,
    /// Whether the container sees it read-only.
    pub read_only: bool,
}

impl Bind {
    /// What `mounts[index]` of a container becomes, if nothing is known of the host yet.
    pub fn of(container: &str, index: usize, mount: &model::Mount) -> Self {
        let name = volumes::name(container, index);
        match &mount.source {
            MountSource::Host(path) if guest_devices::has(path) => Self::guest_device(path),
            MountSource::Host(_) => {
                Self { source: format!("volumes/{name}"), read_only: mount.access != MountAccess::Write }
            }
            MountSource::Image { .. } => Self { source: format!("images/{name}"), read_only: true },
        }
    }

    /// A device file is written to whether or not its mount is read-only.
    fn guest_device(path: &Path) -> Self {
        // As the kernel calls it, without doubled slashes.
        let path: PathBuf = path.components().collect();
        Self { source: path.to_string_lossy().into_owned(), read_only: false }
    }

    fn is_guest_device(&self) -> bool {
        self.source.starts_with('/')
    }
}

/// Builds the mounts: those that every container has, and those of its own, each of which
/// replaces what would be at its place otherwise, and of `devices` those that the guest has itself. A privileged container may
/// write to `/sys` and the cgroups. Images are mapped for the container's user namespace, if it is in one:
/// nobody else has a say in whose their files are.
pub fn build(
    privileged: bool,
    own: &[(&model::Mount, Bind)],
    devices: &[BlockDevice],
    namespace: Option<UserNamespace>,
) -> Result<Vec<Mount>, OciSpecError> {
    let access = if privileged { "rw" } else { "ro" };
    let mount = |destination: &Path, kind: &str, source: &str, options: &[&str]| {
        MountBuilder::default()
            .destination(destination)
            .typ(kind)
            .source(source)
            .options(options.iter().map(ToString::to_string).collect::<Vec<_>>())
            .build()
    };
    let mut mounts = [
        ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"][..]),
        ("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        // Shared memory and message queues belong to the pod, like the IPC namespace.
        ("/dev/shm", "bind", "/dev/shm", &["rbind", "nosuid", "noexec", "nodev"]),
        ("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        ("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access]),
        ("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access]),
    ]
    .into_iter()
    .filter(|(destination, ..)| !own.iter().any(|(mount, _)| mount.container_path.as_os_str() == *destination))
    .map(|(destination, kind, source, options)| mount(destination.as_ref(), kind, source, options))
    .collect::<Result<Vec<_>, _>>()?;
    for (asked, bind) in own {
        let access = if bind.read_only { "ro" } else { "rw" };
        let options: Vec<_> =
            ["rbind", "rprivate", access].into_iter().chain(asked.options.iter().map(String::as_str)).collect();
        let mut mount = mount(&asked.container_path, "bind", &bind.source, &options)?;
        let mapped = if matches!(asked.source, MountSource::Image { .. }) { namespace } else { asked.mapped };
        if let Some(UserNamespace { uids, gids }) = mapped.filter(|_| !bind.is_guest_device()) {
            mount.set_uid_mappings(Some(vec![mapping(uids)?])).set_gid_mappings(Some(vec![mapping(gids)?]));
        }
        mounts.push(mount);
    }
    for device in devices.iter().filter(|device| guest_devices::has(&device.host_path)) {
        let bind = Bind::guest_device(&device.host_path);
        mounts.push(mount(&device.container_path, "bind", &bind.source, &["rbind", "rprivate", "rw"])?);
    }
    // What lies in another comes after it, in whatever order they were asked for.
    mounts.sort_by_key(|mount| mount.destination().components().count());
    Ok(mounts)
}

fn mapping(ids: IdMapping) -> Result<LinuxIdMapping, OciSpecError> {
    LinuxIdMappingBuilder::default().container_id(0_u32).host_id(ids.host_id).size(ids.length).build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Propagation;

    fn asked(path: &str, access: MountAccess) -> model::Mount {
        model::Mount {
            container_path: path.into(),
            source: MountSource::Host("/srv".into()),
            access,
            propagation: Propagation::Private,
            mapped: None,
            options: Vec::new(),
        }
    }

    #[test]
    fn what_is_mapped_says_for_whom() {
        let ids = IdMapping { host_id: 1000, length: 65_536 };
        let namespace = UserNamespace { uids: ids, gids: IdMapping { host_id: 2000, ..ids } };
        let image = MountSource::Image { reference: "i".into(), id: "i".into(), sub_path: String::new() };
        let asked = [
            asked("/plain", MountAccess::Write),
            model::Mount { mapped: Some(namespace), ..asked("/mapped", MountAccess::Write) },
            model::Mount { source: image, ..asked("/image", MountAccess::Write) },
        ];
        let own: Vec<_> = asked.iter().enumerate().map(|(index, mount)| (mount, Bind::of("c", index, mount))).collect();
        let mapped = |namespace| {
            let mounts = build(false, &own, &[], namespace).unwrap();
            let of = |path: &str| {
                let mount = mounts.iter().find(|mount| mount.destination().as_os_str() == path).unwrap();
                let first =
                    |ids: &Option<Vec<LinuxIdMapping>>| ids.as_ref().map(|ids| (ids[0].host_id(), ids[0].size()));
                (first(mount.uid_mappings()), first(mount.gid_mappings()))
            };
            ["/plain", "/mapped", "/image", "/proc"].map(of)
        };
        let (none, all) = ((None, None), (Some((1000, 65_536)), Some((2000, 65_536))));
        assert_eq!(mapped(Some(namespace)), [none, all, all, none]);
        assert_eq!(mapped(None)[2], none);
    }

    #[test]
    fn a_mount_has_the_options_that_were_asked_for() {
        let asked =
            model::Mount { options: vec!["noexec".into(), "nosuid".into()], ..asked("/data", MountAccess::Read) };
        let mounts = build(false, &[(&asked, Bind::of("c", 0, &asked))], &[], None).unwrap();
        let mount = mounts.iter().find(|mount| mount.destination().ends_with("data")).unwrap();
        assert_eq!(mount.options().clone().unwrap(), ["rbind", "rprivate", "ro", "noexec", "nosuid"]);
    }

    #[test]
    fn own_mounts_replace_the_usual_ones_and_parents_come_first() {
        let asked = [
            asked("/data/sub", MountAccess::Read),
            asked("/dev/shm", MountAccess::Write),
            asked("/data", MountAccess::Write),
        ];
        let own: Vec<_> = asked.iter().enumerate().map(|(index, mount)| (mount, Bind::of("c", index, mount))).collect();
        let mounts = build(false, &own, &[], None).unwrap();
        let find = |path: &str| mounts.iter().position(|mount| mount.destination().as_os_str() == path).unwrap();
        assert!(find("/data") < find("/data/sub") && find("/dev") < find("/dev/shm"));
        let shm: Vec<_> = mounts.iter().filter(|mount| mount.destination().ends_with("shm")).collect();
        assert_eq!(shm.len(), 1);
        assert_eq!(shm[0].source().as_deref(), Some("volumes/c.1".as_ref()));
        let options = |path: &str| mounts[find(path)].options().clone().unwrap();
        assert!(options("/data/sub").contains(&"ro".to_owned()));
        assert!(options("/data").contains(&"rw".to_owned()));
    }

    #[test]
    fn a_device_that_the_guest_has_is_its_own() {
        let ids = IdMapping { host_id: 1000, length: 65_536 };
        let tunnel = model::Mount {
            source: MountSource::Host("/dev/net/tun".into()),
            mapped: Some(UserNamespace { uids: ids, gids: ids }),
            ..asked("/dev/net/tun", MountAccess::Read)
        };
        let own = [(&tunnel, Bind::of("c", 0, &tunnel))];
        let device = |host: &str, container: &str| BlockDevice {
            host_path: host.into(),
            container_path: container.into(),
            permissions: "rw".into(),
        };
        let devices = [device("/dev/fuse", "/dev/myfuse"), device("/dev/loop0", "/dev/xvda")];
        let mounts = build(false, &own, &devices, None).unwrap();
        let source = |path: &str| {
            let found = mounts.iter().find(|mount| mount.destination().as_os_str() == path);
            found.map(|mount| (mount.source().clone().unwrap(), mount.uid_mappings().is_some()))
        };
        assert_eq!(source("/dev/net/tun"), Some(("/dev/net/tun".into(), false)));
        assert_eq!(source("/dev/myfuse"), Some(("/dev/fuse".into(), false)));
        assert_eq!(source("/dev/xvda"), None, "a disk has a device file");
    }
}
