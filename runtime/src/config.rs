//! The one configuration file: every key has a default, an unknown key is an error.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nacelle_sandbox::{GuestConfig, ManagerConfig};
use serde::{Deserialize, Serialize};

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
    /// Names of the RuntimeClass handlers.
    pub handlers: Vec<String>,
    /// What is logged.
    pub log: String,
    /// Factor on every deadline.
    pub timeout_scale: f64,
    /// How guests are made.
    pub guest: GuestConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: "/run/nacelle/nacelle.sock".into(),
            root: "/var/lib/nacelle".into(),
            run: "/run/nacelle".into(),
            handlers: vec!["kata".into()],
            log: "info".into(),
            timeout_scale: 1.0,
            guest: GuestConfig::default(),
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
        config.validate().with_context(|| format!("configuration {}", path.display()))?;
        Ok(config)
    }

    fn validate(&self) -> anyhow::Result<()> {
        if !(self.timeout_scale > 0.0 && self.timeout_scale <= 10_000.0) {
            bail!("timeout_scale = {} must be above 0 and at most 10000", self.timeout_scale);
        }
        if self.handlers.is_empty() || self.handlers.iter().any(String::is_empty) {
            bail!("handlers must name at least one handler, for example \"kata\"");
        }
        let paths = [
            ("socket", &self.socket),
            ("root", &self.root),
            ("run", &self.run),
            ("guest.kernel", &self.guest.kernel),
            ("guest.initramfs", &self.guest.initramfs),
        ];
        if let Some((key, path)) = paths.iter().find(|(_, path)| !path.is_absolute()) {
            bail!("{key} = {path:?} must be an absolute path");
        }
        let ranges = [
            ("guest.memory_mib", self.guest.memory_mib, 64..=1 << 20),
            ("guest.vcpus", u64::from(self.guest.vcpus), 1..=64),
            ("guest.scratch_mib", self.guest.scratch_mib, 16..=16 << 20),
            ("guest.boot_seconds", self.guest.boot_seconds, 1..=3600),
            ("guest.call_seconds", self.guest.call_seconds, 1..=3600),
        ];
        if let Some((key, value, range)) = ranges.iter().find(|(_, value, range)| !range.contains(value)) {
            bail!("{key} = {value} must be {} to {}", range.start(), range.end());
        }
        Ok(())
    }

    /// What the pods' manager needs of it. `program` is this program.
    pub fn manager(&self, program: PathBuf) -> ManagerConfig {
        ManagerConfig {
            root: self.root.clone(),
            run: self.run.clone(),
            program,
            guest: self.guest.clone(),
            timeout_scale: self.timeout_scale,
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
        key("Names of the RuntimeClass handlers served; the first is the default.", "handlers", toml(&self.handlers));
        key("What is logged: error, warn, info, debug, trace, or a filter as in RUST_LOG.", "log", toml(&self.log));
        key("Factor on every deadline: above 1 on slow hosts.", "timeout_scale", toml(self.timeout_scale));
        key("The guest kernel (uncompressed vmlinux).", "guest.kernel", toml(&guest.kernel));
        key("The guest's initial RAM file system with the agent.", "guest.initramfs", toml(&guest.initramfs));
        key("Appended to the guest kernel's command line.", "guest.cmdline", toml(&guest.cmdline));
        key("Memory of a guest in MiB; the host gives what is touched.", "guest.memory_mib", toml(guest.memory_mib));
        key("Virtual CPUs of a guest.", "guest.vcpus", toml(guest.vcpus));
        key("Size in MiB of a pod's writable disk; the file is sparse.", "guest.scratch_mib", toml(guest.scratch_mib));
        key("Seconds a guest may take to a ready agent.", "guest.boot_seconds", toml(guest.boot_seconds));
        key("Seconds for one call to the agent, or to power off.", "guest.call_seconds", toml(guest.call_seconds));
        out
    }
}

/// A value as TOML writes it.
fn toml(value: impl Serialize) -> String {
    toml::Value::try_from(value).map(|value| value.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_reads_back_as_the_configuration() {
        let config = Config {
            handlers: vec!["kata".into(), "kata-\"large\"".into()],
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
    fn an_unknown_key_and_a_bad_value_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.toml");
        for (text, word) in [
            ("sockte = \"/x\"", "sockte"),
            ("[guest]\nmemory_mib = 1", "guest.memory_mib"),
            ("root = \"var\"", "root"),
            ("timeout_scale = 0.0", "timeout_scale"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = format!("{:#}", Config::load(Some(&file)).unwrap_err());
            assert!(error.contains(word) && error.contains("config.toml"), "{error}");
        }
    }
}
