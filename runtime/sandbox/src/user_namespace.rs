//! Pods with a user namespace of their own: what goes together, and the agent's words.

use nacelle_proto::agent::v1 as api;

use crate::model::{ContainerConfig, IdMapping, UserNamespace};
use crate::{Error, Result};

const FIELD: &str = "config.linux.security_context.namespace_options.userns_options";

/// Refuses a container that is not in its pod's user namespace, or that mounts what is mapped
/// for another.
pub fn check(pod: Option<UserNamespace>, config: &ContainerConfig) -> Result<()> {
    let asked = config.security.user_namespace;
    if asked != pod {
        let (asked, pod) = (describe(asked), describe(pod));
        return Err(Error::Invalid(format!(
            "{FIELD}: the container is to be in {asked}, and its pod is in {pod}: give both the same"
        )));
    }
    for (index, mount) in config.mounts.iter().enumerate() {
        let Some(mapped) = mount.mapped else { continue };
        let name = match pod {
            Some(pod) if mapped == pod => continue,
            Some(pod) if mapped.uids == pod.uids => "gidMappings",
            _ => "uidMappings",
        };
        return Err(Error::Invalid(format!(
            "config.mounts[{index}].{name}: the mount is mapped for {}, and the pod is in {}: give both the same",
            describe(Some(mapped)),
            describe(pod)
        )));
    }
    Ok(())
}

fn describe(namespace: Option<UserNamespace>) -> String {
    match namespace {
        None => "no user namespace of its own".into(),
        Some(UserNamespace { uids, gids }) => format!(
            "the user namespace of {} uids from {} and {} gids from {}",
            uids.length, uids.host_id, gids.length, gids.host_id
        ),
    }
}

/// What the agent is told.
pub fn request(namespace: UserNamespace) -> api::UserNamespace {
    let ids = |ids: IdMapping| Some(api::IdMapping { host_id: ids.host_id, length: ids.length });
    api::UserNamespace { uids: ids(namespace.uids), gids: ids(namespace.gids) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Mount, MountAccess, MountSource, Propagation, Security};

    fn namespace(uids: u32, gids: u32) -> Option<UserNamespace> {
        let ids = |host_id| IdMapping { host_id, length: 65_536 };
        Some(UserNamespace { uids: ids(uids), gids: ids(gids) })
    }

    fn container(own: Option<UserNamespace>, mount: Option<UserNamespace>) -> ContainerConfig {
        let mount = Mount {
            container_path: "/data".into(),
            source: MountSource::Host("/srv".into()),
            access: MountAccess::Write,
            propagation: Propagation::Private,
            mapped: mount,
            options: Vec::new(),
        };
        let plain = Mount { mapped: None, ..mount.clone() };
        let security = Security { user_namespace: own, ..Security::default() };
        ContainerConfig { security, mounts: vec![plain, mount], ..ContainerConfig::default() }
    }

    #[test]
    fn a_container_and_its_mounts_are_in_the_pod_s_namespace() {
        let ours = namespace(1000, 1000);
        for (pod, own, mount) in [(None, None, None), (ours, ours, None), (ours, ours, ours)] {
            check(pod, &container(own, mount)).unwrap();
        }
        let other = namespace(2000, 2000);
        for (pod, own, mount, field) in [
            (None, ours, None, FIELD),
            (ours, None, None, FIELD),
            (ours, other, None, FIELD),
            (None, None, ours, "config.mounts[1].uidMappings"),
            (ours, ours, other, "config.mounts[1].uidMappings"),
            (ours, ours, namespace(1000, 2000), "config.mounts[1].gidMappings"),
        ] {
            let error = check(pod, &container(own, mount)).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)));
            assert!(error.to_string().starts_with(&format!("{field}: ")), "{error}");
        }
    }
}
