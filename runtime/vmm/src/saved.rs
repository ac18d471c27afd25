//! A machine that was saved: what is in its state file.
//!
//! A line says what the file is and which version of the VMM wrote it; what follows, no other
//! version needs to understand. Machines are saved on the host they go on on, by the program
//! that starts them, so there is nothing to migrate.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};

use crate::bus::BusState;
use crate::cpu::CpuState;
use crate::pci::FunctionState;

/// The first line of a state file.
const HEADER: &str = concat!("nacelle machine 1 ", env!("CARGO_PKG_VERSION"), "\n");

/// Everything but the guest's memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    /// Its size in MiB.
    pub memory_mib: u64,
    /// The guest's clock (kvm-clock).
    pub clock: kvm_clock_data,
    /// The processors, by index.
    pub cpus: Vec<CpuState>,
    pub bus: BusState,
    /// The one device that is there before a pod's are.
    pub vsock: FunctionState,
}

/// A machine cannot be saved, or not go on from what was saved.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// A file cannot be used.
    #[error("cannot {what} {path}")]
    File {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is something else, or from another version.
    #[error("{path} does not start with {:?}: it was saved by another version, save the machine again", HEADER.trim_end())]
    Header {
        /// The file.
        path: PathBuf,
    },
    /// What follows makes no sense.
    #[error("{path} is damaged: save the machine again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        source: postcard::Error,
    },
    /// It does not fit the configuration.
    #[error("the saved machine has {saved}, the configuration says {configured}: both must be the same")]
    Size {
        /// What was saved.
        saved: String,
        /// What is asked for.
        configured: String,
    },
    /// Something in it that no guest can have brought about.
    #[error("the saved machine makes no sense: {0}")]
    Senseless(&'static str),
    /// It is in no state to be saved.
    #[error("this machine cannot be saved: {0}")]
    Unfit(&'static str),
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SavedError {
    move |source| SavedError::File { what, path: path.into(), source }
}

/// Makes a file that must not exist, for its owner only: what is in a guest's memory, and where, is what all guests that
/// start from it share.
fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

impl Saved {
    /// Writes it to `path`, which must not exist.
    pub fn write(&self, path: &Path) -> Result<(), SavedError> {
        let bytes = postcard::to_stdvec(self).map_err(|source| SavedError::Damaged { path: path.into(), source })?;
        let mut output = create(path).map_err(file("create", path))?;
        output.write_all(HEADER.as_bytes()).and_then(|()| output.write_all(&bytes)).map_err(file("write", path))
    }

    /// Reads what [`Saved::write`] wrote, of a machine with this much memory and this many
    /// processors.
    pub fn read(path: &Path, memory_mib: u64, vcpus: u8) -> Result<Self, SavedError> {
        let bytes = std::fs::read(path).map_err(file("read", path))?;
        let body = bytes.strip_prefix(HEADER.as_bytes()).ok_or_else(|| SavedError::Header { path: path.into() })?;
        let saved: Self =
            postcard::from_bytes(body).map_err(|source| SavedError::Damaged { path: path.into(), source })?;
        if (saved.memory_mib, saved.cpus.len()) != (memory_mib, usize::from(vcpus)) {
            let words = |mib: u64, cpus: usize| format!("{mib} MiB and {cpus} processors");
            return Err(SavedError::Size {
                saved: words(saved.memory_mib, saved.cpus.len()),
                configured: words(memory_mib, vcpus.into()),
            });
        }
        Ok(saved)
    }
}

/// Makes the file of a template's memory, of `mib` MiB.
pub fn create_memory(path: &Path, mib: u64) -> Result<File, SavedError> {
    let memory = create(path).map_err(file("create", path))?;
    memory.set_len(mib << 20).map_err(file("size", path))?;
    Ok(memory)
}

/// Opens the memory that a machine with `mib` MiB was saved with.
pub fn open_memory(path: &Path, mib: u64) -> Result<File, SavedError> {
    let memory = File::open(path).map_err(file("open", path))?;
    let size = memory.metadata().map_err(file("look at", path))?.len();
    if size != mib << 20 {
        let words = |size: u64| format!("{size} bytes of memory");
        return Err(SavedError::Size { saved: words(size), configured: words(mib << 20) });
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_saved_machine_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let read = || Saved::read(&path, 32, 1).unwrap_err().to_string();
        assert!(read().contains(path.to_str().unwrap()));
        std::fs::write(&path, "nacelle machine 1 0.0.0-other\n").unwrap();
        assert!(read().contains("another version"), "{}", read());
        std::fs::write(&path, [HEADER.as_bytes(), &[0xff; 100]].concat()).unwrap();
        assert!(read().contains("damaged"), "{}", read());
    }

    #[test]
    fn memory_of_another_size_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        create_memory(&path, 32).unwrap();
        assert!(matches!(create_memory(&path, 32), Err(SavedError::File { .. })), "it exists");
        open_memory(&path, 32).unwrap();
        assert!(matches!(open_memory(&path, 64), Err(SavedError::Size { .. })));
    }
}
