//! Pods: the CRI's configuration to ours, our state to the CRI's.

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{Dns, NamespaceMode, SandboxConfig, SandboxState, SandboxStatus};
use tonic::Status;

use crate::status::{invalid, unsupported};

/// Translates a pod's configuration and refuses what a guest cannot give.
pub fn config(config: cri::PodSandboxConfig, handler: &str) -> Result<SandboxConfig, Status> {
    let metadata = config.metadata.ok_or_else(|| invalid("config.metadata", "is missing"))?;
    for (field, value) in [("name", &metadata.name), ("namespace", &metadata.namespace), ("uid", &metadata.uid)] {
        if value.is_empty() {
            return Err(invalid(&format!("config.metadata.{field}"), "is empty"));
        }
    }
    if config.windows.is_some() {
        return Err(invalid("config.windows", "this runtime runs Linux pods only"));
    }
    if let Some(mapping) = config.port_mappings.iter().find(|mapping| mapping.host_port > 0) {
        return Err(unsupported(
            "config.port_mappings",
            format!("host port {} needs a pod network, which is not there yet", mapping.host_port),
        ));
    }
    if !config.log_directory.is_empty() && !config.log_directory.starts_with('/') {
        return Err(invalid("config.log_directory", "must be an absolute path"));
    }
    let linux = config.linux.unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let dns = config.dns_config.unwrap_or_default();
    Ok(SandboxConfig {
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        attempt: metadata.attempt,
        hostname: config.hostname,
        log_directory: config.log_directory,
        dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        cgroup_parent: linux.cgroup_parent,
        sysctls: linux.sysctls.into_iter().collect(),
        handler: handler.to_owned(),
        pid: namespaces(security.namespace_options)?,
    })
}

/// How the pod's namespaces are shared; returns the mode for process ids.
fn namespaces(options: Option<cri::NamespaceOption>) -> Result<NamespaceMode, Status> {
    const FIELD: &str = "config.linux.security_context.namespace_options";
    let options = options.unwrap_or_default();
    if options.network() == cri::NamespaceMode::Node {
        return Err(invalid(
            &format!("{FIELD}.network"),
            "a pod in a guest cannot use the host's network: remove hostNetwork or choose another runtime class",
        ));
    }
    if options.ipc() == cri::NamespaceMode::Node {
        return Err(invalid(
            &format!("{FIELD}.ipc"),
            "a pod in a guest cannot use the host's IPC namespace: remove hostIPC or choose another runtime class",
        ));
    }
    if options.userns_options.as_ref().is_some_and(|userns| userns.mode() == cri::NamespaceMode::Pod) {
        return Err(unsupported(&format!("{FIELD}.userns_options"), "user namespaces are not there yet"));
    }
    Ok(match options.pid() {
        cri::NamespaceMode::Container => NamespaceMode::Container,
        _ => NamespaceMode::Pod,
    })
}

fn metadata(config: &SandboxConfig) -> cri::PodSandboxMetadata {
    cri::PodSandboxMetadata {
        name: config.name.clone(),
        uid: config.uid.clone(),
        namespace: config.namespace.clone(),
        attempt: config.attempt,
    }
}

/// The CRI's word for a state.
pub fn state(state: SandboxState) -> cri::PodSandboxState {
    match state {
        SandboxState::Ready => cri::PodSandboxState::SandboxReady,
        SandboxState::Creating | SandboxState::NotReady => cri::PodSandboxState::SandboxNotready,
    }
}

/// One line of a list.
pub fn item(status: SandboxStatus) -> cri::PodSandbox {
    cri::PodSandbox {
        metadata: Some(metadata(&status.config)),
        state: state(status.state).into(),
        created_at: status.created_at,
        labels: status.config.labels.into_iter().collect(),
        annotations: status.config.annotations.into_iter().collect(),
        runtime_handler: status.config.handler,
        id: status.id,
    }
}

/// The whole state of one pod.
pub fn status(status: SandboxStatus) -> cri::PodSandboxStatus {
    let pid = match status.config.pid {
        NamespaceMode::Pod => cri::NamespaceMode::Pod,
        NamespaceMode::Container => cri::NamespaceMode::Container,
    };
    let options = cri::NamespaceOption { pid: pid.into(), ..cri::NamespaceOption::default() };
    cri::PodSandboxStatus {
        metadata: Some(metadata(&status.config)),
        state: state(status.state).into(),
        created_at: status.created_at,
        network: Some(cri::PodSandboxNetworkStatus::default()),
        linux: Some(cri::LinuxPodSandboxStatus { namespaces: Some(cri::Namespace { options: Some(options) }) }),
        labels: status.config.labels.into_iter().collect(),
        annotations: status.config.annotations.into_iter().collect(),
        runtime_handler: status.config.handler,
        id: status.id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> cri::PodSandboxConfig {
        let metadata =
            cri::PodSandboxMetadata { name: "web".into(), uid: "u".into(), namespace: "default".into(), attempt: 0 };
        cri::PodSandboxConfig { metadata: Some(metadata), ..cri::PodSandboxConfig::default() }
    }

    #[test]
    fn what_a_guest_cannot_give_is_refused_by_field() {
        for (network, ipc, field) in [(2, 0, "network"), (0, 2, "ipc")] {
            let namespaces = cri::NamespaceOption { network, ipc, ..cri::NamespaceOption::default() };
            let security = cri::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
                ..cri::LinuxSandboxSecurityContext::default()
            };
            let linux = cri::LinuxPodSandboxConfig {
                security_context: Some(security),
                ..cri::LinuxPodSandboxConfig::default()
            };
            let status = config(cri::PodSandboxConfig { linux: Some(linux), ..pod() }, "kata").unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().contains(&format!("namespace_options.{field}")), "{}", status.message());
        }
    }

    #[test]
    fn each_required_field_is_named_when_missing() {
        config(pod(), "kata").unwrap();
        let status = config(cri::PodSandboxConfig::default(), "kata").unwrap_err();
        assert!(status.message().starts_with("config.metadata:"));
        let mut nameless = pod();
        nameless.metadata.as_mut().unwrap().name.clear();
        assert!(config(nameless, "kata").unwrap_err().message().starts_with("config.metadata.name:"));
    }
}
