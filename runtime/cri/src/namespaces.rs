//! Namespaces of pods and containers.
//!
//! Network and IPC are the pod's, which is the guest; nothing of them can be the host's.
//! Of the three kinds of process ids that a pod can have, NODE means the guest's: it is
//! the node that the pod sees.

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::NamespaceMode;
use tonic::Status;

use crate::status::invalid;

/// The mode for process ids and the container that TARGET means; `field` is where the
/// options were.
pub fn pid(field: &str, options: Option<&cri::NamespaceOption>) -> Result<(NamespaceMode, String), Status> {
    let options = options.cloned().unwrap_or_default();
    for (name, mode) in [("network", options.network), ("ipc", options.ipc)] {
        let field = format!("{field}.{name}");
        match known(&field, mode)? {
            cri::NamespaceMode::Pod => {}
            cri::NamespaceMode::Node => return Err(invalid(&field, host_refused(name))),
            mode => return Err(invalid(&field, format!("{} is not POD", mode.as_str_name()))),
        }
    }
    user(&format!("{field}.userns_options"), options.userns_options.as_ref())?;
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
        _ => Ok((mode, options.target_id)),
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

/// User namespaces: a pod without one of its own, that is. Its processes are kept apart
/// from the host's by the guest, whatever their user ids.
fn user(field: &str, options: Option<&cri::UserNamespace>) -> Result<(), Status> {
    let Some(options) = options else { return Ok(()) };
    match known(&format!("{field}.mode"), options.mode)? {
        cri::NamespaceMode::Node => return Ok(()),
        cri::NamespaceMode::Pod => {}
        mode => return Err(invalid(&format!("{field}.mode"), format!("{} is not POD or NODE", mode.as_str_name()))),
    }
    for (name, mappings) in [("uids", &options.uids), ("gids", &options.gids)] {
        let field = format!("{field}.{name}");
        match mappings.as_slice() {
            [mapping] if mapping.container_id == 0 && mapping.length > 0 => {}
            [_] => return Err(invalid(&field, "must map container_id 0, with a length above 0")),
            _ => return Err(invalid(&field, format!("has {} mappings, must have one", mappings.len()))),
        }
    }
    if options.uids != options.gids {
        return Err(invalid(&format!("{field}.gids"), "must be the same as uids"));
    }
    // The kubelet asks for POD only where the handler says that it can.
    Err(invalid(
        &format!("{field}.mode"),
        "user namespaces inside a guest are not there: remove hostUsers: false, the guest keeps the pod's root from being \
         the host's",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> cri::NamespaceOption {
        cri::NamespaceOption::default()
    }

    fn mapped(container_id: u32, count: usize) -> cri::UserNamespace {
        let mapping = cri::IdMapping { host_id: 1000, container_id, length: 65536 };
        cri::UserNamespace { mode: 0, uids: vec![mapping; count], gids: vec![mapping; count] }
    }

    #[test]
    fn every_kind_of_process_ids_has_its_mode() {
        use cri::NamespaceMode as M;
        for mode in [M::Pod, M::Container, M::Node] {
            let (ours, target) = pid("o", Some(&cri::NamespaceOption { pid: mode.into(), ..options() })).unwrap();
            assert_eq!((back(ours), target.as_str()), (mode, ""));
        }
        let target = cri::NamespaceOption { pid: M::Target.into(), target_id: "ab".into(), ..options() };
        assert_eq!(pid("o", Some(&target)).unwrap(), (NamespaceMode::Target, "ab".into()));
        assert_eq!(pid("o", None).unwrap().0, NamespaceMode::Pod);
    }

    #[test]
    fn what_a_guest_cannot_give_or_nobody_knows_is_refused_by_field() {
        let userns = |userns| cri::NamespaceOption { userns_options: Some(userns), ..options() };
        let mode = |mode| cri::UserNamespace { mode, ..cri::UserNamespace::default() };
        for (options, field) in [
            (cri::NamespaceOption { network: 2, ..options() }, "network"),
            (cri::NamespaceOption { network: 1, ..options() }, "network"),
            (cri::NamespaceOption { ipc: 2, ..options() }, "ipc"),
            (cri::NamespaceOption { ipc: 9, ..options() }, "ipc"),
            (cri::NamespaceOption { pid: -1, ..options() }, "pid"),
            (cri::NamespaceOption { pid: 3, ..options() }, "target_id"),
            (userns(mode(1)), "userns_options.mode"),
            (userns(mode(3)), "userns_options.mode"),
            (userns(mapped(0, 0)), "userns_options.uids"),
            (userns(mapped(0, 2)), "userns_options.uids"),
            (userns(mapped(1, 1)), "userns_options.uids"),
            (userns(mapped(0, 1)), "userns_options.mode"),
        ] {
            let status = pid("options", Some(&options)).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().starts_with(&format!("options.{field}: ")), "{}", status.message());
        }
        pid("options", Some(&userns(mode(2)))).unwrap();
    }
}
