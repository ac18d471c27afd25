//! The messages of the control socket.

use serde::{Deserialize, Serialize};

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
    /// Takes a device off the bus. The guest has let go of it before.
    RemoveDevice {
        /// Its device number, from [`Response::Device`].
        slot: u8,
    },
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
    /// Answer to [`Request::AddDisk`].
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
