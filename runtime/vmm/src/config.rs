//! What a machine is made of: the one document the daemon writes for `nacelle vmm`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Name of the file of the VMM's messages.
pub const MESSAGES: &str = "messages";
/// Name of the file that says which process the VMM is.
pub const IDENTITY: &str = "vmm.pid";

/// A machine to run. Written as JSON; `nacelle vmm --config FILE` reads it.
///
/// All paths are absolute. The sockets and the console ring are created by the VMM and
/// must not exist before. A VMM that is jailed can write nothing in their directories
/// once it has created them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Name of the sandbox, used in messages only.
    pub id: String,
    /// Uncompressed x86-64 kernel (ELF `vmlinux`).
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initramfs: PathBuf,
    /// Appended to the VMM's own kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Guest memory in MiB, 32 to 1 048 576.
    pub memory_mib: u64,
    /// Virtual CPUs, 1 to 64.
    pub vcpus: u8,
    /// Unix socket through which the host reaches the guest's vsock ports
    /// (`CONNECT <port>\n`, answered by `OK <port>\n`). A connection that the guest makes
    /// to host port P goes to the unix socket `<vsock>_P`, which the host listens on.
    pub vsock: PathBuf,
    /// Control socket, see [`crate::control`].
    pub control: PathBuf,
    /// File that holds the end of the guest's serial console, see [`crate::console`].
    pub console: PathBuf,
    /// How the machine comes to run.
    #[serde(default)]
    pub start: Start,
}

/// How a machine comes to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// Its kernel boots.
    #[default]
    Boot,
    /// Its kernel boots, with the memory in a file, so that the machine can be saved to these
    /// files by [`crate::control::Request::Save`]. They must not exist before.
    Template(SavedFiles),
    /// It goes on where a machine of the same size stopped that was saved to these files.
    /// Nothing of what it does goes back to them. Neither kernel nor initramfs is read.
    Clone(SavedFiles),
}

/// A saved machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedFiles {
    /// The guest's memory. Takes as much space as the guest has used; nobody may write to it
    /// while a machine runs that started from it.
    pub memory: PathBuf,
    /// Everything else, as the version of the VMM that saved it understands it.
    pub state: PathBuf,
}

impl MachineConfig {
    /// File that holds the end of what the VMM itself had to say, in the console's form and beside it. The VMM creates it.
    #[must_use]
    pub fn messages(&self) -> PathBuf {
        self.console.with_file_name(MESSAGES)
    }

    /// File that says which process the VMM is, see [`crate::identity`], beside the console. The VMM creates it.
    #[must_use]
    pub fn identity(&self) -> PathBuf {
        self.console.with_file_name(IDENTITY)
    }

    /// The unix socket on which the host waits for the guest's connections to `port`.
    #[must_use]
    pub fn vsock_listener(vsock: &Path, port: u32) -> PathBuf {
        let mut name = vsock.as_os_str().to_owned();
        name.push(format!("_{port}"));
        name.into()
    }
}
