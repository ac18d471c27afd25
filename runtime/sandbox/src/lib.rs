//! A pod's life: one guest per sandbox, its containers, and what is kept of them on disk.
//!
//! [`Manager`] is the way in. It knows the image store below it, the VMM's control
//! client and the agent's client; it knows nothing of the CRI.
//!
//! Invariants
//! * Every resource of a pod on the host (process, directories, cgroup) carries the
//!   sandbox id in its name, and its record is on disk before the first of them is made,
//!   so that a sweep after any crash finds what nobody owns.
//! * Calls that change one pod run one after the other on that pod's [`queue::Queue`],
//!   to their end even when the caller goes away; no two pods share a queue, and no lock
//!   is held across an await.
//! * The VMM process outlives the daemon. A daemon that starts adopts what runs.

mod agent;
mod cgroup;
mod clock;
mod config;
mod container;
mod error;
mod exec;
mod layout;
mod log;
mod manager;
mod model;
mod queue;
mod record;
mod sandbox;
mod scratch;
mod signal;
mod spec;
mod sweep;
mod vm;

pub use config::{GuestConfig, ManagerConfig};
pub use error::Error;
pub use exec::ExecOutput;
pub use manager::Manager;
pub use model::{
    Capabilities, ContainerConfig, ContainerState, ContainerStatus, Dns, ExitInfo, NamespaceMode, Resources,
    SandboxConfig, SandboxState, SandboxStatus, Security, User,
};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
