//! What is different about a container in the pod's user namespace.

use std::path::PathBuf;

use libcontainer::oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount, MountBuilder, Spec};

use super::spec;
use crate::error::{Error, Result};
use crate::ids::{IdMap, Ids};
use crate::namespaces::PodNamespaces;

/// The namespaces that it joins beside its PID namespace, and their files.
const JOINED: [(LinuxNamespaceType, &str); 4] = [
    (LinuxNamespaceType::User, "user"),
    (LinuxNamespaceType::Uts, "uts"),
    (LinuxNamespaceType::Ipc, "ipc"),
    (LinuxNamespaceType::Network, "net"),
];

/// Has the container join the pod's namespaces, except for what its specification lists
/// itself, and mount nothing that cannot be mounted in them.
pub fn join(spec: &mut Spec, namespaces: &PodNamespaces) -> Result<()> {
    for (kind, name) in JOINED {
        let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        if !listed.is_some_and(|listed| listed.iter().any(|namespace| namespace.typ() == kind)) {
            spec::join_namespace(spec, kind, namespaces.file(name))?;
        }
    }
    leave_out_unmapped_groups(spec, namespaces.ids);
    Ok(())
}

/// Terminals belong to a group of their own, if the namespace has it.
fn leave_out_unmapped_groups(spec: &mut Spec, ids: IdMap) {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        if mount.typ().as_deref() != Some("devpts") {
            continue;
        }
        let unmapped = |option: &String| {
            let gid = option.strip_prefix("gid=").and_then(|gid| gid.parse().ok());
            gid.is_some_and(|gid| ids.gids.outside(gid).is_none())
        };
        if let Some(options) = mount.options_mut() {
            options.retain(|option| !unmapped(option));
        }
    }
}

/// Takes the mappings off a mount, which libcontainer would not apply; answers whether it
/// has any. They must be those of the pod's user namespace.
pub fn take_mapping(mount: &mut Mount, ids: Option<IdMap>) -> Result<bool> {
    let (uids, gids) = (mount.uid_mappings().clone(), mount.gid_mappings().clone());
    mount.set_uid_mappings(None).set_gid_mappings(None);
    let given = |mappings: &Option<Vec<LinuxIdMapping>>| mappings.as_ref().is_some_and(|mappings| !mappings.is_empty());
    if !given(&uids) && !given(&gids) {
        return Ok(false);
    }
    let is = |mappings: Option<Vec<LinuxIdMapping>>, ids: Ids| match mappings.as_deref() {
        Some([one]) => ids.is(one.container_id(), one.host_id(), one.size()),
        _ => false,
    };
    match ids {
        Some(ids) if is(uids, ids.uids) && is(gids, ids.gids) => Ok(true),
        _ => {
            let reason = format!(
                "{} has another uidMappings or gidMappings than the pod's user namespace",
                mount.destination().display()
            );
            Err(Error::invalid("spec_json: mounts", reason))
        }
    }
}

/// Has the container find the device file `source` at `destination`.
pub fn bind_device(spec: &mut Spec, source: PathBuf, destination: PathBuf) -> Result<()> {
    let mount = MountBuilder::default()
        .source(source)
        .destination(destination)
        .typ("bind")
        .options(["bind", "rprivate", "nosuid", "noexec"].map(str::to_owned).to_vec())
        .build()
        .map_err(|error| Error::invalid("block_devices", error.to_string()))?;
    spec.mounts_mut().get_or_insert_default().push(mount);
    Ok(())
}

#[cfg(test)]
mod tests {
    use nacelle_proto::agent::v1 as api;
    use serde_json::{Value, json};

    use super::*;

    fn ids(length: u32) -> IdMap {
        let ids = Some(api::IdMapping { host_id: 1000, length });
        IdMap::parse(&api::UserNamespace { uids: ids, gids: ids }).unwrap()
    }

    #[test]
    fn a_mount_s_mapping_is_the_pod_s_or_refused() {
        let mount = |uids: Value, gids: Value| -> Mount {
            let mount = json!({"destination": "/data", "source": "volumes/x", "type": "bind",
                               "uidMappings": uids, "gidMappings": gids});
            serde_json::from_value(mount).unwrap()
        };
        let mapping = |inside: u32, outside: u32| json!([{"containerID": inside, "hostID": outside, "size": 65536}]);
        let mut mapped = mount(mapping(0, 1000), mapping(0, 1000));
        assert!(take_mapping(&mut mapped, Some(ids(65_536))).unwrap());
        assert_eq!((mapped.uid_mappings(), mapped.gid_mappings()), (&None, &None), "libcontainer knows none");
        assert!(!take_mapping(&mut mount(json!([]), Value::Null), Some(ids(65_536))).unwrap());
        for (mut mount, ids) in [
            (mount(mapping(0, 1000), mapping(0, 1000)), None),
            (mount(mapping(0, 1000), mapping(0, 1000)), Some(ids(65_535))),
            (mount(mapping(0, 1000), mapping(0, 2000)), Some(ids(65_536))),
            (mount(mapping(1, 1000), mapping(0, 1000)), Some(ids(65_536))),
            (mount(Value::Null, mapping(0, 1000)), Some(ids(65_536))),
        ] {
            assert!(matches!(take_mapping(&mut mount, ids), Err(Error::Invalid { field: "spec_json: mounts", .. })));
        }
    }

    #[test]
    fn terminals_have_their_group_where_it_is_mapped() {
        let options = |length: u32| {
            let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.1.0", "mounts": [
                {"destination": "/dev/pts", "source": "devpts", "type": "devpts", "options": ["nosuid", "gid=5"]},
                {"destination": "/tmp", "source": "tmpfs", "type": "tmpfs", "options": ["gid=5"]}]}))
            .unwrap();
            leave_out_unmapped_groups(&mut spec, ids(length));
            spec.mounts().iter().flatten().map(|mount| mount.options().clone().unwrap().len()).collect::<Vec<_>>()
        };
        assert_eq!(options(6), [2, 1]);
        assert_eq!(options(5), [1, 1]);
    }
}
