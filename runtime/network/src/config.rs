//! What the administrator decides.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Whether pods get a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A pod without one is not started.
    Required,
    /// A pod gets one if one is configured.
    Optional,
    /// Pods have their loopback interface only.
    Off,
}

/// How pods get their network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// Whether pods get a network.
    pub cni: Mode,
    /// Directory of CNI configurations, of which the first in lexical order counts. It is
    /// read anew for every pod.
    pub conf_directory: PathBuf,
    /// Directories of CNI plugins.
    pub plugin_directories: Vec<PathBuf>,
    /// How many of the configurations a pod joins, with the interfaces eth0, eth1 and so on.
    pub networks: usize,
    /// Directory in which the pods' network namespaces have their names, `nacelle-<id>`.
    pub netns_directory: PathBuf,
    /// Seconds a plugin may take for one command.
    pub plugin_seconds: u64,
    /// Seconds after which a pod goes although plugins do not take it off its networks. They are asked again
    /// without it.
    pub del_seconds: u64,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            cni: Mode::Required,
            conf_directory: "/etc/cni/net.d".into(),
            plugin_directories: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            networks: 1,
            netns_directory: "/run/netns".into(),
            plugin_seconds: 60,
            del_seconds: 300,
        }
    }
}
