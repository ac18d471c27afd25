//! The OCI runtime specification of a container, made from what was asked for and from
//! the image's own configuration.
//!
//! The agent fills in what only the guest knows: the root's path, the numeric user where
//! a name was given, and the mounts of `resolv.conf`, `hosts` and `hostname`.
//!
//! Namespaces: the mount and cgroup namespaces are always the container's own; network,
//! IPC and UTS are the guest's, which is the pod, or those of the pod's user namespace, which
//! the agent knows. Process ids are the container's own where
//! the specification lists a namespace for them; the agent is told whose otherwise.

mod apparmor;
mod capabilities;
mod guest_devices;
mod mounts;
mod process;
mod resources;
mod seccomp;

use nacelle_image::ImageConfig;
use oci_spec::runtime::{
    LinuxBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxSeccomp, RootBuilder, Spec, SpecBuilder,
};

pub use apparmor::policy as apparmor_policy;
pub use guest_devices::has as guest_has;
pub use mounts::Bind;
pub use process::user;
pub use resources::build as limits;

use crate::model::{ContainerConfig, NamespaceMode, Seccomp, Security};
use crate::{Error, Result};

/// Paths hidden from an ordinary container.
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// Paths an ordinary container cannot write.
const READONLY: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Builds the specification. `cgroup` is the container's cgroup in the guest; `binds` are what
/// its mounts become there.
pub fn build(
    config: &ContainerConfig,
    image: &ImageConfig,
    hostname: &str,
    cgroup: &str,
    binds: Vec<Bind>,
) -> Result<Spec> {
    let own: Vec<_> = config.mounts.iter().zip(binds).collect();
    let security = &config.security;
    let mut namespaces = vec![LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup];
    if security.pid == NamespaceMode::Container {
        namespaces.push(LinuxNamespaceType::Pid);
    }
    let namespaces = namespaces
        .into_iter()
        .map(|kind| LinuxNamespaceBuilder::default().typ(kind).build().map_err(internal))
        .collect::<Result<Vec<_>>>()?;
    let paths = |asked: &Option<Vec<String>>, default: &[&str]| match asked {
        _ if security.privileged => Vec::new(),
        Some(paths) => paths.clone(),
        None => default.iter().map(ToString::to_string).collect(),
    };
    let mut resources = resources::build(&config.resources, security.privileged)?;
    if !security.privileged {
        resources.devices_mut().get_or_insert_default().extend(guest_devices::rules(config)?);
    }
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces)
        .cgroups_path(cgroup)
        .resources(resources)
        .masked_paths(paths(&security.masked_paths, MASKED))
        .readonly_paths(paths(&security.readonly_paths, READONLY));
    if let Some(filter) = filter(security)? {
        linux = linux.seccomp(filter);
    }
    let mut spec = SpecBuilder::default()
        .version("1.0.2")
        .root(RootBuilder::default().path("rootfs").readonly(security.readonly_rootfs).build().map_err(internal)?)
        .process(process::build(config, image, hostname)?)
        .mounts(mounts::build(security.privileged, &own, &config.devices, security.user_namespace).map_err(internal)?)
        .linux(linux.build().map_err(internal)?)
        .build()
        .map_err(internal)?;
    // The host name belongs to the pod, whose UTS namespace the container shares.
    spec.set_hostname(None);
    Ok(spec)
}

/// The system call filter; none for privileged containers, whatever they ask for.
fn filter(security: &Security) -> Result<Option<LinuxSeccomp>> {
    if security.privileged {
        return Ok(None);
    }
    match &security.seccomp {
        Seccomp::Unconfined => Ok(None),
        Seccomp::Localhost(path) => seccomp::localhost(path).map(Some),
        Seccomp::RuntimeDefault => {
            let capabilities = capabilities::set(&security.capabilities, false)?;
            seccomp::runtime_default(&capabilities).map(Some).map_err(internal)
        }
    }
}

fn internal(error: oci_spec::OciSpecError) -> Error {
    Error::Internal(format!("OCI specification: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageConfig {
        let mut image = ImageConfig::default();
        image.entrypoint = vec!["/bin/app".into()];
        image
    }

    #[test]
    fn an_ordinary_container_is_confined_and_a_privileged_one_is_not() {
        let plain = build(&ContainerConfig::default(), &image(), "web", "/c/x", Vec::new()).unwrap();
        let linux = plain.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_some());
        assert!(linux.masked_paths().as_ref().unwrap().contains(&"/proc/kcore".to_owned()));
        let security = Security { privileged: true, ..Security::default() };
        let config = ContainerConfig { security, ..ContainerConfig::default() };
        let privileged = build(&config, &image(), "web", "/c/x", Vec::new()).unwrap();
        let linux = privileged.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_none());
        assert!(linux.masked_paths().as_ref().unwrap().is_empty());
    }

    #[test]
    fn network_ipc_and_uts_are_the_pods() {
        let spec = build(&ContainerConfig::default(), &image(), "web", "/c/x", Vec::new()).unwrap();
        let namespaces = spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap();
        let kinds: Vec<_> = namespaces.iter().map(oci_spec::runtime::LinuxNamespace::typ).collect();
        assert_eq!(kinds, [LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup, LinuxNamespaceType::Pid]);
    }
}
