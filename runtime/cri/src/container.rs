//! Containers: the CRI's configuration to ours, our state to the CRI's.

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{
    Capabilities, ContainerConfig, ContainerState, ContainerStatus, NamespaceMode, Resources, Security, User,
};
use tonic::Status;

use crate::status::{invalid, unsupported};

/// Translates a container's configuration and refuses what cannot be met.
pub fn config(config: cri::ContainerConfig) -> Result<ContainerConfig, Status> {
    let stop_signal = stop_signal(config.stop_signal());
    let metadata = config.metadata.ok_or_else(|| invalid("config.metadata", "is missing"))?;
    if metadata.name.is_empty() {
        return Err(invalid("config.metadata.name", "is empty"));
    }
    let image = config.image.ok_or_else(|| invalid("config.image", "is missing"))?;
    if image.image.is_empty() {
        return Err(invalid("config.image.image", "is empty"));
    }
    if config.windows.is_some() {
        return Err(invalid("config.windows", "this runtime runs Linux containers only"));
    }
    if let Some(mount) = config.mounts.first() {
        let problem = format!("volumes are not there yet (asked for at {:?})", mount.container_path);
        return Err(unsupported("config.mounts", problem));
    }
    if !config.devices.is_empty() || !config.cdi_devices.is_empty() {
        return Err(unsupported("config.devices", "devices of the host are not given to a guest"));
    }
    let log_path = std::path::Path::new(&config.log_path);
    if log_path.is_absolute() || log_path.components().any(|part| part == std::path::Component::ParentDir) {
        return Err(invalid("config.log_path", "must be relative to the pod's log directory and stay in it"));
    }
    let linux = config.linux.unwrap_or_default();
    Ok(ContainerConfig {
        name: metadata.name,
        attempt: metadata.attempt,
        image: image.image,
        user_specified_image: image.user_specified_image,
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        env: config
            .envs
            .into_iter()
            .map(|env| match String::from_utf8(env.value) {
                Ok(value) => Ok((env.key, value)),
                Err(_) => Err(invalid("config.envs", format!("the value of {:?} is not UTF-8", env.key))),
            })
            .collect::<Result<_, _>>()?,
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        log_path: config.log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: resources(linux.resources.unwrap_or_default()),
        security: security(linux.security_context.unwrap_or_default())?,
        stop_signal,
    })
}

fn resources(resources: cri::LinuxContainerResources) -> Resources {
    Resources {
        cpu_period: resources.cpu_period,
        cpu_quota: resources.cpu_quota,
        cpu_shares: resources.cpu_shares,
        memory_limit: resources.memory_limit_in_bytes,
        memory_swap_limit: resources.memory_swap_limit_in_bytes,
        oom_score_adj: resources.oom_score_adj,
        cpuset_cpus: resources.cpuset_cpus,
        cpuset_mems: resources.cpuset_mems,
        hugepages: resources.hugepage_limits.into_iter().map(|limit| (limit.page_size, limit.limit)).collect(),
        unified: resources.unified.into_iter().collect(),
    }
}

fn resources_back(resources: &Resources) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        cpu_period: resources.cpu_period,
        cpu_quota: resources.cpu_quota,
        cpu_shares: resources.cpu_shares,
        memory_limit_in_bytes: resources.memory_limit,
        memory_swap_limit_in_bytes: resources.memory_swap_limit,
        oom_score_adj: resources.oom_score_adj,
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepage_limits: resources
            .hugepages
            .iter()
            .map(|(size, limit)| cri::HugepageLimit { page_size: size.clone(), limit: *limit })
            .collect(),
        unified: resources.unified.clone().into_iter().collect(),
    }
}

fn security(context: cri::LinuxContainerSecurityContext) -> Result<Security, Status> {
    const FIELD: &str = "config.linux.security_context";
    let namespaces = context.namespace_options.clone().unwrap_or_default();
    if namespaces.pid() == cri::NamespaceMode::Target {
        return Err(unsupported(
            &format!("{FIELD}.namespace_options.pid"),
            "another container's process ids are not there yet",
        ));
    }
    if context.selinux_options.as_ref().is_some_and(|options| *options != cri::SeLinuxOption::default()) {
        return Err(unsupported(&format!("{FIELD}.selinux_options"), "the guest has no SELinux: leave them out"));
    }
    if context.supplemental_groups_policy() == cri::SupplementalGroupsPolicy::Strict {
        return Err(unsupported(&format!("{FIELD}.supplemental_groups_policy"), "Strict is not there yet"));
    }
    if context.apparmor.as_ref().is_some_and(|p| p.profile_type() == cri::security_profile::ProfileType::Localhost) {
        return Err(unsupported(&format!("{FIELD}.apparmor"), "the guest has no AppArmor: leave the profile out"));
    }
    let seccomp_unconfined = match context.seccomp.as_ref().map(cri::SecurityProfile::profile_type) {
        Some(cri::security_profile::ProfileType::Unconfined) => true,
        Some(cri::security_profile::ProfileType::Localhost) => {
            return Err(unsupported(&format!("{FIELD}.seccomp"), "Localhost profiles are not there yet"));
        }
        Some(cri::security_profile::ProfileType::RuntimeDefault) | None => false,
    };
    let number = |field: &str, value: i64| {
        u32::try_from(value).map_err(|_| invalid(&format!("{FIELD}.{field}"), format!("{value} is not a valid id")))
    };
    let uid = context.run_as_user.map(|user| number("run_as_user", user.value)).transpose()?;
    let gid = context.run_as_group.map(|group| number("run_as_group", group.value)).transpose()?;
    if gid.is_some() && uid.is_none() && context.run_as_username.is_empty() {
        return Err(invalid(&format!("{FIELD}.run_as_group"), "needs run_as_user or run_as_username"));
    }
    let supplementary = context
        .supplemental_groups
        .iter()
        .map(|group| number("supplemental_groups", *group))
        .collect::<Result<_, _>>()?;
    let capabilities = context.capabilities.unwrap_or_default();
    // An empty list means "the default" unless the container is privileged: the kubelet
    // sends the default paths itself when it wants them.
    let paths = |paths: Vec<String>| if paths.is_empty() { None } else { Some(paths) };
    Ok(Security {
        privileged: context.privileged,
        capabilities: Capabilities {
            add: capabilities.add_capabilities,
            drop: capabilities.drop_capabilities,
            ambient: capabilities.add_ambient_capabilities,
        },
        user: User { uid, gid, name: context.run_as_username, supplementary },
        readonly_rootfs: context.readonly_rootfs,
        no_new_privileges: context.no_new_privs,
        masked_paths: paths(context.masked_paths),
        readonly_paths: paths(context.readonly_paths),
        seccomp_unconfined,
        pid: match namespaces.pid() {
            cri::NamespaceMode::Container => NamespaceMode::Container,
            _ => NamespaceMode::Pod,
        },
    })
}

/// The Linux number of a CRI signal; 0 for the default.
fn stop_signal(signal: cri::Signal) -> u32 {
    use cri::Signal as S;
    match signal {
        S::RuntimeDefault => 0,
        S::Sighup => 1,
        S::Sigint => 2,
        S::Sigquit => 3,
        S::Sigill => 4,
        S::Sigtrap => 5,
        S::Sigabrt | S::Sigiot => 6,
        S::Sigbus => 7,
        S::Sigfpe => 8,
        S::Sigkill => 9,
        S::Sigusr1 => 10,
        S::Sigsegv => 11,
        S::Sigusr2 => 12,
        S::Sigpipe => 13,
        S::Sigalrm => 14,
        S::Sigterm => 15,
        S::Sigstkflt => 16,
        S::Sigchld | S::Sigcld => 17,
        S::Sigcont => 18,
        S::Sigstop => 19,
        S::Sigtstp => 20,
        S::Sigttin => 21,
        S::Sigttou => 22,
        S::Sigurg => 23,
        S::Sigxcpu => 24,
        S::Sigxfsz => 25,
        S::Sigvtalrm => 26,
        S::Sigprof => 27,
        S::Sigwinch => 28,
        S::Sigio | S::Sigpoll => 29,
        S::Sigpwr => 30,
        S::Sigsys => 31,
        // SIGRTMIN+0 is 34, SIGRTMIN+15 is 49, SIGRTMAX-14 is 50, SIGRTMAX is 64.
        realtime => u32::try_from(realtime as i32 - S::Sigrtmin as i32).map_or(0, |offset| 34 + offset),
    }
}

/// The CRI's word for a state.
pub fn state(state: ContainerState) -> cri::ContainerState {
    match state {
        ContainerState::Creating | ContainerState::Created => cri::ContainerState::ContainerCreated,
        ContainerState::Running => cri::ContainerState::ContainerRunning,
        ContainerState::Exited => cri::ContainerState::ContainerExited,
    }
}

fn image_spec(config: &ContainerConfig) -> cri::ImageSpec {
    cri::ImageSpec {
        image: config.image.clone(),
        user_specified_image: config.user_specified_image.clone(),
        ..cri::ImageSpec::default()
    }
}

fn metadata(config: &ContainerConfig) -> cri::ContainerMetadata {
    cri::ContainerMetadata { name: config.name.clone(), attempt: config.attempt }
}

/// One line of a list.
pub fn item(status: ContainerStatus) -> cri::Container {
    cri::Container {
        id: status.id,
        pod_sandbox_id: status.sandbox_id,
        metadata: Some(metadata(&status.config)),
        image: Some(image_spec(&status.config)),
        image_ref: status.image_id.clone(),
        state: state(status.state).into(),
        created_at: status.created_at,
        labels: status.config.labels.into_iter().collect(),
        annotations: status.config.annotations.into_iter().collect(),
        image_id: status.image_id,
    }
}

/// The whole state of one container.
pub fn status(status: ContainerStatus) -> cri::ContainerStatus {
    let exit = status.exit.clone().unwrap_or_default();
    cri::ContainerStatus {
        id: status.id,
        metadata: Some(metadata(&status.config)),
        state: state(status.state).into(),
        created_at: status.created_at,
        started_at: status.started_at,
        finished_at: exit.finished_at,
        exit_code: exit.code,
        image: Some(image_spec(&status.config)),
        image_ref: status.image_id.clone(),
        reason: exit.reason,
        message: exit.message,
        resources: Some(cri::ContainerResources {
            linux: Some(resources_back(&status.config.resources)),
            windows: None,
        }),
        labels: status.config.labels.into_iter().collect(),
        annotations: status.config.annotations.into_iter().collect(),
        mounts: Vec::new(),
        log_path: status.log_path,
        image_id: status.image_id,
        user: None,
        stop_signal: cri::Signal::RuntimeDefault.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container() -> cri::ContainerConfig {
        cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: "busybox".into(), ..cri::ImageSpec::default() }),
            ..cri::ContainerConfig::default()
        }
    }

    #[test]
    fn realtime_signals_have_their_linux_numbers() {
        use cri::Signal as S;
        for (signal, number) in
            [(S::Sigrtmin, 34), (S::Sigrtminplus15, 49), (S::Sigrtmaxminus14, 50), (S::Sigrtmax, 64)]
        {
            assert_eq!(stop_signal(signal), number, "{signal:?}");
        }
    }

    #[test]
    fn a_log_path_cannot_leave_its_directory() {
        for path in ["/etc/passwd", "../x", "a/../../x"] {
            let status = config(cri::ContainerConfig { log_path: path.into(), ..container() }).unwrap_err();
            assert!(status.message().starts_with("config.log_path"), "{}", status.message());
        }
        config(cri::ContainerConfig { log_path: "c/0.log".into(), ..container() }).unwrap();
    }

    #[test]
    fn a_group_without_a_user_is_refused() {
        let security = cri::LinuxContainerSecurityContext {
            run_as_group: Some(cri::Int64Value { value: 5 }),
            ..cri::LinuxContainerSecurityContext::default()
        };
        let linux =
            cri::LinuxContainerConfig { security_context: Some(security), ..cri::LinuxContainerConfig::default() };
        assert!(config(cri::ContainerConfig { linux: Some(linux), ..container() }).is_err());
    }
}
