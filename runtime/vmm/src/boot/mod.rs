//! Everything that must lie in guest memory before the first instruction: kernel,
//! initramfs, boot parameters, MP table. The processor's own start state is in
//! [`crate::cpu`].

mod kernel;
mod mptable;
mod params;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use vm_memory::GuestMemoryMmap;

pub use kernel::KernelError;
pub use params::ParamsError;

use crate::config::MachineConfig;
use crate::{layout, memory};

/// The guest cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file is unusable.
    #[error("cannot load the guest kernel {path}: build it with guest-image, or correct the configured path")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Why.
        source: KernelError,
    },
    /// The initramfs is unusable.
    #[error("cannot load the initramfs {path}: build it with guest-image, or correct the configured path")]
    Initramfs {
        /// The file.
        path: PathBuf,
        /// Why.
        source: InitramfsError,
    },
    /// The parameters cannot be written.
    #[error("cannot pass the boot parameters to the guest")]
    Params(#[source] ParamsError),
    /// The processors cannot be described.
    #[error("cannot describe the processors to the guest")]
    MpTable(#[source] vm_memory::GuestMemoryError),
}

/// What is wrong with an initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// It cannot be read.
    #[error("cannot open or read it")]
    Read(#[from] io::Error),
    /// It holds nothing.
    #[error("the file is empty")]
    Empty,
    /// It is not an archive that the kernel unpacks.
    #[error("the file is neither a cpio archive (newc) nor a compressed one")]
    Format,
    /// There is no room.
    #[error("{size} bytes do not fit into guest memory beside the kernel: give the guest more memory")]
    TooLarge {
        /// Size of the file.
        size: u64,
    },
    /// Copying failed.
    #[error("cannot copy it into guest memory")]
    Copy(#[source] io::Error),
}

/// Beginnings of the archives that Linux unpacks: newc cpio and its compressions.
const ARCHIVES: [&[u8]; 8] = [
    b"070701",
    b"070702",
    &[0x1f, 0x8b],
    b"BZh",
    &[0xfd, b'7', b'z', b'X', b'Z', 0],
    &[0x28, 0xb5, 0x2f, 0xfd],
    &[0x02, 0x21, 0x4c, 0x18],
    &[0x5d, 0, 0],
];

const PAGE: u64 = 4096;

/// Prepares a guest's memory and returns the kernel's 64-bit entry point.
pub fn prepare(memory: &GuestMemoryMmap, config: &MachineConfig) -> Result<u64, BootError> {
    let kernel = kernel::load(memory, &config.kernel)
        .map_err(|source| BootError::Kernel { path: config.kernel.clone(), source })?;
    let initramfs = load_initramfs(memory, &config.initramfs, kernel.end)
        .map_err(|source| BootError::Initramfs { path: config.initramfs.clone(), source })?;
    params::write(memory, &config.cmdline, initramfs).map_err(BootError::Params)?;
    mptable::write(memory, config.vcpus).map_err(BootError::MpTable)?;
    Ok(kernel.entry)
}

/// Reads the initramfs to the pages behind the kernel, which share their huge page with its end; returns its address and
/// size.
fn load_initramfs(memory: &GuestMemoryMmap, path: &Path, kernel_end: u64) -> Result<(u64, u64), InitramfsError> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    if size == 0 {
        return Err(InitramfsError::Empty);
    }
    let address = kernel_end.max(layout::HIGH_MEMORY).next_multiple_of(PAGE);
    if address.checked_add(size).is_none_or(|end| end > memory::low_end(memory)) {
        return Err(InitramfsError::TooLarge { size });
    }
    let mut start = Vec::new();
    (&file).take(6).read_to_end(&mut start)?;
    if !ARCHIVES.iter().any(|magic| start.starts_with(magic)) {
        return Err(InitramfsError::Format);
    }
    memory::load(memory, address, &file, 0, size).map_err(InitramfsError::Copy)?;
    Ok((address, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn loaded(content: &[u8], kernel_end: u64) -> Result<(u64, u64), InitramfsError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let memory = memory::map(32).unwrap();
        let (address, size) = load_initramfs(&memory, file.path(), kernel_end)?;
        let mut read = vec![0; content.len()];
        memory.read_slice(&mut read, GuestAddress(address)).unwrap();
        assert_eq!(read, content);
        Ok((address, size))
    }

    #[test]
    fn initramfs_lies_page_aligned_behind_the_kernel() {
        let archive = [b"070701".as_slice(), &[7; 5000]].concat();
        assert_eq!(loaded(&archive, (2 << 20) + 1).unwrap(), ((2 << 20) + PAGE, 5006));
        assert_eq!(loaded(&archive, (32 << 20) - 2 * PAGE).unwrap(), ((32 << 20) - 2 * PAGE, 5006));
        assert!(matches!(loaded(&archive, (32 << 20) - 2 * PAGE + 1), Err(InitramfsError::TooLarge { size: 5006 })));
    }

    #[test]
    fn unusable_initramfs_is_refused() {
        assert!(matches!(loaded(b"", 0), Err(InitramfsError::Empty)));
        assert!(matches!(loaded(b"<html>", 0), Err(InitramfsError::Format)));
        assert!(matches!(loaded(b"07", 0), Err(InitramfsError::Format)));
        assert!(matches!(
            loaded(&[b"070701".as_slice(), &[0; 9000]].concat(), (32 << 20) - 4096),
            Err(InitramfsError::TooLarge { size: 9006 })
        ));
    }
}
