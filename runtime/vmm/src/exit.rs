//! How a machine ends, and how the host learns of it.
//!
//! There is no ACPI, so the guest has two ways to end its machine:
//!
//! * An orderly power-off: the agent, having synced and unmounted, writes the byte
//!   [`POWER_OFF`] to I/O port [`POWER_PORT`] (`ioperm(POWER_PORT, 1, 1)`, then `outb`).
//!   The machine ends there and then; the write does not return.
//! * A reset, by the keyboard controller's command 0xfe on port 0x64, which is what
//!   `reboot=k` makes of `reboot(RB_AUTOBOOT)` and `panic=-1` of a kernel panic (the
//!   death of the agent included). It counts as a failure: the last lines of the
//!   console say why.

use std::fmt;

/// I/O port through which the guest's agent ends the machine.
pub const POWER_PORT: u16 = 0x510;
/// What the agent writes to [`POWER_PORT`] for an orderly power-off. Other values are
/// ignored.
pub const POWER_OFF: u8 = 0x01;

/// Why a machine that ran has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The guest powered itself off. Process exit code 0.
    PoweredOff,
    /// A client of the control socket, or a signal, ended the machine. Exit code 0.
    Stopped,
    /// The machine was saved, as a client of the control socket asked. Exit code 0.
    Saved,
    /// The guest's kernel asked for a reset: it panicked or rebooted. Exit code 3.
    Reset,
    /// The guest's processor shut down after a triple fault. Exit code 4.
    TripleFault,
    /// KVM could not run the guest any further. Exit code 5.
    Failed(String),
}

/// Exit code of a VMM that could not start its machine; its messages say why, see [`crate::config::MachineConfig::messages`], or
/// standard error, if it came to nothing before those are.
pub const EXIT_NOT_STARTED: i32 = 1;

impl Exit {
    /// The process's exit code for this end.
    #[must_use]
    pub fn code(&self) -> i32 {
        match self {
            Self::PoweredOff | Self::Stopped | Self::Saved => 0,
            Self::Reset => 3,
            Self::TripleFault => 4,
            Self::Failed(_) => 5,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("guest powered off"),
            Self::Stopped => f.write_str("machine stopped on request"),
            Self::Saved => f.write_str("machine saved on request"),
            Self::Reset => f.write_str("guest kernel reset the machine: it panicked or rebooted, its console says why"),
            Self::TripleFault => f.write_str("guest processor triple-faulted"),
            Self::Failed(reason) => write!(f, "KVM cannot run the guest any further: {reason}"),
        }
    }
}
