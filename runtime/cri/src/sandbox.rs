//! Pods: the CRI's configuration to ours, our state to the CRI's.

use std::collections::{BTreeMap, HashMap};

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{Dns, NamespaceMode, SandboxConfig, SandboxState, SandboxStatus};
use tonic::Status;

use crate::network;
use crate::status::invalid;
use crate::{namespaces, resources, security};

/// Most bytes of a host name that Linux takes.
const HOSTNAME_LIMIT: usize = 64;

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
    if !config.log_directory.is_empty() && !config.log_directory.starts_with('/') {
        return Err(invalid("config.log_directory", "must be an absolute path"));
    }
    if config.log_directory.contains('\0') {
        return Err(invalid("config.log_directory", "contains a NUL"));
    }
    if !config.hostname.is_empty() && !is_hostname(&config.hostname) {
        return Err(invalid(
            "config.hostname",
            format!("{:?} is not a host name of at most 64 bytes", config.hostname),
        ));
    }
    let linux = config.linux.unwrap_or_default();
    if linux.cgroup_parent.split('/').any(|part| part == "." || part == "..") || linux.cgroup_parent.contains('\0') {
        return Err(invalid(
            "config.linux.cgroup_parent",
            format!("{:?} must not contain . or ..", linux.cgroup_parent),
        ));
    }
    let security = linux.security_context.unwrap_or_default();
    const CONTEXT: &str = "config.linux.security_context";
    security::pod(CONTEXT, &security)?;
    let options = format!("{CONTEXT}.namespace_options");
    let namespaces::Options { pid, user_namespace, .. } =
        namespaces::options(&options, security.namespace_options.as_ref())?;
    if pid == NamespaceMode::Target {
        return Err(invalid(&format!("{options}.pid"), "TARGET is for containers: a pod has none to name yet"));
    }
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
        sysctls: sysctls(linux.sysctls)?,
        handler: handler.to_owned(),
        ports: network::ports(&config.port_mappings)?,
        pid,
        user_namespace,
        privileged: security.privileged,
        resources: resources::resources("config.linux.resources", linux.resources)?,
        overhead: resources::resources("config.linux.overhead", linux.overhead)?,
    })
}

/// Kernel parameters: names that have at least two parts and stay in their tree. Whether
/// there is such a parameter, the guest knows.
fn sysctls(sysctls: HashMap<String, String>) -> Result<BTreeMap<String, String>, Status> {
    for (name, value) in &sysctls {
        let part = |part: &str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-@:".contains(&byte);
            !part.is_empty() && part.bytes().all(plain)
        };
        let parts: Vec<_> = name.split(['.', '/']).collect();
        if parts.len() < 2 || !parts.into_iter().all(part) {
            return Err(invalid("config.linux.sysctls", format!("{name:?} is not the name of a kernel parameter")));
        }
        if value.contains('\0') {
            return Err(invalid("config.linux.sysctls", format!("the value of {name} contains a NUL")));
        }
    }
    Ok(sysctls.into_iter().collect())
}

/// Whether it can be a host name: labels of letters, digits and dashes.
fn is_hostname(name: &str) -> bool {
    let label = |label: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        !label.is_empty() && label.bytes().all(plain) && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= HOSTNAME_LIMIT && name.split('.').all(label)
}

/// What it is called.
pub fn metadata(config: &SandboxConfig) -> cri::PodSandboxMetadata {
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
    let pid = namespaces::back(status.config.pid);
    let userns_options = status.config.user_namespace.map(namespaces::user_back);
    let options = cri::NamespaceOption { pid: pid.into(), userns_options, ..cri::NamespaceOption::default() };
    cri::PodSandboxStatus {
        metadata: Some(metadata(&status.config)),
        state: state(status.state).into(),
        created_at: status.created_at,
        network: Some(network::status(&status.ips)),
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
    fn each_field_that_cannot_be_is_named() {
        type Spoil = fn(&mut cri::PodSandboxConfig);
        fn linux(config: &mut cri::PodSandboxConfig) -> &mut cri::LinuxPodSandboxConfig {
            config.linux.get_or_insert_default()
        }
        fn context(config: &mut cri::PodSandboxConfig) -> &mut cri::LinuxSandboxSecurityContext {
            linux(config).security_context.get_or_insert_default()
        }
        fn pid(config: &mut cri::PodSandboxConfig, pid: i32) {
            let options = cri::NamespaceOption { pid, target_id: "x".into(), ..Default::default() };
            context(config).namespace_options = Some(options);
        }
        let cases: &[(&str, Spoil)] = &[
            ("metadata", |c| c.metadata = None),
            ("metadata.name", |c| c.metadata.as_mut().unwrap().name.clear()),
            ("metadata.namespace", |c| c.metadata.as_mut().unwrap().namespace.clear()),
            ("metadata.uid", |c| c.metadata.as_mut().unwrap().uid.clear()),
            ("windows", |c| c.windows = Some(cri::WindowsPodSandboxConfig::default())),
            ("log_directory", |c| c.log_directory = "logs".into()),
            ("log_directory", |c| c.log_directory = "/a\0".into()),
            ("hostname", |c| c.hostname = "a b".into()),
            ("hostname", |c| c.hostname = "x".repeat(65)),
            ("hostname", |c| c.hostname = "-x".into()),
            ("linux.cgroup_parent", |c| linux(c).cgroup_parent = "/kubepods/../x".into()),
            ("linux.sysctls", |c| drop(linux(c).sysctls.insert("kernel/../../etc/passwd".into(), "1".into()))),
            ("linux.sysctls", |c| drop(linux(c).sysctls.insert("kernel".into(), "1".into()))),
            ("linux.resources.cpu_quota", |c| linux(c).resources.get_or_insert_default().cpu_quota = 1),
            ("linux.overhead.memory_limit_in_bytes", |c| {
                linux(c).overhead.get_or_insert_default().memory_limit_in_bytes = -5;
            }),
            ("linux.security_context.namespace_options.pid", |c| pid(c, 3)),
            ("linux.security_context.namespace_options.pid", |c| pid(c, 7)),
            ("linux.security_context.selinux_options", |c| {
                context(c).selinux_options = Some(cri::SeLinuxOption { level: "s0".into(), ..Default::default() });
            }),
            ("linux.security_context.apparmor.localhost_ref", |c| {
                context(c).apparmor = Some(cri::SecurityProfile { profile_type: 2, localhost_ref: String::new() });
            }),
            ("linux.security_context.run_as_user", |c| context(c).run_as_user = Some(cri::Int64Value { value: -1 })),
            ("linux.security_context.run_as_group", |c| context(c).run_as_group = Some(cri::Int64Value { value: 1 })),
            ("linux.security_context.supplemental_groups[0]", |c| context(c).supplemental_groups = vec![-1]),
        ];
        config(pod(), "kata").unwrap();
        for (field, spoil) in cases {
            let mut spoilt = pod();
            spoil(&mut spoilt);
            let status = config(spoilt, "kata").unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{field}");
            assert!(status.message().starts_with(&format!("config.{field}: ")), "{field}: {}", status.message());
        }
    }
}
