//! The one configuration file: every key has a default, an unknown key is an error.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use nacelle_image::{Mirrors, Pace, Verifiers};
use nacelle_sandbox::{CgroupDriver, GuestConfig, GuestHandler, ImageVolumes, ManagerConfig, NetworkConfig, Seccomp};
use serde::{Deserialize, Serialize};

use crate::handlers::{self, HandlerConfig};
use crate::streaming::StreamingConfig;

/// Read when no other file is named.
const DEFAULT_FILE: &str = "/etc/nacelle/config.toml";
/// Multiplies every deadline, on top of the configured factor; for emulated hosts.
const SCALE_VARIABLE: &str = "NACELLE_TIMEOUT_SCALE";

/// The configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Unix socket of the CRI.
    pub socket: PathBuf,
    /// Directory that survives a reboot.
    pub root: PathBuf,
    /// Directory that need not.
    pub run: PathBuf,
    /// What is logged.
    pub log: String,
    /// Factor on every deadline.
    pub timeout_scale: f64,
    /// How the kubelet names the cgroups of its pods.
    pub cgroup_driver: CgroupDriver,
    /// What filters the system calls of a container that names no profile.
    pub unset_seccomp: UnsetSeccomp,
    /// How guests are made.
    pub guest: GuestConfig,
    /// How pods get their network.
    pub network: NetworkConfig,
    /// Where registries are.
    pub registry: RegistryConfig,
    /// What is kept of images.
    pub images: ImagesConfig,
    /// Where exec, attach and port forwarding are served.
    pub streaming: StreamingConfig,
    /// The handler of pods without a RuntimeClass.
    pub default_handler: String,
    /// The RuntimeClass handlers, by name.
    pub handlers: BTreeMap<String, HandlerConfig>,
}

/// Where registries are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Directories with `HOST/hosts.toml`; the first that has something for a registry counts.
    pub config_path: Vec<PathBuf>,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self { config_path: vec!["/etc/nacelle/certs.d".into()] }
    }
}

/// How images are pulled, and what is kept of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImagesConfig {
    /// Names of images that the kubelet must not remove to make room.
    pub pinned: Vec<String>,
    /// What becomes of the directories that an image declares for data (`VOLUME`).
    pub volumes: ImageVolumes,
    /// How many layers of one image are fetched at the same time.
    pub max_concurrent_downloads: u32,
    /// How many layers of all images are taken in at the same time; 0 for one a processor.
    pub max_concurrent_unpacks: u32,
    /// How long a pull may get nothing from its registry.
    pub image_pull_progress_timeout: String,
    /// Bytes a second below which a connection is given up.
    pub min_download_rate: u64,
    /// Who is asked whether an image may be pulled.
    pub image_verifiers: VerifiersConfig,
}

/// Programs that are asked whether an image may be pulled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VerifiersConfig {
    /// Their directory.
    pub bin_dir: PathBuf,
    /// How many of them are asked; below 0 for all.
    pub max_verifiers: i64,
    /// How long each may take.
    pub per_verifier_timeout: String,
}

impl Default for VerifiersConfig {
    fn default() -> Self {
        Self {
            bin_dir: "/opt/nacelle/image-verifier/bin".into(),
            max_verifiers: 10,
            per_verifier_timeout: "10s".to_owned(),
        }
    }
}

impl VerifiersConfig {
    fn verifiers(&self, scale: f64) -> anyhow::Result<Verifiers> {
        let text = &self.per_verifier_timeout;
        let timeout = nacelle_image::parse_duration(text).with_context(|| {
            format!(
                "images.image_verifiers.per_verifier_timeout = {text:?} is not a time from 1ms to 1h such as \"10s\""
            )
        })?;
        Ok(Verifiers {
            bin_dir: self.bin_dir.clone(),
            max_verifiers: usize::try_from(self.max_verifiers).ok(),
            per_verifier_timeout: timeout.mul_f64(scale),
        })
    }
}

impl Default for ImagesConfig {
    fn default() -> Self {
        let Pace { least_rate, .. } = Pace::default();
        Self {
            pinned: Vec::new(),
            volumes: ImageVolumes::default(),
            max_concurrent_downloads: 3,
            max_concurrent_unpacks: 0,
            image_pull_progress_timeout: "5m".to_owned(),
            min_download_rate: least_rate,
            image_verifiers: VerifiersConfig::default(),
        }
    }
}

impl ImagesConfig {
    /// How slow registries may be.
    fn pace(&self, scale: f64) -> anyhow::Result<Pace> {
        let text = &self.image_pull_progress_timeout;
        // As containerd has it, no time at all is no limit.
        let timeout = match text.as_str() {
            "0" | "0s" | "0m" | "0h" => None,
            _ => Some(nacelle_image::parse_duration(text).with_context(|| {
                format!("images.image_pull_progress_timeout = {text:?} is not a time from 1ms to 1h such as \"5m\"")
            })?),
        };
        Ok(Pace { progress_timeout: timeout.map(|time| time.mul_f64(scale)), least_rate: self.min_download_rate })
    }
}

/// System call filter of a container that names none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnsetSeccomp {
    /// None, as the CRI's conformance suite wants it.
    #[default]
    Unconfined,
    /// The default one.
    RuntimeDefault,
}

impl From<UnsetSeccomp> for Seccomp {
    fn from(unset: UnsetSeccomp) -> Self {
        match unset {
            UnsetSeccomp::Unconfined => Self::Unconfined,
            UnsetSeccomp::RuntimeDefault => Self::RuntimeDefault,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: "/run/nacelle/nacelle.sock".into(),
            root: "/var/lib/nacelle".into(),
            run: "/run/nacelle".into(),
            log: "info".into(),
            timeout_scale: 1.0,
            cgroup_driver: CgroupDriver::default(),
            unset_seccomp: UnsetSeccomp::default(),
            guest: GuestConfig::default(),
            network: NetworkConfig::default(),
            registry: RegistryConfig::default(),
            images: ImagesConfig::default(),
            streaming: StreamingConfig::default(),
            default_handler: "kata".into(),
            handlers: BTreeMap::from([("kata".into(), HandlerConfig::default())]),
        }
    }
}

impl Config {
    /// Reads `file`, or the default file if it is there, or takes the defaults.
    pub fn load(file: Option<&Path>) -> anyhow::Result<Self> {
        let path = file.unwrap_or(Path::new(DEFAULT_FILE));
        let mut config = match std::fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).with_context(|| format!("configuration {}", path.display()))?,
            Err(error) if file.is_none() && error.kind() == std::io::ErrorKind::NotFound => Self::default(),
            Err(error) => return Err(error).with_context(|| format!("read configuration {}", path.display())),
        };
        if let Ok(text) = std::env::var(SCALE_VARIABLE) {
            let factor: f64 = text.parse().with_context(|| format!("{SCALE_VARIABLE}={text:?} is not a number"))?;
            config.timeout_scale *= factor;
        }
        if let Ok(program) = std::env::current_exe() {
            take_own_guest(&program, &mut config.guest);
        }
        config.validate().with_context(|| format!("configuration {}", path.display()))?;
        Ok(config)
    }

    fn validate(&self) -> anyhow::Result<()> {
        if !(self.timeout_scale > 0.0 && self.timeout_scale <= 10_000.0) {
            bail!("timeout_scale = {} must be above 0 and at most 10000", self.timeout_scale);
        }
        let paths = [
            ("socket", &self.socket),
            ("root", &self.root),
            ("run", &self.run),
            ("guest.template_directory", &self.guest.template_directory),
            ("images.image_verifiers.bin_dir", &self.images.image_verifiers.bin_dir),
            ("network.conf_directory", &self.network.conf_directory),
            ("network.netns_directory", &self.network.netns_directory),
        ];
        let roots = self.registry.config_path.iter().map(|path| ("registry.config_path", path));
        let plugins = self.network.plugin_directories.iter().map(|path| ("network.plugin_directories", path));
        if let Some((key, path)) = paths.into_iter().chain(roots).chain(plugins).find(|(_, path)| !path.is_absolute()) {
            bail!("{key} = {path:?} must be an absolute path");
        }
        for name in &self.images.pinned {
            name.parse::<nacelle_image::Reference>().with_context(|| format!("images.pinned = {name:?}"))?;
        }
        let guest = &self.guest;
        check_guest("guest", guest)?;
        self.images.pace(self.timeout_scale)?;
        self.images.image_verifiers.verifiers(self.timeout_scale)?;
        let ranges = [
            ("guest.templates", guest.templates.into(), 0..=64),
            ("guest.boot_seconds", guest.boot_seconds, 1..=3600),
            ("guest.call_seconds", guest.call_seconds, 1..=3600),
            ("guest.unknown_seconds", guest.unknown_seconds, 1..=7 * 24 * 3600),
            ("images.max_concurrent_downloads", self.images.max_concurrent_downloads.into(), 1..=1024),
            ("images.max_concurrent_unpacks", self.images.max_concurrent_unpacks.into(), 0..=1024),
            ("network.networks", self.network.networks as u64, 1..=16),
            ("network.plugin_seconds", self.network.plugin_seconds, 1..=3600),
            ("network.del_seconds", self.network.del_seconds, 1..=86_400),
        ];
        check_ranges(ranges)?;
        handlers::validate(self)?;
        self.streaming.validate()
    }

    /// What the pods' manager needs of it. `program` is this program.
    pub fn manager(&self, program: PathBuf) -> ManagerConfig {
        ManagerConfig {
            root: self.root.clone(),
            run: self.run.clone(),
            program,
            guest: self.guest.clone(),
            handlers: self.guest_handlers(),
            image_volumes: self.images.volumes,
            network: self.network.clone(),
            cgroup_driver: self.cgroup_driver,
            timeout_scale: self.timeout_scale,
        }
    }

    /// The handlers, each in whole.
    pub fn guest_handlers(&self) -> BTreeMap<String, GuestHandler> {
        self.handlers.iter().map(|(name, handler)| (name.clone(), handler.of(&self.guest))).collect()
    }

    /// How guests of the default handler are made.
    pub fn default_guest(&self) -> GuestConfig {
        let handler = self.handlers.get(&self.default_handler);
        handler.map_or_else(|| self.guest.clone(), |handler| handler.of(&self.guest).guest)
    }

    /// How the store of images is opened.
    pub fn image_options(&self) -> nacelle_image::Options {
        let mirrors = Mirrors::new(self.registry.config_path.clone());
        nacelle_image::Options {
            endpoints: Arc::new(move |host| mirrors.endpoints(host)),
            pace: self.images.pace(self.timeout_scale).unwrap_or_default(),
            downloads: self.images.max_concurrent_downloads as usize,
            verifiers: self.images.image_verifiers.verifiers(self.timeout_scale).ok(),
            unpacks: Some(self.images.max_concurrent_unpacks as usize).filter(|unpacks| *unpacks > 0),
            ..nacelle_image::Options::default()
        }
    }

    /// The configuration as a file, with comments.
    pub fn describe(&self) -> String {
        let guest = &self.guest;
        let mut out = String::from("# Nacelle's configuration. Every key may be left out.\n");
        let mut key = |comment: &str, key: &str, value: String| {
            let comment = if comment.is_empty() { String::new() } else { format!("\n# {comment}\n") };
            out.push_str(&format!("{comment}{key} = {value}\n"));
        };
        key("Unix socket on which the Container Runtime Interface is served.", "socket", toml(&self.socket));
        key("Directory for images, records and disks of pods; survives a reboot.", "root", toml(&self.root));
        key("Directory for sockets of running pods; may be a tmpfs.", "run", toml(&self.run));
        key(
            "What is logged: error, warn, info, debug, trace, or several with targets, as in RUST_LOG, which wins: \
             \"info,nacelle::cri::exec=warn\" leaves the calls of probes out, \"info,nacelle::cri=debug\" has the \
             calls that only read, too.",
            "log",
            toml(&self.log),
        );
        key("Factor on every deadline: above 1 on slow hosts.", "timeout_scale", toml(self.timeout_scale));
        key(
            "How the kubelet names cgroups: cgroupfs, systemd, or auto for what the host's init suggests.",
            "cgroup_driver",
            toml(self.cgroup_driver),
        );
        key(
            "System call filter of a container whose caller names none (a kubelet always does): unconfined, as the \
             CRI's conformance suite wants it, or runtime-default.",
            "unset_seccomp",
            toml(self.unset_seccomp),
        );
        key("The guest kernel (uncompressed vmlinux).", "guest.kernel", toml(&guest.kernel));
        key("The guest's initial RAM file system with the agent.", "guest.initramfs", toml(&guest.initramfs));
        key("Appended to the guest kernel's command line.", "guest.cmdline", toml(&guest.cmdline));
        key(
            "Memory in MiB of a guest whose containers have no limit; the host gives what is touched.",
            "guest.memory_mib",
            toml(guest.memory_mib),
        );
        key(
            "Memory in MiB of a guest beside its containers' limits and what its kernel has by its size; cut to 36 \
             where the pod's cgroup has no room.",
            "guest.base_mib",
            toml(guest.base_mib),
        );
        key(
            "Most memory of a guest in MiB; 0 for all the host has.",
            "guest.max_memory_mib",
            toml(guest.max_memory_mib),
        );
        key("Virtual CPUs of a guest whose pod names none.", "guest.vcpus", toml(guest.vcpus));
        key("Most virtual CPUs of a guest.", "guest.max_vcpus", toml(guest.max_vcpus));
        key("Size in MiB of a pod's writable disk; the file is sparse.", "guest.scratch_mib", toml(guest.scratch_mib));
        key(
            "How many sizes of guests are kept saved, to be cloned instead of booted: about 50 MiB each, which their \
             clones share. 0 to boot every guest.",
            "guest.templates",
            toml(guest.templates),
        );
        key(
            "Directory of saved guests; belongs on a tmpfs, and may be shared with other daemons.",
            "guest.template_directory",
            toml(&guest.template_directory),
        );
        key("Seconds a guest may take to a ready agent.", "guest.boot_seconds", toml(guest.boot_seconds));
        key("Seconds for one call to the agent, or to power off.", "guest.call_seconds", toml(guest.call_seconds));
        key(
            "Seconds without a sign of life after which the containers of a guest are unknown; a kubelet kills and \
             restarts such.",
            "guest.unknown_seconds",
            toml(guest.unknown_seconds),
        );
        let network = &self.network;
        key(
            "Whether pods join a network by CNI: \"required\", \"optional\" (if one is configured), or \"off\".",
            "network.cni",
            toml(network.cni),
        );
        key(
            "Directory of CNI configurations, read anew for every pod; the first in lexical order counts.",
            "network.conf_directory",
            toml(&network.conf_directory),
        );
        key("Directories of CNI plugins.", "network.plugin_directories", toml(&network.plugin_directories));
        key(
            "How many of the configurations a pod joins, as eth0, eth1, ….",
            "network.networks",
            toml(network.networks),
        );
        key("Directory of the pods' network namespaces.", "network.netns_directory", toml(&network.netns_directory));
        key("Seconds a CNI plugin may take for one command.", "network.plugin_seconds", toml(network.plugin_seconds));
        key(
            "Seconds after which a pod goes although CNI plugins fail to take it off; they are asked again without it.",
            "network.del_seconds",
            toml(network.del_seconds),
        );
        let paths = &self.registry.config_path;
        key(
            "Directories with mirrors and certificates of registries: HOST/hosts.toml, as containerd reads it.",
            "registry.config_path",
            toml(paths),
        );
        key("Images that the kubelet must not remove to make room.", "images.pinned", toml(&self.images.pinned));
        key(
            "Directories that an image declares for data (VOLUME): \"bind\" them, so that they can be written to under a \
             read-only root, too, \"mkdir\" for directories of the root, or \"ignore\".",
            "images.volumes",
            toml(self.images.volumes),
        );
        key(
            "How many layers of one image are fetched at the same time.",
            "images.max_concurrent_downloads",
            toml(self.images.max_concurrent_downloads),
        );
        key(
            "How many layers of all images are taken in at the same time, which pulls share fairly; 0 for one a \
             processor.",
            "images.max_concurrent_unpacks",
            toml(self.images.max_concurrent_unpacks),
        );
        key(
            "How long a pull may get nothing from its registry; \"0s\" for ever.",
            "images.image_pull_progress_timeout",
            toml(&self.images.image_pull_progress_timeout),
        );
        key(
            "Bytes a second, over a minute, below which a download is given up; 0 to take any.",
            "images.min_download_rate",
            toml(self.images.min_download_rate),
        );
        let verifiers = &self.images.image_verifiers;
        key(
            "Directory of programs that are asked whether an image may be pulled, as containerd asks its image verifiers; \
             all that are asked must allow it.",
            "images.image_verifiers.bin_dir",
            toml(&verifiers.bin_dir),
        );
        key(
            "How many of them are asked, the first by name; -1 for all.",
            "images.image_verifiers.max_verifiers",
            toml(verifiers.max_verifiers),
        );
        key(
            "How long each may take; one that takes longer does not allow the image.",
            "images.image_verifiers.per_verifier_timeout",
            toml(&verifiers.per_verifier_timeout),
        );
        self.streaming.describe(&mut key);
        key("The handler of pods without a RuntimeClass.", "default_handler", toml(&self.default_handler));
        handlers::describe(&self.handlers, &mut key);
        out
    }
}

/// Refuses what no guest can have. `of` is the table that says it.
pub fn check_guest(of: &str, guest: &GuestConfig) -> anyhow::Result<()> {
    for (key, path) in [("kernel", &guest.kernel), ("initramfs", &guest.initramfs)] {
        if !path.is_absolute() {
            bail!("{of}.{key} = {path:?} must be an absolute path");
        }
    }
    let vcpus = GuestConfig::VCPUS;
    let most_vcpus = u64::from(*vcpus.end());
    let ranges = [
        ("memory_mib", guest.memory_mib, GuestConfig::MEMORY_MIB),
        ("base_mib", guest.base_mib, 32..=1 << 20),
        ("max_memory_mib", guest.max_memory_mib, 0..=1 << 20),
        ("vcpus", guest.vcpus.into(), u64::from(*vcpus.start())..=most_vcpus),
        ("max_vcpus", u64::from(guest.max_vcpus), guest.vcpus.into()..=most_vcpus),
        ("scratch_mib", guest.scratch_mib, 16..=16 << 20),
    ];
    check_ranges(ranges.map(|(key, value, range)| (format!("{of}.{key}"), value, range)))
}

fn check_ranges<K: std::fmt::Display, const N: usize>(
    ranges: [(K, u64, std::ops::RangeInclusive<u64>); N],
) -> anyhow::Result<()> {
    if let Some((key, value, range)) = ranges.iter().find(|(_, value, range)| !range.contains(value)) {
        bail!("{key} = {value} must be {} to {}", range.start(), range.end());
    }
    Ok(())
}

/// Guests start from the kernel and the agent of the program's own version, where it is installed
/// beside them, and nothing else is configured: a daemon that goes on while another version is
/// installed stays with what it knows.
fn take_own_guest(program: &Path, guest: &mut GuestConfig) {
    let standard = GuestConfig::default();
    let Some(directory) = program.parent() else { return };
    for (path, standard) in [(&mut guest.kernel, standard.kernel), (&mut guest.initramfs, standard.initramfs)] {
        let own = standard.file_name().map(|name| directory.join(name)).filter(|own| own.is_file());
        if let Some(own) = own.filter(|_| *path == standard) {
            *path = own;
        }
    }
}

/// A value as TOML writes it.
pub fn toml(value: impl Serialize) -> String {
    toml::Value::try_from(value).map(|value| value.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_reads_back_as_the_configuration() {
        let config = Config {
            handlers: BTreeMap::from([
                ("kata".into(), HandlerConfig::default()),
                ("kata-\"large\"".into(), HandlerConfig::sample()),
            ]),
            guest: GuestConfig { cmdline: "a=\"b\" c".into(), ..GuestConfig::default() },
            ..Config::default()
        };
        let back: Config = toml::from_str(&config.describe()).unwrap();
        assert_eq!(back, config);
    }

    #[test]
    fn the_description_names_every_key() {
        let config = Config::default();
        let all = toml::Value::try_from(&config).unwrap();
        let described: toml::Value = toml::from_str(&config.describe()).unwrap();
        assert_eq!(all, described);
    }

    #[test]
    fn a_program_stays_with_the_kernel_and_agent_of_its_version() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("nacelle");
        let standard = GuestConfig::default();
        let mut guest = standard.clone();
        take_own_guest(&program, &mut guest);
        assert_eq!(guest, standard, "nothing is beside it");
        for name in ["vmlinux", "initramfs.cpio"] {
            std::fs::write(directory.path().join(name), "x").unwrap();
        }
        guest.initramfs = "/elsewhere/initramfs.cpio".into();
        take_own_guest(&program, &mut guest);
        assert_eq!(guest.kernel, directory.path().join("vmlinux"));
        assert_eq!(guest.initramfs, Path::new("/elsewhere/initramfs.cpio"), "as configured");
    }

    #[test]
    fn an_unknown_key_and_a_bad_value_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.toml");
        for (text, word) in [
            ("sockte = \"/x\"", "sockte"),
            ("[guest]\nmemory_mib = 1", "guest.memory_mib"),
            ("root = \"var\"", "root"),
            ("timeout_scale = 0.0", "timeout_scale"),
            ("registry.config_path = [\"certs.d\"]", "registry.config_path"),
            ("images.pinned = [\"A B\"]", "images.pinned"),
            ("images.image_pull_progress_timeout = \"soon\"", "images.image_pull_progress_timeout"),
            ("images.image_verifiers.bin_dir = \"bin\"", "images.image_verifiers.bin_dir"),
            ("images.image_verifiers.per_verifier_timeout = \"\"", "images.image_verifiers.per_verifier_timeout"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = format!("{:#}", Config::load(Some(&file)).unwrap_err());
            assert!(error.contains(word) && error.contains("config.toml"), "{error}");
        }
    }
}
