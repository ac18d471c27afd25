//! The guest's devices, for the /dev of a privileged container: all that its guest has,
//! and nothing of the host.

use std::fs::{self, DirEntry};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use libcontainer::oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType};

/// What every container has, or is of the guest's own sessions.
const LEFT_OUT: [&str; 9] = ["console", "full", "mqueue", "null", "ptmx", "pts", "shm", "tty", "zero"];
/// The same for device files that a name does not tell: the random number generators.
const RANDOM: [&str; 2] = ["random", "urandom"];

/// Every device file below `dev`, sub-directories included. One that goes away meanwhile
/// is left out.
pub fn list(dev: &Path) -> Vec<LinuxDevice> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dev).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if LEFT_OUT.iter().chain(&RANDOM).any(|left_out| name == *left_out) {
            continue;
        }
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => {
                found.extend(fs::read_dir(entry.path()).into_iter().flatten().flatten().filter_map(|e| device(&e)));
            }
            _ => found.extend(device(&entry)),
        }
    }
    found
}

fn device(entry: &DirEntry) -> Option<LinuxDevice> {
    let metadata = entry.metadata().ok()?;
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => LinuxDeviceType::C,
        kind if kind.is_block_device() => LinuxDeviceType::B,
        _ => return None,
    };
    let number = metadata.rdev();
    LinuxDeviceBuilder::default()
        .path(entry.path())
        .typ(kind)
        .major(i64::from(libc::major(number)))
        .minor(i64::from(libc::minor(number)))
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_device_files_are_devices_and_the_usual_ones_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        fs::create_dir(directory.path().join("net")).unwrap();
        assert!(list(directory.path()).is_empty());
        assert!(list(Path::new("/no/such/directory")).is_empty());
        let paths: Vec<_> = list(Path::new("/dev")).iter().map(|device| device.path().clone()).collect();
        assert!(!paths.iter().any(|path| path == Path::new("/dev/null") || path.starts_with("/dev/pts")), "{paths:?}");
    }
}
