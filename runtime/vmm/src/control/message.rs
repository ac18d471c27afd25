//! The messages of the control socket.

use serde::{Deserialize, Serialize};

pub use crate::devices::virtio::fs::Access;

/// Longest message in bytes.
pub const MESSAGE_LIMIT: usize = 64 * 1024;
/// Most file descriptors beside one message.
pub const FD_LIMIT: usize = 250;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields, tag = "op")]
pub enum Request {
    /// Is the machine running, and which version of the VMM drives it?
    Status,
    /// Puts a disk on the bus. The message carries its files, in order: the disk is
    /// their concatenation, each padded to a multiple of 4096 bytes with zeros. A
    /// writable disk has exactly one file, of a size that is a multiple of 512.
    AddDisk {
        /// Whether the guest is refused writes.
        read_only: bool,
    },
    /// Puts a network interface on the bus. The message carries its tap: a descriptor of
    /// `/dev/net/tun` attached to an interface with `IFF_TAP`, `IFF_NO_PI` and
    /// `IFF_VNET_HDR`.
    AddNet {
        /// Its Ethernet address.
        mac: [u8; 6],
        /// The longest packet in bytes, without the Ethernet header: 68 to 65535.
        mtu: u16,
    },
    /// Puts the device that shows volumes on the bus, unless it is there.
    AddFs,
    /// Gives the guest a volume. The message carries its directory or file, which may be a
    /// descriptor opened with `O_PATH`.
    AddVolume {
        /// Its name below the device's root: 1 to 255 of `[A-Za-z0-9_.-]`.
        name: String,
        /// What the guest may do with it.
        access: Access,
    },
    /// Takes a volume away. One that is not there is fine.
    RemoveVolume {
        /// Its name.
        name: String,
    },
    /// Takes a device off the bus. The guest has let go of it before.
    RemoveDevice {
        /// Its device number, from [`Response::Device`].
        slot: u8,
    },
    /// Saves the machine, which must be a template without devices of a pod, and ends it. The
    /// guest need not help; whoever is connected to it is cut off.
    Save,
    /// Ends the machine at once, without the guest's help. Answered before the process
    /// ends.
    Stop,
}

/// What the VMM answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields, tag = "result")]
pub enum Response {
    /// Done, nothing to say.
    Done,
    /// Answer to [`Request::Status`].
    Status {
        /// Version of the `nacelle` that drives the machine.
        version: String,
        /// Name of the sandbox.
        id: String,
    },
    /// Answer to [`Request::AddDisk`], [`Request::AddNet`] and [`Request::AddFs`].
    Device {
        /// Device number on PCI bus 0, 1 to 31.
        slot: u8,
    },
    /// The request was refused; nothing changed.
    Error {
        /// Why.
        message: String,
    },
}
