//! What keeps a VMM in its place: a guest that breaks out of its virtual machine finds itself
//! in a process that can reach next to nothing.
//!
//! * Its standard descriptors lead nowhere: not even a log of the host is there to be made to grow.
//! * [`root`]: namespaces of its own, and a root directory in which there is what this one
//!   guest needs and nothing else, to be read. No network: what goes to one leaves by descriptors of taps.
//! * [`user`]: a user namespace, outside of which its root is nobody's.
//! * [`capabilities`]: those that serving files takes, and no others, for good.
//! * [`filter`]: once the machine is built, the system calls of a VMM that serves one.
//!
//! What the VMM is given later (disks, taps, volumes) comes as open descriptors by its control
//! socket. Volumes are the one way out that stays: what is below a volume's directory is the
//! guest's anyway.

mod capabilities;
pub(crate) mod filter;
mod root;
mod user;

use std::fs::File;
use std::io;

use self::user::Namespace;
use crate::config::MachineConfig;

/// The process cannot be jailed.
#[derive(Debug, thiserror::Error)]
#[error("cannot jail the VMM: cannot {what}")]
pub struct JailError {
    what: String,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> JailError {
    move |source| JailError { what: what.into(), source: source.into() }
}

/// Puts this process into its jail. The paths of `config` lead in it where they led before.
///
/// To be called while the process has one thread only, and before it does anything else for
/// the guest.
///
/// # Errors
/// If the process lacks the privileges, the kernel the calls, or the host what `config` names. It is in no state to go on
/// then.
pub fn enter(config: &MachineConfig) -> Result<(), JailError> {
    leave_standard_files().map_err(failed("open /dev/null in place of its standard files"))?;
    let users = Namespace::new()?;
    root::enter(config)?;
    users.enter()?;
    capabilities::drop_all_but_needed()
}

/// Has the standard descriptors lead nowhere.
fn leave_standard_files() -> io::Result<()> {
    let nowhere = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nowhere)?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    rustix::stdio::dup2_stderr(&nowhere)?;
    Ok(())
}
