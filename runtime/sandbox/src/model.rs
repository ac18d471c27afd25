//! Pods and containers in our own words: what is asked for, and what is.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use nacelle_image::Image;
use nacelle_network::PortMapping;
use serde::{Deserialize, Serialize};

use crate::record::Versions;
use crate::sizing::GuestSize;

/// A pod as asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxConfig {
    /// Name of the pod.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its unique id, given by the cluster.
    pub uid: String,
    /// Counts the sandboxes made for this pod, from 0.
    pub attempt: u32,
    /// Host name inside; empty for one made of the pod's name: [`host_name`](Self::host_name).
    pub hostname: String,
    /// Directory on the host below which container logs are written; may be empty.
    pub log_directory: String,
    /// Name resolution.
    pub dns: Dns,
    /// Labels, kept and shown.
    pub labels: BTreeMap<String, String>,
    /// Annotations, kept and shown.
    pub annotations: BTreeMap<String, String>,
    /// Parent cgroup on the host; empty for the daemon's own choice.
    pub cgroup_parent: String,
    /// Kernel parameters by dotted name.
    pub sysctls: BTreeMap<String, String>,
    /// Name of the runtime handler.
    pub handler: String,
    /// How containers of the pod share process ids, by default.
    pub pid: NamespaceMode,
    /// The user namespace that its containers are in; none for the guest's own.
    pub user_namespace: Option<UserNamespace>,
    /// Ports of the host that lead to the pod.
    #[serde(default)]
    pub ports: Vec<PortMapping>,
    /// Whether it may hold privileged containers.
    pub privileged: bool,
    /// Sum of its containers' limits; zero where there is none.
    pub resources: Resources,
    /// What the pod may use beside them, for the guest itself and its VMM.
    pub overhead: Resources,
}

impl SandboxConfig {
    /// The pod's host name: the one asked for, or else the pod's name, cut after 63 bytes as
    /// the kubelet cuts it, and with a dash for what cannot be in a host name.
    #[must_use]
    pub fn host_name(&self) -> String {
        if !self.hostname.is_empty() {
            return self.hostname.clone();
        }
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        let name: String = self.name.chars().map(plain).take(63).collect();
        name.trim_matches(['-', '.']).to_owned()
    }
}

/// `resolv.conf` of the pod.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Dns {
    /// Name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

impl Dns {
    /// The text of `/etc/resolv.conf`; empty if nothing is set.
    #[must_use]
    pub fn resolv_conf(&self) -> String {
        let mut text = String::new();
        if !self.searches.is_empty() {
            text.push_str(&format!("search {}\n", self.searches.join(" ")));
        }
        for server in &self.servers {
            text.push_str(&format!("nameserver {server}\n"));
        }
        if !self.options.is_empty() {
            text.push_str(&format!("options {}\n", self.options.join(" ")));
        }
        text
    }
}

/// Whose process ids a container sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NamespaceMode {
    /// Those of all containers of the pod in this mode.
    Pod,
    /// Its own.
    #[default]
    Container,
    /// All of the guest's, which is what the pod has for a node.
    Node,
    /// Those of another container, see [`Security::pid_target`].
    Target,
}

/// What the ids in a user namespace are outside of it, which is in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    /// Users.
    pub uids: IdMapping,
    /// Groups.
    pub gids: IdMapping,
}

/// Ids from 0 inside, and the ones they are outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// What 0 is outside.
    pub host_id: u32,
    /// How many, at least 1.
    pub length: u32,
}

/// Which system calls are filtered.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seccomp {
    /// Those that containers have no use for.
    #[default]
    RuntimeDefault,
    /// None.
    Unconfined,
    /// As a profile in a file of the host says.
    Localhost(PathBuf),
}

/// Whom a container's process was found to run as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// All of its groups, ascending.
    pub groups: Vec<u32>,
}

/// What is mounted into a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Where, an absolute path.
    pub container_path: PathBuf,
    /// What.
    pub source: MountSource,
    /// What the container may do with it.
    pub access: MountAccess,
    /// Whether file systems that the host mounts below it later are seen in it.
    pub propagation: Propagation,
    /// Whose ids outside its files' are inside; none if they stay what they are to the guest.
    #[serde(default)]
    pub mapped: Option<UserNamespace>,
    /// Further options of the bind mount, of those in [`MOUNT_OPTIONS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// The options that a mount can have beside read-only and propagation, in the words of mount(8): those of the mount, not of
/// the file system, which others use, too.
pub const MOUNT_OPTIONS: &[&str] = &["noexec", "nodev", "nosuid", "noatime", "nodiratime", "relatime", "strictatime"];

/// Where what is mounted comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountSource {
    /// A directory or file of the host.
    Host(PathBuf),
    /// An image.
    Image {
        /// As the caller named it.
        reference: String,
        /// Its id.
        id: String,
        /// The directory of it that is meant; empty for all.
        sub_path: String,
    },
}

/// What a container may do with a mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountAccess {
    /// Read and write.
    #[default]
    Write,
    /// Read, and write to file systems that the host has mounted below it.
    Read,
    /// Read only.
    ReadAll,
}

/// How mounts of the host after a container's start are seen in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Propagation {
    /// Not at all.
    #[default]
    Private,
    /// As soon as they are made.
    HostToContainer,
}

/// The images that a container is made of.
#[derive(Debug, Clone)]
pub struct ContainerImages {
    /// Its root file system.
    pub root: Image,
    /// Those that it mounts, by id.
    pub mounted: BTreeMap<String, Image>,
}

impl From<Image> for ContainerImages {
    fn from(root: Image) -> Self {
        Self { root, mounted: BTreeMap::new() }
    }
}

/// A block device of the host in a container, or a device that the guest has itself by that name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDevice {
    /// Its file on the host.
    pub host_path: PathBuf,
    /// Its file in the container.
    pub container_path: PathBuf,
    /// Of `r`, `w` and `m`.
    pub permissions: String,
}

/// A container as asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerConfig {
    /// Name within the pod.
    pub name: String,
    /// Counts the containers made under this name, from 0.
    pub attempt: u32,
    /// Image as the caller named it.
    pub image: String,
    /// Image as the user wrote it in the pod, for display.
    pub user_specified_image: String,
    /// Replaces the image's entrypoint when not empty.
    pub command: Vec<String>,
    /// Replaces the image's command when not empty.
    pub args: Vec<String>,
    /// Replaces the image's working directory when not empty.
    pub working_dir: String,
    /// Added to the image's environment.
    pub env: Vec<(String, String)>,
    /// Labels, kept and shown.
    pub labels: BTreeMap<String, String>,
    /// Annotations, kept and shown.
    pub annotations: BTreeMap<String, String>,
    /// Log file, relative to the pod's log directory; empty for none.
    pub log_path: String,
    /// Whether standard input stays open for attaching clients.
    pub stdin: bool,
    /// Whether standard input is closed after the first client.
    pub stdin_once: bool,
    /// Whether the process has a terminal.
    pub tty: bool,
    /// Limits.
    pub resources: Resources,
    /// What the process may do.
    pub security: Security,
    /// Signal that asks the process to end, instead of the image's; 0 for none.
    pub stop_signal: u32,
    /// What is mounted into it.
    pub mounts: Vec<Mount>,
    /// Block devices of the host that it has.
    pub devices: Vec<BlockDevice>,
}

/// Limits of a container. Zero means not set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// CFS period in microseconds.
    pub cpu_period: i64,
    /// CFS quota in microseconds.
    pub cpu_quota: i64,
    /// Relative weight, as cgroup v1 shares.
    pub cpu_shares: i64,
    /// Memory in bytes.
    pub memory_limit: i64,
    /// Memory and swap together, in bytes.
    pub memory_swap_limit: i64,
    /// Adjustment of the out-of-memory score.
    pub oom_score_adj: i64,
    /// CPUs, as a list.
    pub cpuset_cpus: String,
    /// Memory nodes, as a list.
    pub cpuset_mems: String,
    /// Limits on huge pages: page size as in "2MB", bytes.
    pub hugepages: Vec<(String, u64)>,
    /// cgroup v2 files to write.
    pub unified: BTreeMap<String, String>,
}

/// Whom the process runs as.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct User {
    /// Numeric user.
    pub uid: Option<u32>,
    /// Numeric group; only with a user.
    pub gid: Option<u32>,
    /// User by name.
    pub name: String,
    /// Further groups.
    pub supplementary: Vec<u32>,
    /// Whether those are all, and the image's /etc/group adds none.
    pub strict_groups: bool,
}

/// Capabilities by name without `CAP_`, added to and dropped from the default set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// Added; `ALL` for all.
    pub add: Vec<String>,
    /// Dropped; `ALL` for all.
    pub drop: Vec<String>,
    /// Kept over an exec by an ordinary user.
    pub ambient: Vec<String>,
}

/// What the process may do.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Security {
    /// Everything the guest has, nothing the host has.
    pub privileged: bool,
    /// Capabilities.
    pub capabilities: Capabilities,
    /// Whom to run as.
    pub user: User,
    /// Root file system without an upper layer.
    pub readonly_rootfs: bool,
    /// Whether setuid programs and the like gain nothing.
    pub no_new_privileges: bool,
    /// Paths that read as empty; `None` for the default list.
    pub masked_paths: Option<Vec<String>>,
    /// Paths that are read-only; `None` for the default list.
    pub readonly_paths: Option<Vec<String>>,
    /// Which system calls are filtered.
    pub seccomp: Seccomp,
    /// Name of the AppArmor profile in the host's kernel that it runs under; none if `None`.
    pub apparmor: Option<String>,
    /// Whose process ids it sees.
    pub pid: NamespaceMode,
    /// The container meant by [`NamespaceMode::Target`]: its id or the beginning of it.
    pub pid_target: String,
    /// The user namespace that it is in, which must be the pod's.
    pub user_namespace: Option<UserNamespace>,
}

/// State of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// Being made; not shown to anybody.
    Creating,
    /// The guest runs and its agent answers.
    Ready,
    /// The guest has ended.
    NotReady,
}

/// A sandbox as it is.
#[derive(Debug, Clone)]
pub struct SandboxStatus {
    /// Its id: 64 hexadecimal digits.
    pub id: String,
    /// As asked for.
    pub config: SandboxConfig,
    /// Where it is in its life.
    pub state: SandboxState,
    /// Nanoseconds since the Unix epoch.
    pub created_at: i64,
    /// Its addresses, the one it is known by first; none without a network.
    pub ips: Vec<IpAddr>,
    /// Process id of its VMM on the host, while it runs.
    pub vmm_pid: Option<u32>,
    /// Why it ended by itself, in words; empty otherwise.
    pub message: String,
    /// How large its guest is.
    pub size: Option<GuestSize>,
    /// Since when its guest does not answer, in nanoseconds since the Unix epoch; none if it
    /// answered when it was last asked.
    pub silent_since: Option<i64>,
    /// Why it is not taken over from the daemon before, while it is not: it is then as its record says.
    pub not_adopted: Option<String>,
    /// What drives its guest and what runs in it.
    pub versions: Versions,
}

/// State of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerState {
    /// Being made; not shown to anybody.
    Creating,
    /// Made, its process not started.
    Created,
    /// Its process runs.
    Running,
    /// Its process ran when the guest last answered, which is long ago. Never on record.
    Unknown,
    /// Its process has ended, its output is complete.
    Exited,
}

/// How a container ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitInfo {
    /// Exit code, 0 to 255.
    pub code: i32,
    /// Why, in a word.
    pub reason: ExitReason,
    /// More words, may be empty.
    pub message: String,
    /// Nanoseconds since the Unix epoch.
    pub finished_at: i64,
}

/// Why a container ended, in the words that the CRI's clients know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum ExitReason {
    /// By itself, with 0.
    #[default]
    Completed,
    /// By itself, or by a signal.
    Error,
    /// For want of memory.
    OomKilled,
    /// Its command could not be executed.
    StartError,
    /// Its guest ended.
    SandboxDied,
    /// A word of another version.
    Other(String),
}

impl ExitReason {
    /// The word.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Completed => "Completed",
            Self::Error => "Error",
            Self::OomKilled => "OOMKilled",
            Self::StartError => "StartError",
            Self::SandboxDied => "SandboxDied",
            Self::Other(word) => word,
        }
    }
}

impl From<&str> for ExitReason {
    fn from(word: &str) -> Self {
        let known = [Self::Completed, Self::Error, Self::OomKilled, Self::StartError, Self::SandboxDied];
        known.into_iter().find(|reason| reason.as_str() == word).unwrap_or_else(|| Self::Other(word.into()))
    }
}

impl From<String> for ExitReason {
    fn from(word: String) -> Self {
        word.as_str().into()
    }
}

impl From<ExitReason> for String {
    fn from(reason: ExitReason) -> Self {
        reason.as_str().into()
    }
}

/// A container as it is.
#[derive(Debug, Clone)]
pub struct ContainerStatus {
    /// Its id: 64 hexadecimal digits.
    pub id: String,
    /// The sandbox it belongs to.
    pub sandbox_id: String,
    /// As asked for.
    pub config: ContainerConfig,
    /// Id of its image.
    pub image_id: String,
    /// Where it is in its life.
    pub state: ContainerState,
    /// Nanoseconds since the Unix epoch.
    pub created_at: i64,
    /// Nanoseconds since the Unix epoch; 0 before the start.
    pub started_at: i64,
    /// Set once it has ended.
    pub exit: Option<ExitInfo>,
    /// Absolute path of its log; empty for none.
    pub log_path: String,
    /// Whom its process runs as.
    pub user: Option<Identity>,
    /// Signal that asks it to end.
    pub stop_signal: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_on_record_is_the_word_that_it_was_before_it_had_a_type() {
        for word in ["Completed", "Error", "OOMKilled", "StartError", "SandboxDied", "Evicted", ""] {
            let record = format!("{{\"code\":1,\"reason\":\"{word}\",\"message\":\"\",\"finished_at\":5}}");
            let exit: ExitInfo = serde_json::from_str(&record).unwrap();
            assert_eq!(exit.reason.as_str(), word);
            assert_eq!(serde_json::to_string(&exit).unwrap(), record);
            let known = !["Evicted", ""].contains(&word);
            assert_eq!(!matches!(exit.reason, ExitReason::Other(_)), known, "{word}");
        }
    }

    #[test]
    fn a_host_name_comes_of_what_is_asked_for_or_of_the_pods_name() {
        let host_name = |name: &str, hostname: &str| {
            SandboxConfig { name: name.into(), hostname: hostname.into(), ..SandboxConfig::default() }.host_name()
        };
        assert_eq!(host_name("web-0", "web"), "web");
        assert_eq!(host_name("web-0", ""), "web-0");
        assert_eq!(host_name(&format!("{}-x", "a".repeat(62)), ""), "a".repeat(62));
        assert_eq!(host_name("a b\n127.0.0.1\tc", ""), "a-b-127.0.0.1-c");
    }
}
