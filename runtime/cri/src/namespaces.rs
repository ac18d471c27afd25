//! Namespaces of pods and containers.
//!
//! Network and IPC are the pod's, which is the guest; nothing of them can be the host's.
//! Of the three kinds of process ids that a pod can have, NODE means the guest's: it is
//! the node that the pod sees. The ids of a user namespace are mapped to those of the guest's
//! initial one, for the same reason.

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{IdMapping, NamespaceMode, UserNamespace};
use tonic::Status;

use crate::status::invalid;

/// What of the options is not the same for all pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The mode for process ids.
    pub pid: NamespaceMode,
    /// The container that TARGET means.
    pub pid_target: String,
    /// The user namespace; none for the guest's.
    pub user_namespace: Option<UserNamespace>,
}

/// Translates the options, which were in `field`.
pub fn options(field: &str, options: Option<&cri::NamespaceOption>) -> Result<Options, Status> {
    let options = options.cloned().unwrap_or_default();
    for (name, mode) in [("network", options.network), ("ipc", options.ipc)] {
        let field = format!("{field}.{name}");
        match known(&field, mode)? {
            cri::NamespaceMode::Pod => {}
            cri::NamespaceMode::Node => return Err(invalid(&field, host_refused(name))),
            mode => return Err(invalid(&field, format!("{} is not POD", mode.as_str_name()))),
        }
    }
    let user_namespace = user(&format!("{field}.userns_options"), options.userns_options.as_ref())?;
    let field_pid = format!("{field}.pid");
    let mode = match known(&field_pid, options.pid)? {
        cri::NamespaceMode::Pod => NamespaceMode::Pod,
        cri::NamespaceMode::Container => NamespaceMode::Container,
        cri::NamespaceMode::Node => NamespaceMode::Node,
        cri::NamespaceMode::Target => NamespaceMode::Target,
    };
    match (mode, options.target_id.is_empty()) {
        (NamespaceMode::Target, true) => {
            Err(invalid(&format!("{field}.target_id"), "is empty: pid TARGET means the container it names"))
        }
        // Its root has no right to the guest's processes, and could not mount their /proc.
        (NamespaceMode::Node, _) if user_namespace.is_some() => {
            let problem = "NODE shows the guest's processes, to which a user namespace has no right: remove hostPID or \
                           hostUsers: false";
            Err(invalid(&field_pid, problem))
        }
        _ => Ok(Options { pid: mode, pid_target: options.target_id, user_namespace }),
    }
}

/// The CRI's word for a mode.
pub fn back(mode: NamespaceMode) -> cri::NamespaceMode {
    match mode {
        NamespaceMode::Pod => cri::NamespaceMode::Pod,
        NamespaceMode::Container => cri::NamespaceMode::Container,
        NamespaceMode::Node => cri::NamespaceMode::Node,
        NamespaceMode::Target => cri::NamespaceMode::Target,
    }
}

fn known(field: &str, mode: i32) -> Result<cri::NamespaceMode, Status> {
    cri::NamespaceMode::try_from(mode).map_err(|_| invalid(field, format!("{mode} is not a namespace mode")))
}

fn host_refused(name: &str) -> &'static str {
    match name {
        "network" => {
            "a pod in a guest cannot use the host's network: remove hostNetwork or choose another runtime class"
        }
        _ => "a pod in a guest cannot use the host's IPC namespace: remove hostIPC or choose another runtime class",
    }
}

/// The user namespace that is asked for; none for that of the guest.
fn user(field: &str, options: Option<&cri::UserNamespace>) -> Result<Option<UserNamespace>, Status> {
    let Some(options) = options else { return Ok(None) };
    match known(&format!("{field}.mode"), options.mode)? {
        cri::NamespaceMode::Node => {
            for (name, mappings) in [("uids", &options.uids), ("gids", &options.gids)] {
                if !mappings.is_empty() {
                    let problem = "is set for mode NODE, which maps nothing: leave it out, or set mode to POD";
                    return Err(invalid(&format!("{field}.{name}"), problem));
                }
            }
            return Ok(None);
        }
        cri::NamespaceMode::Pod => {}
        mode => {
            let problem = format!("{} is not POD or NODE: a user namespace is the whole pod's", mode.as_str_name());
            return Err(invalid(&format!("{field}.mode"), problem));
        }
    }
    let uids = mapping(&format!("{field}.uids"), &options.uids)?;
    let gids = mapping(&format!("{field}.gids"), &options.gids)?;
    if uids.length != gids.length {
        let problem = format!("maps {} ids and uids maps {}: give both the same length", gids.length, uids.length);
        return Err(invalid(&format!("{field}.gids"), problem));
    }
    Ok(Some(UserNamespace { uids, gids }))
}

/// The one mapping that there can be: of 0 and the ids after it.
pub fn mapping(field: &str, mappings: &[cri::IdMapping]) -> Result<IdMapping, Status> {
    let [mapping] = mappings else {
        return Err(invalid(field, format!("has {} mappings: give one, from container_id 0", mappings.len())));
    };
    if mapping.container_id != 0 {
        let problem = format!("does not map container_id 0, but from {}: map from 0", mapping.container_id);
        return Err(invalid(field, problem));
    }
    if mapping.length == 0 {
        return Err(invalid(field, "has length 0: give at least 1, and 65536 for what images usually hold"));
    }
    // The largest id means "none" to the kernel.
    if mapping.host_id.checked_add(mapping.length).is_none() {
        let problem = format!("maps beyond id {}: lower host_id or length", u32::MAX - 1);
        return Err(invalid(field, problem));
    }
    Ok(IdMapping { host_id: mapping.host_id, length: mapping.length })
}

/// The CRI's words for a user namespace.
pub fn user_back(namespace: UserNamespace) -> cri::UserNamespace {
    let mode = cri::NamespaceMode::Pod.into();
    cri::UserNamespace { mode, uids: vec![mapping_back(namespace.uids)], gids: vec![mapping_back(namespace.gids)] }
}

/// The CRI's words for a mapping.
pub fn mapping_back(mapping: IdMapping) -> cri::IdMapping {
    cri::IdMapping { host_id: mapping.host_id, container_id: 0, length: mapping.length }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> cri::NamespaceOption {
        cri::NamespaceOption::default()
    }

    fn ids(container_id: u32, host_id: u32, length: u32) -> cri::IdMapping {
        cri::IdMapping { host_id, container_id, length }
    }

    fn mapped(mapping: cri::IdMapping, count: usize) -> cri::UserNamespace {
        cri::UserNamespace { mode: 0, uids: vec![mapping; count], gids: vec![mapping; count] }
    }

    fn with_user(user: cri::UserNamespace) -> cri::NamespaceOption {
        cri::NamespaceOption { userns_options: Some(user), ..asked() }
    }

    #[test]
    fn every_kind_of_process_ids_has_its_mode() {
        use cri::NamespaceMode as M;
        for mode in [M::Pod, M::Container, M::Node] {
            let ours = options("o", Some(&cri::NamespaceOption { pid: mode.into(), ..asked() })).unwrap();
            assert_eq!((back(ours.pid), ours.pid_target.as_str()), (mode, ""));
        }
        let target = cri::NamespaceOption { pid: M::Target.into(), target_id: "ab".into(), ..asked() };
        let target = options("o", Some(&target)).unwrap();
        assert_eq!((target.pid, target.pid_target.as_str()), (NamespaceMode::Target, "ab"));
        assert_eq!(options("o", None).unwrap().pid, NamespaceMode::Pod);
    }

    #[test]
    fn one_mapping_each_is_a_user_namespace_and_mode_node_is_none() {
        let gids = vec![ids(0, 300_000, 65_536)];
        let both = cri::UserNamespace { gids, ..mapped(ids(0, 100_000, 65_536), 1) };
        let namespace = options("o", Some(&with_user(both.clone()))).unwrap().user_namespace.unwrap();
        assert_eq!((namespace.uids.host_id, namespace.gids.host_id, namespace.gids.length), (100_000, 300_000, 65_536));
        assert_eq!(user_back(namespace), both);
        let node = cri::UserNamespace { mode: 2, ..cri::UserNamespace::default() };
        assert_eq!(options("o", Some(&with_user(node))).unwrap().user_namespace, None);
        // All there is.
        options("o", Some(&with_user(mapped(ids(0, 0, u32::MAX), 1)))).unwrap();
    }

    #[test]
    fn what_a_guest_cannot_give_or_nobody_knows_is_refused_by_field() {
        let mode = |mode| with_user(cri::UserNamespace { mode, ..cri::UserNamespace::default() });
        let usual = ids(0, 1000, 65_536);
        let uids = |mapping, count| with_user(mapped(mapping, count));
        let gids = |gids| with_user(cri::UserNamespace { gids, ..mapped(usual, 1) });
        for (wrong, field) in [
            (cri::NamespaceOption { network: 2, ..asked() }, "network"),
            (cri::NamespaceOption { network: 1, ..asked() }, "network"),
            (cri::NamespaceOption { ipc: 2, ..asked() }, "ipc"),
            (cri::NamespaceOption { ipc: 9, ..asked() }, "ipc"),
            (cri::NamespaceOption { pid: -1, ..asked() }, "pid"),
            (cri::NamespaceOption { pid: 3, ..asked() }, "target_id"),
            (cri::NamespaceOption { pid: 2, ..uids(usual, 1) }, "pid"),
            (mode(0), "userns_options.uids"),
            (mode(1), "userns_options.mode"),
            (mode(3), "userns_options.mode"),
            (mode(4), "userns_options.mode"),
            (with_user(cri::UserNamespace { mode: 2, ..mapped(usual, 1) }), "userns_options.uids"),
            (uids(usual, 2), "userns_options.uids"),
            (uids(ids(1, 1000, 65_536), 1), "userns_options.uids"),
            (uids(ids(0, 1000, 0), 1), "userns_options.uids"),
            (uids(ids(0, u32::MAX, 1), 1), "userns_options.uids"),
            (gids(vec![]), "userns_options.gids"),
            (gids(vec![usual; 3]), "userns_options.gids"),
            (gids(vec![ids(5, 1000, 65_536)]), "userns_options.gids"),
            (gids(vec![ids(0, 1000, 65_535)]), "userns_options.gids"),
        ] {
            let status = options("options", Some(&wrong)).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().starts_with(&format!("options.{field}: ")), "{field}: {}", status.message());
        }
    }
}
