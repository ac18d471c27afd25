//! What the manager needs to know of the host and of the guests it makes.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use nacelle_network::NetworkConfig;
use serde::{Deserialize, Serialize};

use crate::cgroup::CgroupDriver;
use crate::handlers::GuestHandler;

/// How guests are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuestConfig {
    /// Uncompressed guest kernel.
    pub kernel: PathBuf,
    /// Initial RAM file system holding the agent.
    pub initramfs: PathBuf,
    /// Appended to the guest kernel's command line.
    pub cmdline: String,
    /// Memory in MiB of a guest whose containers have no limit, and what such containers
    /// get beside others that have one.
    pub memory_mib: u64,
    /// Memory in MiB of a guest beside the limits of its containers and what its kernel has by its
    /// size: its kernel and agent. Less where the pod's cgroup on the host has no room for it.
    pub base_mib: u64,
    /// Most memory of a guest in MiB; 0 for what the host has.
    pub max_memory_mib: u64,
    /// Virtual CPUs of a guest whose pod names none.
    pub vcpus: u8,
    /// Most virtual CPUs of a guest.
    pub max_vcpus: u8,
    /// Size in MiB of the pod's writable disk. The file is sparse: it costs what is written.
    pub scratch_mib: u64,
    /// How many sizes of guests are kept saved, to be cloned; 0 to boot every guest.
    pub templates: u16,
    /// Directory of those, which daemons may share. What is in it is the memory of guests: it
    /// belongs on a tmpfs.
    pub template_directory: PathBuf,
    /// Seconds a guest may take from the start of its VMM to a ready agent.
    pub boot_seconds: u64,
    /// Seconds the agent may take for one call, and the guest for its shutdown.
    pub call_seconds: u64,
    /// Seconds without a sign of life after which nobody can say any more what runs in a guest.
    pub unknown_seconds: u64,
}

impl GuestConfig {
    /// What [`Self::memory_mib`] can be.
    pub const MEMORY_MIB: RangeInclusive<u64> = 64..=1 << 20;
    /// What [`Self::vcpus`] can be.
    pub const VCPUS: RangeInclusive<u8> = 1..=64;
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self {
            kernel: "/usr/lib/nacelle/vmlinux".into(),
            initramfs: "/usr/lib/nacelle/initramfs.cpio".into(),
            cmdline: String::new(),
            memory_mib: 256,
            base_mib: 96,
            max_memory_mib: 0,
            vcpus: 1,
            max_vcpus: 64,
            scratch_mib: 10 * 1024,
            templates: 4,
            template_directory: "/run/nacelle/templates".into(),
            boot_seconds: 30,
            call_seconds: 30,
            unknown_seconds: 300,
        }
    }
}

/// What becomes of the directories that an image declares for data (`VOLUME`), by CRI-O's names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageVolumes {
    /// They exist, and can be written to although the container's root cannot be.
    #[default]
    Bind,
    /// They exist, and are like the rest of the container's root.
    Mkdir,
    /// Nothing: they are there if the image has them.
    Ignore,
}

/// Everything [`crate::Manager::open`] needs.
#[derive(Debug, Clone)]
pub struct ManagerConfig {
    /// Directory that survives a reboot: records and scratch disks.
    pub root: PathBuf,
    /// Directory that need not: sockets and consoles.
    pub run: PathBuf,
    /// The `nacelle` program to start as `nacelle vmm`.
    pub program: PathBuf,
    /// How guests are made that no handler says otherwise of; how many are saved, where, and how long they may take, for
    /// all of them.
    pub guest: GuestConfig,
    /// The RuntimeClass handlers by name.
    pub handlers: BTreeMap<String, GuestHandler>,
    /// What becomes of images' volumes.
    pub image_volumes: ImageVolumes,
    /// How pods get their network.
    pub network: NetworkConfig,
    /// How the kubelet names cgroups.
    pub cgroup_driver: CgroupDriver,
    /// Every deadline is multiplied by this; above 1 on slow (emulated) hosts.
    pub timeout_scale: f64,
}

impl ManagerConfig {
    /// What the VMM appends to its own command line for the guest's kernel: the agent hears
    /// there how slow this host is.
    #[must_use]
    pub fn guest_command_line(&self, guest: &GuestConfig) -> String {
        let configured = &guest.cmdline;
        match self.timeout_scale {
            1.0 => configured.clone(),
            scale => format!("{configured} nacelle.timeout_scale={scale}").trim_start().to_owned(),
        }
    }

    /// Deadline for a guest to become ready.
    #[must_use]
    pub fn boot_deadline(&self) -> Duration {
        Duration::from_secs(self.guest.boot_seconds).mul_f64(self.timeout_scale)
    }

    /// Deadline for one call to the agent.
    #[must_use]
    pub fn call_deadline(&self) -> Duration {
        Duration::from_secs(self.guest.call_seconds).mul_f64(self.timeout_scale)
    }

    /// How long a guest may give no sign of life until its containers are unknown.
    #[must_use]
    pub fn unknown_after(&self) -> Duration {
        Duration::from_secs(self.guest.unknown_seconds).mul_f64(self.timeout_scale)
    }
}
