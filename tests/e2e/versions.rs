//! An upgrade and a rollback under running pods: each release drives, or leaves alone, what the other has made.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, limit, log_lines};
use nacelle_tests::daemon::Daemon;
use nacelle_tests::host;
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::Instant;

/// How many lines the container writes that writes all the time.
const LINES: usize = 600;

/// The release before: its `nacelle` and `initramfs.cpio`.
fn earlier() -> PathBuf {
    let path = std::env::var("NACELLE_TEST_EARLIER")
        .expect("NACELLE_TEST_EARLIER names what hack/test.d/earlier prints, the directory with the release before");
    for file in ["nacelle", "initramfs.cpio"] {
        assert!(Path::new(&path).join(file).exists(), "no {file} in {path}: run hack/test.d/earlier");
    }
    path.into()
}

/// A pod as it was left: a container that writes, one that sleeps and has a volume, one that was not started.
struct Pod {
    id: String,
    vmm: i32,
    talker: String,
    sleeper: String,
    idle: String,
    volume: TempDir,
    _logs: TempDir,
}

impl Pod {
    async fn run(client: &Client) -> Self {
        let (logs, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = client.run_pod(logs.path()).await.unwrap();
        let script = format!(
            "i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo line $i; [ $((i % 50)) -ne 0 ] || usleep 300000; done; exit 5"
        );
        let talker = client.create(&id, "busybox", &["sh", "-c", &script]).await.unwrap();
        let sleeper = client.create_as(&id, with_volume(volume.path())).await.unwrap();
        let idle = client.create(&id, "busybox", &["true"]).await.unwrap();
        client.start(&talker).await.unwrap();
        client.start(&sleeper).await.unwrap();
        client.shell(&sleeper, "echo before >/data/file").await;
        let vmm = client.vmm_pid(&id).await.unwrap();
        Self { id, vmm, talker, sleeper, idle, volume, _logs: logs }
    }

    /// Everything runs as it did.
    async fn lives(&self, client: &Client) {
        assert_eq!(client.pod_status(&self.id).await.unwrap().state(), cri::PodSandboxState::SandboxReady);
        assert_eq!(client.vmm_pid(&self.id).await.unwrap(), self.vmm);
        let running = client.status(&self.sleeper).await.unwrap().state();
        assert_eq!(running, cri::ContainerState::ContainerRunning);
        assert_eq!(client.status(&self.idle).await.unwrap().state(), cri::ContainerState::ContainerCreated);
        assert_eq!(client.shell(&self.sleeper, "cat /data/file").await, "before");
    }

    /// The container that writes has written each line once, and its end is known.
    async fn said_all(&self, client: &Client) {
        let status = client.wait_exit(&self.talker).await.unwrap();
        assert_eq!(status.exit_code, 5, "{status:?}");
        let lines: Vec<_> = log_lines(&status.log_path).unwrap().into_iter().map(|line| line.1).collect();
        let expected: Vec<_> = (1..=LINES).map(|n| format!("line {n}")).collect();
        let difference = lines.iter().zip(&expected).position(|(a, b)| a != b);
        assert!(lines == expected, "{} lines, first difference at {difference:?}", lines.len());
    }

    /// What a kubelet does with a pod.
    async fn is_driven(&self, client: &Client) {
        client.start(&self.idle).await.expect("what was created before starts");
        assert_eq!(client.wait_exit(&self.idle).await.unwrap().exit_code, 0);
        let used = client.stats(&self.sleeper).await.unwrap();
        assert!(used.memory.unwrap().working_set_bytes.unwrap().value > 0);
        assert!(client.pod_stats(&self.id).await.unwrap().linux.unwrap().cpu.is_some());
        let new = client.create_as(&self.id, with_volume(self.volume.path())).await.unwrap();
        client.start(&new).await.unwrap();
        assert_eq!(client.shell(&new, "echo after >>/data/file; cat /data/file").await, "before\nafter");
        let limits = cri::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
        let update = cri::UpdateContainerResourcesRequest {
            container_id: new.clone(),
            linux: Some(limits),
            ..Default::default()
        };
        client.runtime.clone().update_container_resources(update).await.unwrap();
        assert_eq!(client.shell(&new, "cat /sys/fs/cgroup/memory.max").await, (64 << 20).to_string());
        // One that is given up is ended.
        client.exec_for(&new, &["sleep", "7777"], 1).await.unwrap_err();
        let deadline = Instant::now() + limit(20);
        while !client.shell(&new, "grep -l '777[7]' /proc/[0-9]*/cmdline || true").await.is_empty() {
            assert!(Instant::now() < deadline, "an exec that took too long runs on");
        }
        client.stop(&new, 1).await.unwrap();
        client.remove(&new).await.unwrap();
    }
}

fn with_volume(path: &Path) -> cri::ContainerConfig {
    let mount = cri::Mount {
        host_path: path.to_string_lossy().into_owned(),
        container_path: "/data".into(),
        ..cri::Mount::default()
    };
    cri::ContainerConfig { mounts: vec![mount], ..container_config("busybox", &["sleep", "100000"]) }
}

/// What the verbose status says of a pod.
async fn info(client: &Client, pod: &str) -> Value {
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.into(), verbose: true };
    let answer = client.runtime.clone().pod_sandbox_status(request).await.unwrap().into_inner();
    serde_json::from_str(&answer.info["info"]).unwrap()
}

/// Waits until the verbose status says so; what it says then.
async fn until(client: &Client, pod: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + limit(30);
    loop {
        let said = info(client, pod).await;
        if holds(&said) {
            return said;
        }
        assert!(Instant::now() < deadline, "{what}: {said}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

/// What `nacelle check` says of the pods. (It may find something amiss with a node in a test.)
fn check(daemon: &Daemon) -> String {
    let config = daemon.path().join("config.toml");
    let output = Command::new("nacelle").arg("--config").arg(config).arg("check").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    said.lines().find(|line| line.split_whitespace().nth(1) == Some("pods")).unwrap_or(&said).to_owned()
}

#[tokio::test]
async fn pods_of_the_release_before_are_driven_after_an_upgrade() {
    let mut daemon = Daemon::configured("").unwrap();
    daemon.use_release(Some(&earlier())).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let pod = Pod::run(&client).await;

    daemon.kill();
    daemon.use_release(None).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let said = until(&client, &pod.id, "not taken over", |said| said["notAdopted"].is_null()).await;
    let versions = &said["versions"];
    assert!(is_empty(&versions["vmm_features"]) && is_empty(&versions["agent_features"]), "{versions}");
    assert!(versions["agent"].as_str().is_some_and(|version| !version.is_empty()), "{versions}");
    pod.lives(&client).await;
    pod.is_driven(&client).await;
    pod.said_all(&client).await;

    // New pods consist of what the new release has.
    let logs = tempfile::tempdir().unwrap();
    let new = client.run_pod(logs.path()).await.unwrap();
    let known = |said: &Value| said["versions"]["agent"] != "";
    let said = until(&client, &new, "not known what the pod consists of", known).await;
    let versions = &said["versions"];
    assert!(!is_empty(&versions["vmm_features"]) && !is_empty(&versions["agent_features"]), "{versions}");
    let deadline = Instant::now() + limit(30);
    loop {
        let said = check(&daemon);
        if said.contains(" of the first release, agent ") && !said.contains("not asked") {
            assert!(said.starts_with("ok") && said.matches("1 (VMM ").count() == 2, "{said}");
            break;
        }
        assert!(Instant::now() < deadline, "{said}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    client.remove_pod(&new).await.unwrap();
    client.remove_pod(&pod.id).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_rollback_ends_no_pod_and_the_way_back_finds_them_all() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let pod = Pod::run(&client).await;
    // One that ended by request is on record, and stays.
    let logs = tempfile::tempdir().unwrap();
    let ended = client.run_pod(logs.path()).await.unwrap();
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: ended.clone() };
    client.runtime.clone().stop_pod_sandbox(request).await.unwrap();

    daemon.kill();
    daemon.use_release(Some(&earlier())).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert!(!info(&client, &pod.id).await.as_object().unwrap().contains_key("versions"), "this is no earlier release");
    pod.lives(&client).await;
    assert_eq!(client.pods().await.unwrap().len(), 2);
    assert_eq!(client.pod_status(&ended).await.unwrap().state(), cri::PodSandboxState::SandboxNotready);
    // It works with what it adopted, and makes pods of its own beside it.
    let between = client.create(&pod.id, "busybox", &["sleep", "100000"]).await.unwrap();
    client.start(&between).await.unwrap();
    let own = Pod::run(&client).await;

    daemon.kill();
    daemon.use_release(None).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    for pod in [&pod, &own] {
        until(&client, &pod.id, "not taken over", |said| said["notAdopted"].is_null()).await;
        pod.lives(&client).await;
        pod.is_driven(&client).await;
        pod.said_all(&client).await;
    }
    assert_eq!(client.shell(&between, "echo alive").await, "alive");
    assert_eq!(client.pod_status(&ended).await.unwrap().state(), cri::PodSandboxState::SandboxNotready);
    // The disk that the earlier daemon gave it goes with it.
    let disks = async || client.shell(&pod.sleeper, "ls /sys/block | grep -c ^vd").await.parse::<u32>().unwrap();
    let before = disks().await;
    client.remove(&between).await.unwrap();
    assert_eq!(disks().await, before - 1);
    for pod in [&pod.id, &own.id, &ended] {
        client.remove_pod(pod).await.unwrap();
        assert_eq!(host::cgroups(pod), [""; 0]);
    }
    assert_eq!(daemon.leftovers(), [""; 0]);
}
