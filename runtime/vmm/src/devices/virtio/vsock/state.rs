//! What outlives a save and restore.

use serde::{Deserialize, Serialize};

/// The device's own state. Connections are not part of it: their other end is a process on
/// the host the machine was saved on. The restored guest is told to forget them (transport
/// reset, virtio 1.2, section 5.10.6.7).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The host port that the next connection from the host gets, if it is free. A guest may
    /// hold on to a connection of before, so ports are not used again soon.
    pub next_port: u32,
}
