//! How a guest without ACPI powers off.
//!
//! The agent, having ended its containers and synced its disks, writes the byte [`OFF`]
//! to the I/O port [`PORT`]; the VMM ends the machine there and then. A reset by the
//! keyboard controller (`reboot=k`), which is how a kernel without ACPI reboots, panicked
//! or not, counts as a crash.

/// I/O port the agent writes to, one byte. No PC device claims it.
pub const PORT: u16 = 0x510;
/// Powers the guest off. Other values are ignored.
pub const OFF: u8 = 0x01;
