//! What a record must be to have been written by this program.

use std::path::{Component, Path};

use super::{ContainerRecord, SandboxRecord};
use crate::cgroup::Cgroup;
use crate::id::is_id;
use crate::model::MountSource;

/// Places on a guest's bus.
const SLOTS: std::ops::RangeInclusive<u8> = 1..=31;
/// As many groups as Linux gives a process.
const GROUPS: usize = 65_536;
/// Letters of a boot's id.
const BOOT_ID: usize = 64;

/// A record that can be told from one that somebody else made.
pub trait Check {
    /// Says what is wrong in it, if it is to be the record of what has this id.
    fn check(&self, id: &str) -> Result<(), String>;
}

impl Check for SandboxRecord {
    fn check(&self, id: &str) -> Result<(), String> {
        name(&self.id, id)?;
        place("config.log_directory", &self.config.log_directory)?;
        Cgroup::named(&self.config.cgroup_parent, id).map_err(|error| format!("config.{error}"))?;
        if let Some(process) = &self.vmm
            && (process.pid < 2 || process.boot_id.len() > BOOT_ID)
        {
            return Err(format!("vmm: {} is no VMM's process", process.pid));
        }
        Ok(())
    }
}

impl Check for ContainerRecord {
    fn check(&self, id: &str) -> Result<(), String> {
        name(&self.id, id)?;
        if !is_id(&self.sandbox_id) {
            return Err(format!("sandbox_id: {:?} is no id", self.sandbox_id));
        }
        place("log_path", &self.log_path)?;
        if let Some(slot) = self.slot.iter().chain(&self.disks).find(|slot| !SLOTS.contains(slot)) {
            return Err(format!("{slot} is no place on a guest's bus"));
        }
        for (index, mount) in self.config.mounts.iter().enumerate() {
            if let MountSource::Host(path) = &mount.source
                && !path.is_absolute()
            {
                return Err(format!("config.mounts[{index}].source: {path:?} is no absolute path"));
            }
        }
        if let Some(exit) = &self.exit
            && !(0..=255).contains(&exit.code)
        {
            return Err(format!("exit.code: {} is none", exit.code));
        }
        if self.user.as_ref().is_some_and(|user| user.groups.len() > GROUPS) {
            return Err("user.groups: are more than a process can have".into());
        }
        Ok(())
    }
}

fn name(own: &str, id: &str) -> Result<(), String> {
    if own != id || !is_id(id) {
        return Err(format!("id: {own:?} is not what its file is called"));
    }
    Ok(())
}

/// A path of the host that may be empty.
fn place(field: &str, path: &str) -> Result<(), String> {
    let way = Path::new(path);
    let leads_elsewhere = way.components().any(|part| part == Component::ParentDir) || path.contains('\0');
    if !path.is_empty() && (!way.is_absolute() || leads_elsewhere) {
        return Err(format!("{field}: {path:?} is no absolute path without .."));
    }
    Ok(())
}
