//! What outlives a save and restore.

use serde::{Deserialize, Serialize};

/// The device's own state. Packets are not part of it: networks lose some.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// The interface's address.
    pub mac: [u8; 6],
    /// The longest packet, in bytes, without the Ethernet header.
    pub mtu: u16,
    /// The features that were offered; the guest chose among them.
    pub features: u64,
}
