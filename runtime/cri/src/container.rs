//! Containers: the CRI's configuration to ours, our state to the CRI's.

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{ContainerConfig, ContainerState, ContainerStatus, Identity, Seccomp};
use tonic::Status;

use crate::status::invalid;
use crate::{mounts, resources, security, signal};

/// Translates a container's configuration and refuses what cannot be met. `unset_seccomp`
/// filters the system calls of one that names no profile.
pub fn config(config: cri::ContainerConfig, unset_seccomp: &Seccomp) -> Result<ContainerConfig, Status> {
    let stop_signal = cri::Signal::try_from(config.stop_signal)
        .map_err(|_| invalid("config.stop_signal", format!("{} is not a signal", config.stop_signal)))?;
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
    let log_path = std::path::Path::new(&config.log_path);
    if log_path.is_absolute() || log_path.components().any(|part| part == std::path::Component::ParentDir) {
        return Err(invalid("config.log_path", "must be relative to the pod's log directory and stay in it"));
    }
    if config.log_path.contains('\0') {
        return Err(invalid("config.log_path", "contains a NUL"));
    }
    if !(config.working_dir.is_empty() || config.working_dir.starts_with('/')) || config.working_dir.contains('\0') {
        return Err(invalid("config.working_dir", format!("{:?} is not an absolute path", config.working_dir)));
    }
    let linux = config.linux.unwrap_or_default();
    Ok(ContainerConfig {
        name: metadata.name,
        attempt: metadata.attempt,
        image: image.image,
        user_specified_image: image.user_specified_image,
        command: words("command", config.command)?,
        args: words("args", config.args)?,
        working_dir: config.working_dir,
        env: config.envs.into_iter().enumerate().map(variable).collect::<Result<_, _>>()?,
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        log_path: config.log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: resources::resources("config.linux.resources", linux.resources)?,
        security: security::security(linux.security_context.unwrap_or_default(), unset_seccomp)?,
        stop_signal: signal::number(stop_signal),
        mounts: mounts::mounts(config.mounts)?,
        devices: mounts::devices(config.devices, &config.cdi_devices)?,
    })
}

/// A name and its value, as execve takes them.
fn variable((index, env): (usize, cri::KeyValue)) -> Result<(String, String), Status> {
    let field = format!("config.envs[{index}]");
    if env.key.is_empty() || env.key.contains(['=', '\0']) {
        return Err(invalid(&format!("{field}.key"), format!("{:?} is not the name of a variable", env.key)));
    }
    match String::from_utf8(env.value) {
        Ok(value) if !value.contains('\0') => Ok((env.key, value)),
        Ok(_) => Err(invalid(&format!("{field}.value"), format!("the value of {:?} contains a NUL", env.key))),
        Err(_) => Err(invalid(&format!("{field}.value"), format!("the value of {:?} is not UTF-8", env.key))),
    }
}

/// Words of a command line.
fn words(field: &str, words: Vec<String>) -> Result<Vec<String>, Status> {
    match words.iter().position(|word| word.contains('\0')) {
        Some(index) => Err(invalid(&format!("config.{field}[{index}]"), "contains a NUL")),
        None => Ok(words),
    }
}

/// The CRI's word for a state.
pub fn state(state: ContainerState) -> cri::ContainerState {
    match state {
        ContainerState::Creating | ContainerState::Created => cri::ContainerState::ContainerCreated,
        ContainerState::Running => cri::ContainerState::ContainerRunning,
        ContainerState::Exited => cri::ContainerState::ContainerExited,
        ContainerState::Unknown => cri::ContainerState::ContainerUnknown,
    }
}

fn user(user: Identity) -> cri::ContainerUser {
    cri::ContainerUser {
        linux: Some(cri::LinuxContainerUser {
            uid: user.uid.into(),
            gid: user.gid.into(),
            supplemental_groups: user.groups.into_iter().map(i64::from).collect(),
        }),
    }
}

fn image_spec(config: &ContainerConfig) -> cri::ImageSpec {
    cri::ImageSpec {
        image: config.image.clone(),
        user_specified_image: config.user_specified_image.clone(),
        ..cri::ImageSpec::default()
    }
}

/// What it is called.
pub fn metadata(config: &ContainerConfig) -> cri::ContainerMetadata {
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
            linux: Some(resources::back(&status.config.resources)),
            windows: None,
        }),
        labels: status.config.labels.into_iter().collect(),
        annotations: status.config.annotations.into_iter().collect(),
        mounts: mounts::back(&status.config.mounts),
        log_path: status.log_path,
        image_id: status.image_id,
        user: status.user.map(user),
        stop_signal: signal::named(status.stop_signal).into(),
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

    fn translated(config: cri::ContainerConfig) -> Result<ContainerConfig, Status> {
        super::config(config, &Seccomp::Unconfined)
    }

    #[test]
    fn each_field_that_cannot_be_is_named() {
        type Spoil = fn(&mut cri::ContainerConfig);
        fn env(key: &str, value: &[u8]) -> Vec<cri::KeyValue> {
            vec![cri::KeyValue { key: key.into(), value: value.into() }]
        }
        let cases: &[(&str, Spoil)] = &[
            ("metadata", |c| c.metadata = None),
            ("metadata.name", |c| c.metadata = Some(cri::ContainerMetadata::default())),
            ("image", |c| c.image = None),
            ("image.image", |c| c.image = Some(cri::ImageSpec::default())),
            ("windows", |c| c.windows = Some(cri::WindowsContainerConfig::default())),
            ("command[1]", |c| c.command = vec!["a".into(), "b\0".into()]),
            ("args[0]", |c| c.args = vec!["\0".into()]),
            ("working_dir", |c| c.working_dir = "srv".into()),
            ("envs[0].key", |c| c.envs = env("", b"x")),
            ("envs[0].key", |c| c.envs = env("a=b", b"x")),
            ("envs[0].value", |c| c.envs = env("A", b"\xff")),
            ("envs[0].value", |c| c.envs = env("A", b"x\0")),
            ("log_path", |c| c.log_path = "/etc/passwd".into()),
            ("log_path", |c| c.log_path = "../x".into()),
            ("log_path", |c| c.log_path = "a/../../x".into()),
            ("stop_signal", |c| c.stop_signal = 66),
            ("linux.resources.cpu_period", |c| {
                let resources = cri::LinuxContainerResources { cpu_period: 1, ..Default::default() };
                c.linux = Some(cri::LinuxContainerConfig { resources: Some(resources), ..Default::default() });
            }),
        ];
        translated(container()).unwrap();
        for (field, spoil) in cases {
            let mut config = container();
            spoil(&mut config);
            let status = translated(config).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{field}");
            assert!(status.message().starts_with(&format!("config.{field}: ")), "{field}: {}", status.message());
        }
    }

    #[test]
    fn values_of_variables_are_any_text() {
        let value = "a=b \"c\"\n\t$HOME ü";
        let envs = vec![cri::KeyValue { key: "A.b-c".into(), value: value.into() }];
        let config = translated(cri::ContainerConfig { envs, ..container() }).unwrap();
        assert_eq!(config.env, [("A.b-c".to_owned(), value.to_owned())]);
        assert!(translated(cri::ContainerConfig { log_path: "c/0.log".into(), ..container() }).is_ok());
    }
}
