//! Mounts and devices of containers: the CRI's words to ours and back.

use std::collections::{BTreeMap, HashSet};
use std::path::{Component, Path, PathBuf};

use nacelle_image::{Image, ImageStore};
use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{
    BlockDevice, ContainerConfig, MOUNT_OPTIONS, Mount, MountAccess, MountSource, Propagation, UserNamespace,
};
use tonic::Status;

use crate::namespaces;
use crate::status::{invalid, not_found, unsupported};

/// Translates what is mounted, and refuses what a guest cannot give.
pub fn mounts(mounts: Vec<cri::Mount>) -> Result<Vec<Mount>, Status> {
    let mounts = mounts.into_iter().enumerate().map(|(index, mount)| self::mount(index, mount));
    let mounts = mounts.collect::<Result<Vec<_>, _>>()?;
    let mut taken = HashSet::new();
    for (index, mount) in mounts.iter().enumerate() {
        if !taken.insert(&mount.container_path) {
            let problem = format!("{} is mounted twice", mount.container_path.display());
            return Err(invalid(&format!("config.mounts[{index}].container_path"), problem));
        }
    }
    Ok(mounts)
}

fn mount(index: usize, mount: cri::Mount) -> Result<Mount, Status> {
    let field = |name: &str| format!("config.mounts[{index}].{name}");
    let container_path = container_path(&field("container_path"), &mount.container_path)?;
    let source = match (mount.host_path.as_str(), &mount.image) {
        ("", None) => return Err(invalid(&field("host_path"), "is empty, and there is no image")),
        ("", Some(image)) => {
            if image.image.is_empty() {
                return Err(invalid(&field("image.image"), "is empty"));
            }
            let sub_path = relative(&field("image_sub_path"), &mount.image_sub_path)?;
            MountSource::Image { reference: image.image.clone(), id: String::new(), sub_path }
        }
        (_, Some(_)) => {
            return Err(invalid(&field("host_path"), "is set beside image: only one of them can be mounted"));
        }
        (path, None) if !path.starts_with('/') || path.contains('\0') => {
            return Err(invalid(&field("host_path"), format!("{path:?} is not an absolute path")));
        }
        (path, None) => MountSource::Host(path.into()),
    };
    if matches!(source, MountSource::Host(_)) && !mount.image_sub_path.is_empty() {
        return Err(invalid(&field("image_sub_path"), "is set without an image"));
    }
    if matches!(source, MountSource::Image { .. }) && !mount.readonly {
        return Err(invalid(&field("readonly"), "is not set, but an image cannot be written to: set it"));
    }
    let propagation = match cri::MountPropagation::try_from(mount.propagation) {
        Ok(cri::MountPropagation::PropagationPrivate) => Propagation::Private,
        Ok(cri::MountPropagation::PropagationHostToContainer) => Propagation::HostToContainer,
        Ok(cri::MountPropagation::PropagationBidirectional) => {
            let problem = "mounts that a container makes stay in its guest and cannot appear on the host: set \
                           mountPropagation to HostToContainer or None, or run the pod by another runtime class";
            return Err(unsupported(&field("propagation"), problem));
        }
        Err(_) => return Err(invalid(&field("propagation"), format!("{} is none", mount.propagation))),
    };
    if mount.recursive_read_only && !mount.readonly {
        return Err(invalid(&field("recursive_read_only"), "is set without readonly"));
    }
    if mount.recursive_read_only && propagation != Propagation::Private {
        return Err(invalid(&field("recursive_read_only"), "is set with a propagation: mountPropagation must be None"));
    }
    let mapped = mapped(&field, &mount.uid_mappings, &mount.gid_mappings)?;
    // A label of the host's means nothing in a guest, and the VMM that opens the files has the
    // daemon's own: selinux_relabel has nothing to do.
    let access = match (mount.readonly, mount.recursive_read_only) {
        (false, _) => MountAccess::Write,
        (true, false) => MountAccess::Read,
        (true, true) => MountAccess::ReadAll,
    };
    for (at, option) in mount.mount_options.iter().enumerate() {
        if !MOUNT_OPTIONS.contains(&option.as_str()) {
            let known = MOUNT_OPTIONS.join(", ");
            return Err(invalid(&field(&format!("mount_options[{at}]")), format!("{option:?} is none of {known}")));
        }
    }
    Ok(Mount { container_path, source, access, propagation, mapped, options: mount.mount_options })
}

/// Whose ids a mount's are. Whether they are the pod's is seen where the pod is known.
fn mapped(
    field: &impl Fn(&str) -> String,
    uids: &[cri::IdMapping],
    gids: &[cri::IdMapping],
) -> Result<Option<UserNamespace>, Status> {
    let same = |ids: &[cri::IdMapping]| ids.iter().all(|mapping| mapping.host_id == mapping.container_id);
    if same(uids) && same(gids) {
        return Ok(None);
    }
    for (name, others) in [("uidMappings", gids), ("gidMappings", uids)] {
        if others.is_empty() {
            return Err(invalid(&field(name), "is set alone: users and groups are mapped together, or neither"));
        }
    }
    Ok(Some(UserNamespace {
        uids: namespaces::mapping(&field("uidMappings"), uids)?,
        gids: namespaces::mapping(&field("gidMappings"), gids)?,
    }))
}

/// Where something is to be in a container.
fn container_path(field: &str, path: &str) -> Result<PathBuf, Status> {
    let wrong = |problem: &str| Err(invalid(field, format!("{path:?} {problem}")));
    let parts = Path::new(path);
    match () {
        () if path.is_empty() => Err(invalid(field, "is empty")),
        () if !parts.is_absolute() => wrong("is not an absolute path"),
        () if path.contains('\0') => wrong("contains a NUL"),
        () if parts.components().any(|part| part == Component::ParentDir) => wrong("contains \"..\""),
        () if parts.components().count() < 2 => wrong("is the container's root itself"),
        // Without doubled and trailing slashes.
        () => Ok(parts.components().collect()),
    }
}

/// A path within an image.
fn relative(field: &str, path: &str) -> Result<String, Status> {
    let parts = Path::new(path);
    if parts.is_absolute() || path.contains('\0') || parts.components().any(|part| part == Component::ParentDir) {
        return Err(invalid(field, format!("{path:?} must be relative to the image's root and stay in it")));
    }
    Ok(path.to_owned())
}

/// Finds the images that a container mounts, and notes their ids.
pub fn images(config: &mut ContainerConfig, store: &ImageStore) -> Result<BTreeMap<String, Image>, Status> {
    let mut found = BTreeMap::new();
    for (index, mount) in config.mounts.iter_mut().enumerate() {
        if let MountSource::Image { reference, id, .. } = &mut mount.source {
            let image = store.get(reference).ok_or_else(|| {
                let problem =
                    format!("config.mounts[{index}].image: image {reference:?} is not present: pull it first");
                not_found(problem)
            })?;
            id.clone_from(&image.id);
            found.insert(image.id.clone(), image);
        }
    }
    Ok(found)
}

/// Translates devices. Whether they are block devices is seen when they are opened.
pub fn devices(devices: Vec<cri::Device>, cdi: &[cri::CdiDevice]) -> Result<Vec<BlockDevice>, Status> {
    if let Some(device) = cdi.first() {
        let problem = format!("{:?} is a device of the host, which is not given to a guest", device.name);
        return Err(unsupported("config.CDI_devices[0]", problem));
    }
    let device = |(index, device): (usize, cri::Device)| {
        let field = |name: &str| format!("config.devices[{index}].{name}");
        let container_path = container_path(&field("container_path"), &device.container_path)?;
        if !device.host_path.starts_with('/') || device.host_path.contains('\0') {
            return Err(invalid(&field("host_path"), format!("{:?} is not an absolute path", device.host_path)));
        }
        let permissions = match device.permissions.as_str() {
            "" => "rwm".to_owned(),
            given if given.chars().all(|letter| "rwm".contains(letter)) => given.to_owned(),
            given => return Err(invalid(&field("permissions"), format!("{given:?} has more than r, w and m"))),
        };
        Ok(BlockDevice { host_path: device.host_path.into(), container_path, permissions })
    };
    devices.into_iter().enumerate().map(device).collect()
}

/// Mounts as ContainerStatus shows them.
pub fn back(mounts: &[Mount]) -> Vec<cri::Mount> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mount = |mount: &Mount| {
        let (host_path, image, image_sub_path) = match &mount.source {
            MountSource::Host(path) => (text(path), None, String::new()),
            MountSource::Image { reference, id, sub_path } => {
                let image =
                    cri::ImageSpec { image: reference.clone(), image_ref: id.clone(), ..cri::ImageSpec::default() };
                (String::new(), Some(image), sub_path.clone())
            }
        };
        let propagation = match mount.propagation {
            Propagation::Private => cri::MountPropagation::PropagationPrivate,
            Propagation::HostToContainer => cri::MountPropagation::PropagationHostToContainer,
        };
        cri::Mount {
            container_path: text(&mount.container_path),
            host_path,
            readonly: mount.access != MountAccess::Write,
            recursive_read_only: mount.access == MountAccess::ReadAll,
            propagation: propagation.into(),
            image,
            image_sub_path,
            uid_mappings: mount.mapped.map(|mapped| namespaces::mapping_back(mapped.uids)).into_iter().collect(),
            gid_mappings: mount.mapped.map(|mapped| namespaces::mapping_back(mapped.gids)).into_iter().collect(),
            mount_options: mount.options.clone(),
            ..cri::Mount::default()
        }
    };
    mounts.iter().map(mount).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> cri::Mount {
        cri::Mount { container_path: "/data".into(), host_path: "/srv".into(), ..cri::Mount::default() }
    }

    #[test]
    fn each_field_that_cannot_be_is_named() {
        type Spoil = fn(&mut cri::Mount);
        fn image(name: &str) -> Option<cri::ImageSpec> {
            Some(cri::ImageSpec { image: name.into(), ..cri::ImageSpec::default() })
        }
        fn mapping(host_id: u32) -> Vec<cri::IdMapping> {
            vec![cri::IdMapping { host_id, container_id: 0, length: 10 }]
        }
        let cases: &[(&str, Spoil)] = &[
            ("container_path", |m| m.container_path = String::new()),
            ("container_path", |m| m.container_path = "data".into()),
            ("container_path", |m| m.container_path = "/a/../b".into()),
            ("container_path", |m| m.container_path = "//".into()),
            ("host_path", |m| m.host_path = String::new()),
            ("host_path", |m| m.host_path = "srv".into()),
            ("host_path", |m| m.image = image("busybox")),
            ("image.image", |m| (m.host_path, m.image) = (String::new(), image(""))),
            ("image_sub_path", |m| m.image_sub_path = "a".into()),
            ("image_sub_path", |m| {
                (m.host_path, m.image, m.image_sub_path) = (String::new(), image("b"), "a/../..".into());
            }),
            ("readonly", |m| (m.host_path, m.image) = (String::new(), image("busybox"))),
            ("propagation", |m| m.propagation = 7),
            ("propagation", |m| m.propagation = cri::MountPropagation::PropagationBidirectional.into()),
            ("recursive_read_only", |m| m.recursive_read_only = true),
            ("recursive_read_only", |m| {
                (m.readonly, m.recursive_read_only) = (true, true);
                m.propagation = cri::MountPropagation::PropagationHostToContainer.into();
            }),
            ("mount_options[1]", |m| m.mount_options = vec!["noexec".into(), "size=1m".into()]),
            ("mount_options[0]", |m| m.mount_options = vec!["rshared".into()]),
            ("uidMappings", |m| m.uid_mappings = mapping(100_000)),
            ("gidMappings", |m| m.gid_mappings = mapping(100_000)),
        ];
        for (field, spoil) in cases {
            let mut mount = asked();
            spoil(&mut mount);
            let status = mounts(vec![cri::Mount { container_path: "/x".into(), ..asked() }, mount]).unwrap_err();
            let expected = format!("config.mounts[1].{field}: ");
            assert!(status.message().starts_with(&expected), "{expected}: {}", status.message());
        }
        let twice = mounts(vec![asked(), cri::Mount { container_path: "/data/".into(), ..asked() }]).unwrap_err();
        assert!(twice.message().starts_with("config.mounts[1].container_path: "), "{}", twice.message());
    }

    #[test]
    fn ids_are_mapped_as_one_range_from_0_or_refused_by_field() {
        let ids = |container_id, host_id, length| vec![cri::IdMapping { host_id, container_id, length }];
        let usual = || ids(0, 100_000, 65_536);
        let mount = |uid_mappings, gid_mappings| {
            mounts(vec![cri::Mount { uid_mappings, gid_mappings, ..asked() }]).map(|mounts| mounts[0].mapped)
        };
        let mapped = mount(usual(), ids(0, 200_000, 65_536)).unwrap().unwrap();
        assert_eq!((mapped.uids.host_id, mapped.gids.host_id, mapped.gids.length), (100_000, 200_000, 65_536));
        assert_eq!(mount(ids(7, 7, 3), vec![]).unwrap(), None, "mapped to the same");
        for (uids, gids, field) in [
            (usual(), vec![], "uidMappings"),
            (vec![], usual(), "gidMappings"),
            ([usual(), usual()].concat(), usual(), "uidMappings"),
            (usual(), ids(1, 100_000, 65_536), "gidMappings"),
            (usual(), ids(0, 100_000, 0), "gidMappings"),
        ] {
            let status = mount(uids, gids).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().starts_with(&format!("config.mounts[0].{field}: ")), "{}", status.message());
        }
    }

    #[test]
    fn what_was_asked_for_is_shown_again() {
        let same = cri::IdMapping { host_id: 0, container_id: 0, length: 65_536 };
        let mount = cri::Mount {
            readonly: true,
            propagation: cri::MountPropagation::PropagationHostToContainer.into(),
            mount_options: vec!["noexec".into(), "nosuid".into()],
            ..asked()
        };
        let with_ids = cri::Mount { uid_mappings: vec![same], selinux_relabel: true, ..mount.clone() };
        assert_eq!(back(&mounts(vec![with_ids]).unwrap()), std::slice::from_ref(&mount));
        let ids = vec![cri::IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
        let mapped = cri::Mount { uid_mappings: ids.clone(), gid_mappings: ids, ..mount };
        assert_eq!(back(&mounts(vec![mapped.clone()]).unwrap()), [mapped]);
    }

    #[test]
    fn devices_are_checked_field_by_field() {
        let device = || cri::Device {
            container_path: "/dev/xvda".into(),
            host_path: "/dev/loop0".into(),
            permissions: "rw".into(),
        };
        assert_eq!(devices(vec![device()], &[]).unwrap()[0].permissions, "rw");
        let unset = cri::Device { permissions: String::new(), ..device() };
        assert_eq!(devices(vec![unset], &[]).unwrap()[0].permissions, "rwm");
        let wrong = [
            ("container_path", cri::Device { container_path: "dev".into(), ..device() }),
            ("host_path", cri::Device { host_path: "loop0".into(), ..device() }),
            ("permissions", cri::Device { permissions: "rwx".into(), ..device() }),
        ];
        for (field, wrong) in wrong {
            let status = devices(vec![device(), wrong], &[]).unwrap_err();
            assert!(status.message().starts_with(&format!("config.devices[1].{field}: ")), "{}", status.message());
        }
    }
}
