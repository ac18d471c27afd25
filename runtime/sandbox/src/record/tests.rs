use std::fs;

use super::*;
use crate::model::{Mount, MountAccess, MountSource, Propagation};

fn id() -> String {
    "ab".repeat(32)
}

fn record() -> SandboxRecord {
    SandboxRecord {
        id: id(),
        config: SandboxConfig { name: "web".into(), ..SandboxConfig::default() },
        state: SandboxState::Ready,
        created_at: 5,
        vmm: Some(ProcessId { pid: 7, start_time: 9, boot_id: "b".into() }),
        message: String::new(),
        ips: vec![[10, 0, 0, 2].into()],
        size: Some(GuestSize { memory_mib: 256, vcpus: 1 }),
        stopping: false,
        versions: Versions::default(),
    }
}

fn container() -> ContainerRecord {
    ContainerRecord {
        id: id(),
        sandbox_id: id(),
        config: ContainerConfig { name: "c".into(), ..ContainerConfig::default() },
        image_id: "sha256:0".into(),
        log_path: "/var/log/pods/p/c/0.log".into(),
        stop_signal: 15,
        state: ContainerState::Running,
        created_at: 1,
        started_at: 2,
        exit: None,
        slot: Some(4),
        disks: vec![5],
        log: None,
        user: None,
    }
}

#[test]
fn a_record_comes_back_as_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sandbox.json");
    write(&path, &record()).unwrap();
    let back: SandboxRecord = read(&path, &id()).unwrap();
    assert_eq!(back.config, record().config);
    assert_eq!(back.vmm, record().vmm);
    let path = directory.path().join("container.json");
    write(&path, &container()).unwrap();
    assert_eq!(read::<ContainerRecord>(&path, &id()).unwrap().slot, Some(4));
}

#[test]
fn what_earlier_daemons_wrote_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sandbox.json");
    let mut old = serde_json::to_value(record()).unwrap();
    let fields = old.as_object_mut().unwrap();
    fields.insert("version".into(), 1.into());
    fields.remove("stopping").unwrap();
    fields.remove("versions").unwrap();
    fields["vmm"].as_object_mut().unwrap().remove("boot_id").unwrap();
    fields["config"].as_object_mut().unwrap().remove("user_namespace").unwrap();
    fs::write(&path, old.to_string()).unwrap();
    let back: SandboxRecord = read(&path, &id()).unwrap();
    assert_eq!((back.config.user_namespace, back.config.name.as_str()), (None, "web"));
    assert_eq!((back.vmm.unwrap().boot_id.as_str(), back.stopping), ("", false));
    let mut old = serde_json::to_value(ContainerConfig::default()).unwrap();
    old["security"].as_object_mut().unwrap().remove("user_namespace").unwrap();
    old["mounts"] = serde_json::json!([
        {"container_path": "/data", "source": {"host": "/srv"}, "access": "write", "propagation": "private"}
    ]);
    let back: ContainerConfig = serde_json::from_value(old).unwrap();
    assert_eq!((back.security.user_namespace, back.mounts[0].mapped), (None, None));
}

#[test]
fn why_a_record_cannot_be_used_is_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sandbox.json");
    let unusable = || read::<SandboxRecord>(&path, &id()).unwrap_err();
    assert!(matches!(unusable(), Unusable::Absent));
    for torn in ["", "{", "{\"version\":1,\"id\":", "\0\0\0\0", "[]"] {
        fs::write(&path, torn).unwrap();
        assert!(matches!(unusable(), Unusable::Torn(_)), "{torn:?}");
    }
    fs::write(&path, b"{\"version\":99,\"id\":\"x\"}").unwrap();
    assert!(matches!(unusable(), Unusable::Foreign(reason) if reason.contains("99")));
    let mut unknown = serde_json::to_value(record()).unwrap();
    unknown["version"] = 1.into();
    unknown["state"] = "hibernating".into();
    fs::write(&path, unknown.to_string()).unwrap();
    assert!(matches!(unusable(), Unusable::Foreign(reason) if reason.contains("hibernating")));
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    assert!(matches!(unusable(), Unusable::Unreadable(_)));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(unusable(), Unusable::Foreign(_)));
}

#[test]
fn a_record_is_checked_when_it_is_read_as_strictly_as_when_it_was_made() {
    type Spoil<T> = fn(&mut T);
    record().check(&id()).unwrap();
    assert!(record().check(&"cd".repeat(32)).is_err(), "it is of another");
    let spoils: [(&str, Spoil<SandboxRecord>); 4] = [
        ("id", |record| record.id = "../../etc".into()),
        ("log_directory", |record| record.config.log_directory = "/var/log/../../etc".into()),
        ("cgroup_parent", |record| record.config.cgroup_parent = "/a/../..".into()),
        ("vmm", |record| record.vmm = Some(ProcessId { pid: 1, start_time: 0, boot_id: String::new() })),
    ];
    for (field, spoil) in spoils {
        let mut spoiled = record();
        spoil(&mut spoiled);
        let error = spoiled.check(&id()).unwrap_err();
        assert!(error.contains(field), "{field}: {error}");
    }
    container().check(&id()).unwrap();
    let spoils: [Spoil<ContainerRecord>; 7] = [
        |record| record.sandbox_id = "..".into(),
        |record| record.log_path = "relative".into(),
        |record| record.log_path = "/var/log/../shadow".into(),
        |record| record.slot = Some(0),
        |record| record.disks = vec![32],
        |record| record.exit = Some(ExitInfo { code: 256, ..ExitInfo::default() }),
        |record| {
            record.config.mounts = vec![Mount {
                container_path: "/x".into(),
                source: MountSource::Host("relative".into()),
                access: MountAccess::Write,
                propagation: Propagation::Private,
                mapped: None,
                options: Vec::new(),
            }];
        },
    ];
    for (number, spoil) in spoils.into_iter().enumerate() {
        let mut spoiled = container();
        spoil(&mut spoiled);
        assert!(spoiled.check(&id()).is_err(), "{number}");
    }
}

#[test]
fn of_a_newer_record_its_name_and_process_are_known() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sandbox.json");
    let mut newer = serde_json::to_value(record()).unwrap();
    newer["version"] = 7.into();
    newer["config"]["pid"] = "of_the_moon".into();
    newer["config"]["namespace"] = "shop".into();
    fs::write(&path, newer.to_string()).unwrap();
    let sketch = sketch_sandbox(&path, &id());
    assert_eq!((sketch.config.name.as_str(), sketch.config.namespace.as_str()), ("web", "shop"));
    assert_eq!((sketch.vmm.map(|process| process.pid), sketch.state), (Some(7), SandboxState::Ready));
    let nothing = sketch_sandbox(&directory.path().join("none"), &id());
    assert_eq!((nothing.id, nothing.state), (id(), SandboxState::NotReady));
    fs::write(&path, "{").unwrap();
    assert_eq!(sketch_container(&path, &id(), &id()).state, ContainerState::Unknown);
}
