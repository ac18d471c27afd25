//! How a guest without ACPI says that it powers off.
//!
//! The agent ends with a keyboard-controller reset (`reboot=k`), which a crashed kernel
//! does too. So that the VMM can tell the two apart, the agent first writes the byte
//! [`OFF`] to the I/O port [`PORT`]; a reset without that write before it is a crash.

/// I/O port the agent writes to, one byte. No PC device claims it.
pub const PORT: u16 = 0x0605;
/// Written when the guest has ended its containers and synced its disks: the next reset
/// is an orderly power-off. Other values are ignored.
pub const OFF: u8 = 0x4f;
