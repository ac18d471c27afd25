//! What can be told of a record that cannot be used: its pod is listed all the same, under its name.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{ContainerRecord, ProcessId, SandboxRecord, Versions, value};
use crate::model::{ContainerConfig, ContainerState, SandboxConfig, SandboxState};

/// As much of a sandbox's record as this version understands.
pub fn sketch_sandbox(path: &Path, id: &str) -> SandboxRecord {
    let value = value(path).unwrap_or_default();
    let config = value.get("config").cloned().unwrap_or_default();
    SandboxRecord {
        id: id.into(),
        config: SandboxConfig {
            name: field(&config, "name"),
            namespace: field(&config, "namespace"),
            uid: field(&config, "uid"),
            attempt: field(&config, "attempt"),
            log_directory: field(&config, "log_directory"),
            labels: field(&config, "labels"),
            annotations: field(&config, "annotations"),
            cgroup_parent: field(&config, "cgroup_parent"),
            handler: field(&config, "handler"),
            ..SandboxConfig::default()
        },
        state: known(&value, "state").unwrap_or(SandboxState::NotReady),
        created_at: field(&value, "created_at"),
        vmm: known::<ProcessId>(&value, "vmm"),
        message: String::new(),
        ips: field(&value, "ips"),
        size: known(&value, "size"),
        stopping: false,
        versions: Versions::default(),
    }
}

/// As much of a container's record as this version understands.
pub fn sketch_container(path: &Path, id: &str, sandbox_id: &str) -> ContainerRecord {
    let value = value(path).unwrap_or_default();
    let config = value.get("config").cloned().unwrap_or_default();
    ContainerRecord {
        id: id.into(),
        sandbox_id: sandbox_id.into(),
        config: ContainerConfig {
            name: field(&config, "name"),
            attempt: field(&config, "attempt"),
            image: field(&config, "image"),
            labels: field(&config, "labels"),
            annotations: field(&config, "annotations"),
            ..ContainerConfig::default()
        },
        image_id: field(&value, "image_id"),
        log_path: String::new(),
        stop_signal: crate::signal::TERM,
        // Whether it runs is not known.
        state: known(&value, "state")
            .filter(|state| *state != ContainerState::Creating)
            .unwrap_or(ContainerState::Unknown),
        created_at: field(&value, "created_at"),
        started_at: field(&value, "started_at"),
        exit: known(&value, "exit"),
        slot: None,
        disks: Vec::new(),
        log: None,
        user: None,
    }
}

fn field<T: Default + DeserializeOwned>(value: &Value, key: &str) -> T {
    known(value, key).unwrap_or_default()
}

fn known<T: DeserializeOwned>(value: &Value, key: &str) -> Option<T> {
    value.get(key).and_then(|value| T::deserialize(value).ok())
}
