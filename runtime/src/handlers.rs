//! `[handlers.NAME]` of the configuration: what pods of a RuntimeClass handler run in.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::bail;
use nacelle_sandbox::{GuestConfig, GuestHandler, GuestSetting};
use serde::{Deserialize, Serialize};

use crate::config::{Config, check_guest, toml};

/// The longest name of a handler, which is a DNS label to Kubernetes.
const NAME: usize = 63;

/// A handler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum HandlerConfig {
    /// Its pods are guests.
    Guest(GuestOverrides),
}

impl Default for HandlerConfig {
    fn default() -> Self {
        Self::Guest(GuestOverrides::default())
    }
}

/// What is different in a handler's guests: a key that is left out is as in `[guest]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuestOverrides {
    /// Uncompressed guest kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system holding the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Appended to the guest kernel's command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Memory in MiB of a guest whose containers have no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Memory in MiB beside the containers' limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_mib: Option<u64>,
    /// Most memory in MiB; 0 for what the host has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory_mib: Option<u64>,
    /// Virtual CPUs of a guest whose pod names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u8>,
    /// Most virtual CPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u8>,
    /// Size in MiB of a pod's writable disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scratch_mib: Option<u64>,
    /// Whether they are cloned from saved guests, with which they share memory; false to boot every one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cloned: Option<bool>,
    /// What a pod's annotations `guest.nacelle/NAME` may change.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub annotations: Vec<GuestSetting>,
}

impl HandlerConfig {
    /// What it is where guests are made like `guest` unless it says otherwise.
    pub fn of(&self, guest: &GuestConfig) -> GuestHandler {
        let Self::Guest(own) = self;
        let common = guest.clone();
        let guest = GuestConfig {
            kernel: own.kernel.clone().unwrap_or(common.kernel),
            initramfs: own.initramfs.clone().unwrap_or(common.initramfs),
            cmdline: own.cmdline.clone().unwrap_or(common.cmdline),
            memory_mib: own.memory_mib.unwrap_or(common.memory_mib),
            base_mib: own.base_mib.unwrap_or(common.base_mib),
            max_memory_mib: own.max_memory_mib.unwrap_or(common.max_memory_mib),
            vcpus: own.vcpus.unwrap_or(common.vcpus),
            max_vcpus: own.max_vcpus.unwrap_or(common.max_vcpus),
            scratch_mib: own.scratch_mib.unwrap_or(common.scratch_mib),
            templates: if own.cloned == Some(false) { 0 } else { common.templates },
            ..common
        };
        GuestHandler { guest, annotations: own.annotations.clone() }
    }
}

/// Refuses handlers that no RuntimeClass can name, and guests that cannot be.
pub fn validate(config: &Config) -> anyhow::Result<()> {
    let Config { handlers, default_handler, guest, .. } = config;
    if !handlers.contains_key(default_handler) {
        let names: Vec<_> = handlers.keys().map(String::as_str).collect();
        let known = if names.is_empty() { "none is configured".to_owned() } else { names.join(", ") };
        bail!("default_handler = {default_handler:?} must be one of the handlers: {known}");
    }
    for (name, handler) in handlers {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let edges = name.starts_with('-') || name.ends_with('-');
        if name.is_empty() || name.len() > NAME || edges || !name.bytes().all(allowed) {
            bail!("handlers.{name:?}: a RuntimeClass can name lower case letters, digits and dashes only");
        }
        check_guest(&format!("handlers.{name}"), &handler.of(guest).guest)?;
    }
    Ok(())
}

/// The handlers as keys of the configuration's file.
pub fn describe(handlers: &BTreeMap<String, HandlerConfig>, key: &mut impl FnMut(&str, &str, String)) {
    let mut comment = "The RuntimeClass handlers. A table handlers.NAME has kind = \"guest\", and may have, of what guest \
                       says for all, its own kernel, initramfs, cmdline, memory_mib, base_mib, max_memory_mib, vcpus, \
                       max_vcpus and scratch_mib; cloned = false to boot its guests whatever guest.templates is; and \
                       annotations = [\"memory_mib\", \"vcpus\"] for what a pod's annotations guest.nacelle/NAME may \
                       change.";
    for (name, handler) in handlers {
        let Ok(toml::Value::Table(table)) = toml::Value::try_from(handler) else { continue };
        for (word, value) in table {
            key(std::mem::take(&mut comment), &format!("handlers.{}.{word}", toml(name)), value.to_string());
        }
    }
}

#[cfg(test)]
impl HandlerConfig {
    /// One that says all it can.
    pub fn sample() -> Self {
        Self::Guest(GuestOverrides {
            kernel: Some("/boot/vmlinux".into()),
            initramfs: Some("/boot/initramfs.cpio".into()),
            cmdline: Some("a=\"b\"".into()),
            memory_mib: Some(1024),
            base_mib: Some(64),
            max_memory_mib: Some(4096),
            vcpus: Some(2),
            max_vcpus: Some(8),
            scratch_mib: Some(64),
            cloned: Some(false),
            annotations: vec![GuestSetting::MemoryMib, GuestSetting::Vcpus],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|error| error.to_string())?;
        validate(&config).map_err(|error| error.to_string())?;
        Ok(config)
    }

    #[test]
    fn a_handler_has_of_all_guests_what_it_does_not_say_itself() {
        let config = read(
            "default_handler = \"small\"\n[guest]\nvcpus = 3\ncmdline = \"quiet\"\n[handlers.small]\nkind = \"guest\"\n\
             memory_mib = 64\ncloned = false\n",
        )
        .unwrap();
        let manager = config.manager("/bin/nacelle".into());
        assert_eq!(manager.handlers.len(), 1, "those that are named, and no other");
        let small = &manager.handlers["small"].guest;
        assert_eq!((small.memory_mib, small.vcpus, small.templates), (64, 3, 0));
        assert_eq!((small.cmdline.as_str(), &small.kernel), ("quiet", &config.guest.kernel));
        assert_eq!(HandlerConfig::sample().of(&config.guest).guest.max_memory_mib, 4096);
    }

    #[test]
    fn a_handler_that_cannot_be_is_refused_by_its_key() {
        for (text, words) in [
            ("default_handler = \"runc\"", "default_handler = \"runc\""),
            ("[handlers.large]\nkind = \"guest\"", "default_handler = \"kata\" must be one of the handlers: large"),
            ("[handlers]", "none is configured"),
            ("[handlers.kata]\nmemory_mib = 64", "kind"),
            ("[handlers.kata]\nkind = \"oci\"\ncommand = \"runc\"", "oci"),
            ("[handlers.kata]\nkind = \"guest\"\nmemory = 64", "memory"),
            ("[handlers.kata]\nkind = \"guest\"\nboot_seconds = 64", "boot_seconds"),
            ("[handlers.kata]\nkind = \"guest\"\nmemory_mib = 1", "handlers.kata.memory_mib = 1"),
            ("[handlers.kata]\nkind = \"guest\"\nvcpus = 8\nmax_vcpus = 4", "handlers.kata.max_vcpus = 4"),
            ("[handlers.kata]\nkind = \"guest\"\nkernel = \"vmlinux\"", "handlers.kata.kernel"),
            ("[handlers.kata]\nkind = \"guest\"\nannotations = [\"kernel\"]", "kernel"),
            ("default_handler = \"A b\"\n[handlers.\"A b\"]\nkind = \"guest\"", "A b"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
