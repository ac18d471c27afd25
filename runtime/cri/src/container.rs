//! Containers: the CRI's configuration to ours, our state to the CRI's.

use nacelle_image::{Image, Reference};
use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{ContainerConfig, ContainerState, ContainerStatus, Identity, Seccomp};
use tonic::Status;

use crate::status::{bounded, invalid};
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

fn image_spec(config: &ContainerConfig, image: String) -> cri::ImageSpec {
    let user_specified_image = config.user_specified_image.clone();
    cri::ImageSpec { image, user_specified_image, ..cri::ImageSpec::default() }
}

/// An image as its user named it. A kubelet makes containers by an image's id.
fn named(config: &ContainerConfig, image_id: &str, tags: &[String]) -> String {
    let bare = |id: &str| id.strip_prefix("sha256:").unwrap_or(id).to_owned();
    if bare(&config.image) != bare(image_id) {
        return config.image.clone();
    }
    let user = Some(&config.user_specified_image).filter(|name| !name.is_empty());
    user.or(tags.first()).unwrap_or(&config.image).clone()
}

/// Where an image can be had again, which the kubelet shows as the `imageID` of a container: the
/// digest by which its repository knows it, or its id if it was never in one or is gone, as containerd
/// does. Of several, the one of the repository that the user named.
fn digest(name: &str, image_id: &str, digests: &[String]) -> String {
    let repository = name.parse::<Reference>().map(|name| name.repository()).unwrap_or_default();
    let same = |digest: &&String| digest.split_once('@').is_some_and(|(found, _)| found == repository);
    digests.iter().find(same).or(digests.first()).map_or(image_id, String::as_str).to_owned()
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
        image: Some(image_spec(&status.config, status.config.image.clone())),
        // The id, as in containerd's lists: the kubelet's collection of images goes by it.
        image_ref: status.image_id.clone(),
        state: state(status.state).into(),
        created_at: status.created_at,
        labels: status.config.labels.into_iter().collect(),
        annotations: status.config.annotations.into_iter().collect(),
        image_id: status.image_id,
    }
}

/// The whole state of one container, whose image is `image` if that is still there.
pub fn status(status: ContainerStatus, image: Option<&Image>) -> cri::ContainerStatus {
    let (tags, digests) = image.map(|image| (&image.repo_tags[..], &image.repo_digests[..])).unwrap_or_default();
    let name = named(&status.config, &status.image_id, tags);
    let (reason, exit) = match status.exit {
        Some(exit) => (exit.reason.as_str().to_owned(), exit),
        None => Default::default(),
    };
    cri::ContainerStatus {
        id: status.id,
        metadata: Some(metadata(&status.config)),
        state: state(status.state).into(),
        created_at: status.created_at,
        started_at: status.started_at,
        finished_at: exit.finished_at,
        exit_code: exit.code,
        image_ref: digest(&name, &status.image_id, digests),
        image: Some(image_spec(&status.config, name)),
        reason,
        message: bounded(exit.message),
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
    fn an_image_is_named_as_its_user_did_and_referred_to_by_its_repository() {
        let digest = |number: char| format!("sha256:{}", number.to_string().repeat(64));
        let id = digest('a');
        let (here, there) = (format!("r.test/web@{}", digest('1')), format!("s.test/web@{}", digest('2')));
        let image = (vec!["r.test/web:1".to_owned(), "s.test/web:1".into()], vec![here.clone(), there.clone()]);
        let gone = (Vec::new(), Vec::new());
        let shown = |name: &str, user: &str, (tags, digests): &(Vec<String>, Vec<String>)| {
            let config =
                ContainerConfig { image: name.into(), user_specified_image: user.into(), ..Default::default() };
            let name = named(&config, &id, tags);
            let digest = super::digest(&name, &id, digests);
            (name, digest)
        };
        let pair = |name: &str, digest: &str| (name.to_owned(), digest.to_owned());
        // As crictl makes containers, and as a kubelet does.
        assert_eq!(shown("s.test/web:1", "", &image), pair("s.test/web:1", &there));
        assert_eq!(shown(&id, "s.test/web:1", &image), pair("s.test/web:1", &there));
        assert_eq!(shown(&id, "", &image), pair("r.test/web:1", &here));
        assert_eq!(shown(id.trim_start_matches("sha256:"), "", &image), pair("r.test/web:1", &here));
        assert_eq!(shown("t.test/web", "", &image), pair("t.test/web", &here), "a tag that has moved on");
        assert_eq!(shown(&id, "", &gone), pair(&id, &id));
        assert_eq!(shown(&id, "web", &gone), pair("web", &id));
    }

    #[test]
    fn what_a_container_says_of_its_end_is_bounded() {
        let exit = nacelle_sandbox::ExitInfo { message: "x".repeat(1 << 20), ..Default::default() };
        let ended = ContainerStatus {
            id: "c".into(),
            sandbox_id: "p".into(),
            config: ContainerConfig::default(),
            image_id: "sha256:a".into(),
            state: ContainerState::Exited,
            created_at: 1,
            started_at: 1,
            exit: Some(exit),
            log_path: String::new(),
            user: None,
            stop_signal: 15,
        };
        let shown = status(ended.clone(), None);
        assert_eq!((shown.reason.as_str(), shown.image_id.as_str()), ("Completed", "sha256:a"));
        assert!(shown.message.len() <= 4096, "{}", shown.message.len());
        let runs = status(ContainerStatus { state: ContainerState::Running, exit: None, ..ended }, None);
        assert_eq!((runs.reason.as_str(), runs.exit_code, runs.finished_at), ("", 0, 0));
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
