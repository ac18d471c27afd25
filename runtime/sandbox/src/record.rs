//! Records on disk: one small JSON file per sandbox and per container, replaced
//! atomically at every change of state.
//!
//! A record survives a crash of any process. After a power failure no pod runs, so a
//! record that was lost or damaged then costs nothing but its line in a listing; the
//! sweep removes what it stood for.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::log::Place;
use crate::model::{ContainerConfig, ContainerState, ExitInfo, Identity, SandboxConfig, SandboxState};
use crate::sizing::GuestSize;
use crate::{Error, Result};

/// Version of the records; a change that old daemons cannot read raises it.
const VERSION: u32 = 1;

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
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot (proc(5), stat field 22).
    pub start_time: u64,
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

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    record: T,
}

/// Writes a record in place of the old one.
pub fn write<T: Serialize>(path: &Path, record: &T) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(&Versioned { version: VERSION, record })
        .map_err(|e| Error::Record { path: path.into(), reason: e.to_string() })?;
    text.push(b'\n');
    let mut temporary: PathBuf = path.into();
    temporary.set_extension("json.new");
    let mut file = fs::File::create(&temporary).map_err(Error::io("create", &temporary))?;
    file.write_all(&text).map_err(Error::io("write", &temporary))?;
    fs::rename(&temporary, path).map_err(Error::io("replace", path))
}

/// Reads a record.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(Error::io("read", path))?;
    let damaged = |reason: String| Error::Record { path: path.into(), reason };
    let versioned: Versioned<serde_json::Value> = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
    if versioned.version != VERSION {
        return Err(damaged(format!("version {} is not {VERSION}: use the nacelle that wrote it", versioned.version)));
    }
    serde_json::from_value(versioned.record).map_err(|e| damaged(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> SandboxRecord {
        SandboxRecord {
            id: "ab".into(),
            config: SandboxConfig { name: "web".into(), ..SandboxConfig::default() },
            state: SandboxState::Ready,
            created_at: 5,
            vmm: Some(ProcessId { pid: 7, start_time: 9 }),
            message: String::new(),
            ips: vec![[10, 0, 0, 2].into()],
            size: Some(GuestSize { memory_mib: 256, vcpus: 1 }),
        }
    }

    #[test]
    fn a_record_comes_back_as_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sandbox.json");
        write(&path, &record()).unwrap();
        let back: SandboxRecord = read(&path).unwrap();
        assert_eq!(back.config, record().config);
        assert_eq!(back.vmm, record().vmm);
    }

    #[test]
    fn what_was_written_before_there_were_user_namespaces_is_read() {
        let mut old = serde_json::to_value(record()).unwrap();
        old["config"].as_object_mut().unwrap().remove("user_namespace").unwrap();
        let back: SandboxRecord = serde_json::from_value(old).unwrap();
        assert_eq!((back.config.user_namespace, back.config.name.as_str()), (None, "web"));
        let mut old = serde_json::to_value(ContainerConfig::default()).unwrap();
        old["security"].as_object_mut().unwrap().remove("user_namespace").unwrap();
        old["mounts"] = serde_json::json!([
            {"container_path": "/data", "source": {"host": "/srv"}, "access": "write", "propagation": "private"}
        ]);
        let back: ContainerConfig = serde_json::from_value(old).unwrap();
        assert_eq!((back.security.user_namespace, back.mounts[0].mapped), (None, None));
    }

    #[test]
    fn damage_and_other_versions_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sandbox.json");
        fs::write(&path, b"{\"version\":1,\"id\":").unwrap();
        let error = read::<SandboxRecord>(&path).unwrap_err().to_string();
        assert!(error.contains("sandbox.json"), "{error}");
        fs::write(&path, b"{\"version\":99,\"id\":\"x\"}").unwrap();
        let error = read::<SandboxRecord>(&path).unwrap_err().to_string();
        assert!(error.contains("version 99"), "{error}");
    }
}
