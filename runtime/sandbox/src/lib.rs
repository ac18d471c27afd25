//! A pod's life: one guest per sandbox, its containers, and what is kept of them on disk.
//!
//! [`Manager`] is the way in. It knows the image store below it, the VMM's control
//! client and the agent's client; it knows nothing of the CRI.
//!
//! Invariants
//! * Every resource of a pod on the host (process, directories, cgroup) carries the
//!   sandbox id in its name, and its record is on disk before the first of them is made,
//!   so that after any crash what nobody owns is found ([`recovery`]).
//! * Calls that change one pod run one after the other on that pod's [`queue::Queue`],
//!   to their end even when the caller goes away, unless the pod is to end; no two pods share
//!   a queue, and no lock is held across an await.
//! * The VMM process outlives the daemon. A daemon that starts adopts what runs, and has no
//!   right to end it.

mod agent;
mod beneath;
mod cgroup;
pub mod clock;
mod config;
mod container;
mod error;
mod events;
mod exec;
mod failpoint;
mod guest_clock;
mod handlers;
mod id;
mod layout;
mod live;
mod log;
mod manager;
mod model;
mod oom;
mod queue;
mod record;
mod recovery;
mod replies;
mod sandbox;
mod scratch;
mod session;
mod signal;
mod sizing;
mod spec;
mod stats;
mod stdin;
mod templates;
mod user_namespace;
mod versions;
mod vm;
mod volumes;

pub use cgroup::CgroupDriver;
pub use config::{GuestConfig, ImageVolumes, ManagerConfig};
pub use error::{AgentFailure, Error, ErrorKind};
pub use events::{Event, EventKind, EventStream, Missed};
pub use exec::{EXEC_OUTPUT_LIMIT, ExecOutput};
#[cfg(feature = "failpoints")]
pub use failpoint::setup as set_failpoints;
pub use handlers::{GuestHandler, GuestSetting};
pub use live::{LiveOutput, Overrun};
pub use manager::Manager;
pub use model::{
    BlockDevice, Capabilities, ContainerConfig, ContainerImages, ContainerState, ContainerStatus, Dns, ExitInfo,
    ExitReason, IdMapping, Identity, MOUNT_OPTIONS, Mount, MountAccess, MountSource, NamespaceMode, Propagation,
    Resources, SandboxConfig, SandboxState, SandboxStatus, Seccomp, Security, User, UserNamespace,
};
pub use nacelle_network::{Error as NetworkError, Mode as NetworkMode, Network, NetworkConfig, PortMapping, Protocol};
/// The figures of a control group, as the agent reports them.
pub use nacelle_proto::agent::v1::{
    ContainerUsage, CpuUsage, DeviceUsage, FilesystemUsage, GroupUsage, HugePageUsage, InterfaceUsage, IoUsage,
    LayerUsage, MemoryUsage, PidsUsage, Pressure, ProcessUsage, Stall, TrafficUsage,
};
pub use record::Versions;
pub use session::{AttachedTerminal, Attachment, ExecConfig, ExecInput, ExecOutputStream, ExecProcess, ExecSession};
pub use sizing::GuestSize;
pub use stats::{ContainerStats, DiskUsage, SandboxStats};
pub use stdin::StdinWriter;
pub use versions::versions_on_record;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
