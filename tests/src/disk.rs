//! A disk of the host for containers: a file behind a loop device.

use std::process::Command;

use nacelle_proto::runtime::v1 as cri;
use tempfile::TempDir;

/// A disk of zeros.
#[derive(Debug)]
pub struct Disk {
    directory: TempDir,
    device: String,
}

impl Disk {
    /// Makes one of `bytes` bytes.
    ///
    /// # Panics
    /// If the host gives no loop device.
    #[must_use]
    pub fn attach(bytes: u64) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("disk");
        std::fs::File::create(&file).and_then(|file| file.set_len(bytes)).expect("the disk's file");
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().expect("losetup");
        assert!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        let device = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Self { directory, device }
    }

    /// The disk as a container's `/dev/xvda`, with the CRI's permissions: some of `rwm`.
    #[must_use]
    pub fn device(&self, permissions: &str) -> cri::Device {
        cri::Device {
            host_path: self.device.clone(),
            container_path: "/dev/xvda".into(),
            permissions: permissions.into(),
        }
    }

    /// What is on it.
    ///
    /// # Panics
    /// If the file cannot be read.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        std::fs::read(self.directory.path().join("disk")).expect("the disk's file")
    }

    /// Takes it from the host.
    ///
    /// # Panics
    /// If it is in use.
    pub fn detach(self) {
        let detached = Command::new("losetup").args(["--detach", &self.device]).status().expect("losetup");
        assert!(detached.success(), "{} cannot be detached", self.device);
    }
}
