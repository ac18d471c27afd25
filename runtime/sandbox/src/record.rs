//! Records on disk: one small JSON file per sandbox and per container, replaced
//! atomically at every change of state.
//!
//! A record survives a crash of any process. After a power failure no pod runs, so a
//! record that was lost or damaged then costs nothing but its line in a listing.
//!
//! What is read is checked as strictly as what is made ([`check`]): an id that is none, or a path that leads
//! elsewhere, makes the record one that this program did not write. Why a record cannot be used decides what may be
//! done with its pod: see [`Unusable`].

mod check;
mod sketch;
mod stored;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::beneath::Directory;
use crate::log::Place;
use crate::model::{ContainerConfig, ContainerState, ExitInfo, Identity, SandboxConfig, SandboxState};
use crate::sizing::GuestSize;
use crate::{Error, Result};

pub use check::Check;
pub use sketch::{sketch_container, sketch_sandbox};
pub use stored::Stored;

/// Version of the records; a change that old daemons cannot read raises it.
const VERSION: u64 = 1;
/// The longest record that is read, in bytes. A request that becomes one has 16 MiB at most.
const LIMIT: u64 = 32 << 20;

/// A sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// Its id.
    pub id: String,
    /// As asked for.
    pub config: SandboxConfig,
    /// Where it is in its life.
    pub state: SandboxState,
    /// Nanoseconds since the Unix epoch.
    pub created_at: i64,
    /// Its VMM, once started.
    pub vmm: Option<ProcessId>,
    /// Why it ended by itself.
    pub message: String,
    /// Its addresses, the one it is known by first.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
    /// How large its guest is, once that is decided.
    #[serde(default)]
    pub size: Option<GuestSize>,
    /// Whether it was asked to end: then its end is none of its own.
    #[serde(default)]
    pub stopping: bool,
    /// What drives its guest, and what runs in it.
    #[serde(default)]
    pub versions: Versions,
}

/// Who a pod consists of: each may be of another release than the daemon.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Versions {
    /// Of its VMM; empty if that was not asked yet.
    pub vmm: String,
    /// What the VMM knows beyond the first release.
    pub vmm_features: Vec<String>,
    /// Of its agent.
    pub agent: String,
    /// What the agent knows beyond the first release.
    pub agent_features: Vec<String>,
    /// The guest's kernel, as `uname -r` tells it.
    pub kernel: String,
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot (proc(5), stat field 22).
    pub start_time: u64,
    /// The boot of the host that it started in; empty on records of daemons that did not write it.
    #[serde(default)]
    pub boot_id: String,
}

/// A container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Its id.
    pub id: String,
    /// Its sandbox.
    pub sandbox_id: String,
    /// As asked for.
    pub config: ContainerConfig,
    /// Id of its image.
    pub image_id: String,
    /// Absolute path of its log; empty for none.
    pub log_path: String,
    /// Signal that asks it to end.
    pub stop_signal: u32,
    /// Where it is in its life.
    pub state: ContainerState,
    /// Nanoseconds since the Unix epoch.
    pub created_at: i64,
    /// Nanoseconds since the Unix epoch; 0 before the start.
    pub started_at: i64,
    /// How it ended.
    pub exit: Option<ExitInfo>,
    /// Its root disk's place on the guest's bus.
    pub slot: Option<u8>,
    /// Places of its further disks: images and block devices.
    #[serde(default)]
    pub disks: Vec<u8>,
    /// Which file its log is in, once there is one.
    #[serde(default)]
    pub log: Option<Place>,
    /// Whom its process runs as, once the guest has looked it up.
    #[serde(default)]
    pub user: Option<Identity>,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// There is none.
    #[error("there is no record")]
    Absent,
    /// It cannot be read now, which may be another matter later.
    #[error("the record cannot be read now: {0}")]
    Unreadable(io::Error),
    /// It was never written to its end: nobody knows what it stood for.
    #[error("the record is damaged ({0})")]
    Torn(String),
    /// Another version of this program wrote it, and knows what it means: it is left alone until that is back.
    #[error("the record is not one that this version understands ({0}): run the nacelle that wrote it")]
    Foreign(String),
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u64,
    #[serde(flatten)]
    record: T,
}

/// Writes a record in place of the old one. Blocks.
pub fn write<T: Serialize>(path: &Path, record: &T) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(&Versioned { version: VERSION, record })
        .map_err(|e| Error::Record { path: path.into(), reason: e.to_string() })?;
    text.push(b'\n');
    let (directory, name) = place(path)?;
    directory.replace(name, &text, 0o600)
}

/// Removes a record. Nothing happens if there is none. Blocks.
pub fn remove(path: &Path) -> Result<()> {
    let (directory, name) = place(path)?;
    directory.remove_file(name).map(drop)
}

/// The directory that a record is in, and its name there.
fn place(path: &Path) -> Result<(Directory, &OsStr)> {
    let named = path.parent().zip(path.file_name());
    let (parent, name) = named.ok_or_else(|| Error::Internal(format!("{} names no record", path.display())))?;
    Ok((Directory::open(parent)?, name))
}

/// Reads the record of what has this id. Blocks.
pub fn read<T: DeserializeOwned + Check>(path: &Path, id: &str) -> Result<T, Unusable> {
    let value = value(path)?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(VERSION) => {}
        Some(other) => return Err(Unusable::Foreign(format!("its version is {other}, not {VERSION}"))),
        None => return Err(Unusable::Torn("it has no version".into())),
    }
    let Versioned { record, .. } =
        serde_json::from_value::<Versioned<T>>(value).map_err(|error| Unusable::Foreign(error.to_string()))?;
    record.check(id).map_err(Unusable::Foreign)?;
    Ok(record)
}

/// What a record says, whoever wrote it.
fn value(path: &Path) -> Result<serde_json::Value, Unusable> {
    let open =
        File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let file = match open {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Unusable::Absent),
        open => open.map_err(Unusable::Unreadable)?,
    };
    if !file.metadata().map_err(Unusable::Unreadable)?.is_file() {
        return Err(Unusable::Foreign("it is no file".into()));
    }
    let mut text = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut text).map_err(Unusable::Unreadable)?;
    if text.len() as u64 > LIMIT {
        return Err(Unusable::Foreign(format!("it is longer than {LIMIT} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| Unusable::Torn(error.to_string()))
}

#[cfg(test)]
mod tests;
