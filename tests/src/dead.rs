//! A file system that never answers.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Mounted until it is dropped, upon which whoever waits for it gets an error.
#[derive(Debug)]
pub struct Dead {
    place: PathBuf,
    device: Option<OwnedFd>,
}

impl Dead {
    /// Mounts one at a directory that it makes.
    ///
    /// # Errors
    /// The directory is there, or the host has no FUSE.
    pub fn mount(place: PathBuf) -> Result<Self> {
        fs::create_dir(&place)?;
        // Where it is not built in; without it, the next line says so.
        let _ = std::process::Command::new("modprobe").arg("fuse").status();
        let device = open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).context("open /dev/fuse")?;
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let data = std::ffi::CString::new(data)?;
        mount("dead", &place, "fuse", MountFlags::empty(), data.as_c_str()).context("mount FUSE")?;
        Ok(Self { place, device: Some(device) })
    }

    /// Where it is.
    #[must_use]
    pub fn place(&self) -> &Path {
        &self.place
    }
}

impl Drop for Dead {
    fn drop(&mut self) {
        // Whoever waits for it is told that it is gone.
        self.device = None;
        let _ = unmount(&self.place, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.place);
    }
}
