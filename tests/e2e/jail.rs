//! What the VMM of a pod can reach of its host, as the host's kernel tells it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config};

/// CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID and SETFCAP.
const CAPABILITIES: &str = "00000000800000df";

#[tokio::test]
async fn a_vmm_reaches_nothing_of_its_host_but_what_its_guest_needs() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let (logs, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pod = client.run_pod(logs.path()).await.unwrap();
    // With a volume there are threads that serve it.
    let mut config = container_config("busybox", &["sleep", "100000"]);
    config.mounts = vec![cri::Mount {
        container_path: "/data".into(),
        host_path: volume.path().display().to_string(),
        ..Default::default()
    }];
    let container = client.create_as(&pod, config).await.unwrap();
    client.start(&container).await.unwrap();
    client.shell(&container, "echo there >/data/file").await;
    assert_eq!(fs::read_to_string(volume.path().join("file")).unwrap(), "there\n");

    let process = PathBuf::from(format!("/proc/{}", client.vmm_pid(&pod).await.unwrap()));
    let mut threads = 0;
    for thread in fs::read_dir(process.join("task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
        for set in ["CapPrm:", "CapBnd:"] {
            assert_eq!(field(set), CAPABILITIES, "{set} of {status}");
        }
        assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1", "2"), "{status}");
        threads += 1;
    }
    assert!(threads >= 3, "the event loop, a processor and a thread for volumes");

    for namespace in ["mnt", "net", "ipc", "uts", "user"] {
        let link = |process: &Path| fs::read_link(process.join("ns").join(namespace)).unwrap();
        assert_ne!(link(&process), link("/proc/self".as_ref()), "{namespace}");
    }
    let root = process.join("root");
    assert_eq!(names(&root), ["dev", "proc", "run"]);
    assert_eq!(names(&root.join("dev")), ["kvm"]);
    assert_eq!(names(&root.join("proc/self")), ["fd"]);
    assert_eq!(names(&root.join("run/nacelle/pods")), [pod.as_str()]);
    // It is a clone: in place of a kernel it has what it goes on from.
    let saved = root.join("run/nacelle/templates");
    assert_eq!(names(&saved.join(&names(&saved)[0])), ["memory", "state"]);
    assert_eq!(names(&saved).len(), 1, "and no other's");
    // Which nobody else on the host can read.
    let saved = Path::new("/run/nacelle/templates").join(&names(&saved)[0]);
    for path in [saved.clone(), saved.join("memory"), saved.join("state")] {
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0, "{}", path.display());
    }
    let refused = |written: std::io::Result<()>| {
        assert_eq!(written.unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    };
    refused(fs::write(root.join("etc"), ""));
    // What the daemon opens by name in the pod's directory is what it was before the guest ran.
    let own = root.join("run/nacelle/pods").join(&pod);
    refused(fs::write(own.join("new"), ""));
    refused(std::os::unix::fs::symlink("/etc/shadow", own.join("new")));
    let present = names(&own);
    for name in ["console", "control", "messages", "vmm.json", "vmm.log", "vmm.pid", "vsock"] {
        assert!(present.iter().any(|present| present == name), "{name} of {present:?}");
        refused(fs::rename(own.join(name), own.join("new")));
        refused(fs::hard_link(own.join(name), own.join("new")));
        refused(fs::remove_file(own.join(name)));
        if !["control", "vsock"].contains(&name) {
            refused(fs::File::options().append(true).open(own.join(name)).map(drop));
        }
    }
    let record = fs::read(Path::new("/run/nacelle/pods").join(&pod).join("vmm.pid")).unwrap();
    let identity = nacelle_vmm::Identity::parse(&record).unwrap();
    assert_eq!(process, Path::new("/proc").join(identity.pid.to_string()));
    // No file of the host is open that could be made to grow, but those of its disks and volumes.
    for descriptor in 0..3 {
        let target = fs::read_link(process.join("fd").join(descriptor.to_string())).unwrap();
        assert_eq!(target, Path::new("/dev/null"), "descriptor {descriptor}");
    }
    client.remove_pod(&pod).await.unwrap();
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
