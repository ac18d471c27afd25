//! The process: command line, environment, working directory, user.

use nacelle_image::ImageConfig;
use oci_spec::runtime::{Process, ProcessBuilder, UserBuilder};

use super::{capabilities, internal};
use crate::model::{ContainerConfig, User};
use crate::{Error, Result};

/// Where programs are looked for when the image does not say.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Builds the process.
pub fn build(config: &ContainerConfig, image: &ImageConfig, hostname: &str) -> Result<Process> {
    let security = &config.security;
    let user = UserBuilder::default()
        .uid(security.user.uid.unwrap_or(0))
        .gid(security.user.gid.unwrap_or(0))
        .additional_gids(security.user.supplementary.clone())
        .build()
        .map_err(internal)?;
    let mut process = ProcessBuilder::default()
        .args(args(config, image)?)
        .env(env(config, image, hostname))
        .cwd(cwd(config, image)?)
        .terminal(config.tty)
        .user(user)
        .capabilities(capabilities::build(&security.capabilities, security.privileged)?);
    // Some(false) takes a late path in libcontainer that fails without CAP_SYS_ADMIN.
    if security.no_new_privileges {
        process = process.no_new_privileges(true);
    }
    let mut process = process.build().map_err(internal)?;
    if !security.no_new_privileges {
        process.set_no_new_privileges(None);
    }
    process.set_apparmor_profile(security.apparmor.clone()).set_selinux_label(None).set_rlimits(None);
    if config.resources.oom_score_adj != 0 {
        process.set_oom_score_adj(i32::try_from(config.resources.oom_score_adj).ok());
    }
    Ok(process)
}

/// The user in words for the agent to resolve in the image; empty if the numbers of the
/// specification stand.
pub fn user(asked: &User, image: &ImageConfig) -> String {
    match (asked.uid, asked.name.as_str()) {
        // The agent looks up the primary group and further groups of a number, too.
        (Some(uid), _) => match asked.gid {
            Some(gid) => format!("{uid}:{gid}"),
            None => uid.to_string(),
        },
        (None, "") => image.user.clone(),
        (None, name) => match asked.gid {
            Some(gid) => format!("{name}:{gid}"),
            None => name.to_owned(),
        },
    }
}

fn args(config: &ContainerConfig, image: &ImageConfig) -> Result<Vec<String>> {
    let args = if !config.command.is_empty() {
        [&config.command[..], &config.args[..]].concat()
    } else if !config.args.is_empty() {
        [&image.entrypoint[..], &config.args[..]].concat()
    } else {
        [&image.entrypoint[..], &image.cmd[..]].concat()
    };
    if args.is_empty() {
        return Err(Error::Invalid(format!(
            "container {:?} has no command: the image {:?} names none, set command or args",
            config.name, config.image
        )));
    }
    Ok(args)
}

fn env(config: &ContainerConfig, image: &ImageConfig, hostname: &str) -> Vec<String> {
    let mut env: Vec<String> = vec![PATH.into(), format!("HOSTNAME={hostname}")];
    if config.tty {
        env.push("TERM=xterm".into());
    }
    let asked = config.env.iter().map(|(name, value)| format!("{name}={value}"));
    for variable in image.env.iter().cloned().chain(asked) {
        let name = variable.split('=').next().unwrap_or_default();
        match env.iter_mut().find(|known| known.split('=').next() == Some(name)) {
            Some(known) => *known = variable,
            None => env.push(variable),
        }
    }
    env
}

fn cwd(config: &ContainerConfig, image: &ImageConfig) -> Result<String> {
    let cwd = [config.working_dir.as_str(), image.working_dir.as_str(), "/"].into_iter().find(|path| !path.is_empty());
    match cwd {
        Some(path) if path.starts_with('/') => Ok(path.into()),
        path => Err(Error::Invalid(format!("working directory {:?} must be absolute", path.unwrap_or_default()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageConfig {
        let mut image = ImageConfig::default();
        image.entrypoint = vec!["entry".into()];
        image.cmd = vec!["cmd".into()];
        image.env = vec!["A=image".into(), "PATH=/image".into()];
        image.user = "app:www".into();
        image
    }

    fn list(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn command_and_args_take_precedence_as_kubernetes_documents() {
        let config = |command: &[&str], arguments: &[&str]| ContainerConfig {
            command: list(command),
            args: list(arguments),
            ..ContainerConfig::default()
        };
        assert_eq!(args(&config(&[], &[]), &image()).unwrap(), ["entry", "cmd"]);
        assert_eq!(args(&config(&["c"], &[]), &image()).unwrap(), ["c"]);
        assert_eq!(args(&config(&[], &["a"]), &image()).unwrap(), ["entry", "a"]);
        assert_eq!(args(&config(&["c"], &["a"]), &image()).unwrap(), ["c", "a"]);
        assert!(args(&config(&[], &[]), &ImageConfig::default()).is_err());
    }

    #[test]
    fn the_pods_environment_wins_over_the_images() {
        let config = ContainerConfig { env: vec![("A".into(), "pod=1".into())], ..ContainerConfig::default() };
        assert_eq!(env(&config, &image(), "web"), ["PATH=/image", "HOSTNAME=web", "A=pod=1"]);
    }

    #[test]
    fn a_user_that_was_asked_for_replaces_the_images() {
        let named = User { name: "bob".into(), ..User::default() };
        let numbered = User { uid: Some(5), gid: Some(6), ..User::default() };
        assert_eq!(user(&User::default(), &image()), "app:www");
        assert_eq!(user(&named, &image()), "bob");
        assert_eq!(user(&numbered, &image()), "5:6");
    }

    #[test]
    fn a_relative_working_directory_is_refused() {
        let config = ContainerConfig { working_dir: "srv".into(), ..ContainerConfig::default() };
        assert!(cwd(&config, &image()).is_err());
    }
}
