//! The pod's volumes: the host's directories and files, which one virtio-fs device shows.
//!
//! The device is mounted once, where no container sees it; each container gets the volumes
//! that its specification names.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::mount::MountFlags;

use crate::agent::Agent;
use crate::container::mount_at;
use crate::error::{Error, Result};

/// What the device is mounted by.
const TAG: &str = "nacelle";

/// Whether the device is mounted, and which it is.
#[derive(Debug, Default)]
pub struct Volumes {
    slot: Mutex<Option<u32>>,
}

impl Agent {
    /// Mounts the device of volumes, unless it is. Blocks.
    pub fn mount_volumes(&self, slot: u32) -> Result<()> {
        // Held all the while: the second of two containers waits for the first one's mount.
        let mut mounted = self.volumes.slot.lock().unwrap_or_else(PoisonError::into_inner);
        match *mounted {
            Some(known) if known == slot => return Ok(()),
            Some(known) => {
                return Err(Error::State(format!("the pod's volumes are those of the device in slot {known}")));
            }
            None => {}
        }
        self.bus.file_system(slot)?;
        let directory = self.paths.volumes();
        fs::create_dir_all(&directory).map_err(Error::path("make the directory", &directory))?;
        // A device file in a volume is one of the host's, by a number that means another here.
        mount_at(Path::new(TAG), &directory, "virtiofs", MountFlags::NODEV, "")?;
        *mounted = Some(slot);
        Ok(())
    }
}
