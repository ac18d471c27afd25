//! A daemon that starts when something is wrong: it answers, no pod is lost, nothing that is not its own is touched.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, limit, log_lines, pod_config};
use nacelle_tests::daemon::Daemon;
use nacelle_tests::host;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::time::Instant;
use tonic::Code;

fn process(pid: i32) -> Pid {
    Pid::from_raw(pid).unwrap()
}

fn runs(pid: i32) -> bool {
    test_kill_process(process(pid)).is_ok()
}

/// A pod with a container that sleeps.
async fn sleeper(client: &Client, logs: &Path) -> (String, String) {
    client.pull("busybox").await.unwrap();
    let pod = client.run_pod(logs).await.unwrap();
    let id = client.create(&pod, "busybox", &["sleep", "100000"]).await.unwrap();
    client.start(&id).await.unwrap();
    (pod, id)
}

/// Why a pod is not taken over; nothing if it is.
async fn not_adopted(client: &Client, pod: &str) -> Option<String> {
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.into(), verbose: true };
    let info = client.runtime.clone().pod_sandbox_status(request).await.unwrap().into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    info["notAdopted"].as_str().map(str::to_owned)
}

/// Waits until a pod is taken over.
async fn adopted(client: &Client, pod: &str) {
    let deadline = Instant::now() + limit(30);
    while let Some(reason) = not_adopted(client, pod).await {
        assert!(Instant::now() < deadline, "{reason}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits until something holds.
async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + limit(30);
    while !holds().await {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn state(client: &Client, pod: &str) -> cri::PodSandboxState {
    client.pod_status(pod).await.unwrap().state()
}

fn record(daemon: &Daemon, pod: &str) -> PathBuf {
    daemon.path().join("root/pods").join(pod).join("sandbox.json")
}

#[tokio::test]
async fn a_log_that_cannot_be_opened_costs_neither_the_pod_nor_a_line() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let script = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo line $i; usleep 2000; done; exec sleep 100000";
    let id = client.create(&pod, "busybox", &["sh", "-c", script]).await.unwrap();
    client.start(&id).await.unwrap();
    let log = PathBuf::from(client.status(&id).await.unwrap().log_path);
    until("the container says something", async || !log_lines(&log).unwrap().is_empty()).await;
    daemon.kill();
    let (aside, secret) = (logs.path().join("aside"), logs.path().join("secret"));
    std::fs::rename(&log, &aside).unwrap();
    std::fs::write(&secret, "secret").unwrap();
    std::os::unix::fs::symlink(&secret, &log).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert_eq!(state(&client, &pod).await, cri::PodSandboxState::SandboxReady);
    assert_eq!(client.exec(&id, &["echo", "alive"]).await.unwrap().stdout, b"alive\n");
    std::fs::remove_file(&log).unwrap();
    std::fs::rename(&aside, &log).unwrap();
    until("the log goes on", async || log_lines(&log).unwrap().len() >= 300).await;
    let lines: Vec<_> = log_lines(&log).unwrap().into_iter().map(|line| line.1).collect();
    assert_eq!(lines, (1..=300).map(|n| format!("line {n}")).collect::<Vec<_>>());
    assert_eq!(std::fs::read(&secret).unwrap(), b"secret");
    assert_eq!(client.status(&id).await.unwrap().state(), cri::ContainerState::ContainerRunning);
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn what_a_newer_version_wrote_is_listed_and_left_alone_until_that_is_back() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let (pod, id) = sleeper(&client, logs.path()).await;
    let (other, other_id) = sleeper(&client, logs.path()).await;
    let vmms = [client.vmm_pid(&pod).await.unwrap(), client.vmm_pid(&other).await.unwrap()];
    daemon.kill();
    // A pod's, and of another pod a container's.
    let container = daemon.path().join("root/pods").join(&other).join(format!("containers/{other_id}.json"));
    let newer = [record(&daemon, &pod), container].map(|path| {
        let before = std::fs::read_to_string(&path).unwrap();
        let text = before.replacen("\"version\": 1", "\"version\": 99", 1);
        assert_ne!(text, before);
        std::fs::write(&path, &text).unwrap();
        (path, before, text)
    });
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let listed = client.pods().await.unwrap();
    let names: Vec<_> = listed.iter().map(|pod| pod.metadata.clone().unwrap().name).collect();
    assert_eq!(listed.len(), 2, "{names:?}");
    assert!(names.iter().all(|name| !name.is_empty()), "{names:?}");
    assert!(not_adopted(&client, &pod).await.unwrap().contains("99"));
    adopted(&client, &other).await;
    let stop = cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() };
    let error = client.runtime.clone().stop_pod_sandbox(stop).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("run the nacelle that wrote it"), "{}", error.message());
    assert_eq!(client.remove(&other_id).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(client.status(&other_id).await.unwrap().state(), cri::ContainerState::ContainerRunning);
    assert!(vmms.iter().all(|pid| runs(*pid)));
    for (path, _, text) in &newer {
        assert_eq!(&std::fs::read_to_string(path).unwrap(), text);
    }
    daemon.kill();
    for (path, before, _) in &newer {
        std::fs::write(path, before).unwrap();
    }
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    for (pod, id) in [(&pod, &id), (&other, &other_id)] {
        adopted(&client, pod).await;
        assert_eq!(client.exec(id, &["echo", "alive"]).await.unwrap().stdout, b"alive\n");
        client.remove_pod(pod).await.unwrap();
    }
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_pod_whose_record_is_torn_or_empty_is_listed_and_can_be_removed() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let (torn, _) = sleeper(&client, logs.path()).await;
    let (empty, _) = sleeper(&client, logs.path()).await;
    let (fine, id) = sleeper(&client, logs.path()).await;
    let vmm = client.vmm_pid(&torn).await.unwrap();
    daemon.kill();
    std::fs::write(record(&daemon, &torn), "{\"version\":1,\"id\":").unwrap();
    std::fs::write(record(&daemon, &empty), "").unwrap();
    // What is no pod's is none of ours.
    let strange = daemon.path().join("root/pods/../pods/strange");
    std::fs::create_dir(&strange).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert_eq!(client.pods().await.unwrap().len(), 3);
    for pod in [&torn, &empty] {
        assert_eq!(state(&client, pod).await, cri::PodSandboxState::SandboxNotready);
    }
    assert!(runs(vmm), "a record that says nothing is no reason to end what runs");
    assert_eq!(client.exec(&id, &["echo", "alive"]).await.unwrap().stdout, b"alive\n");
    for pod in [&torn, &empty, &fine] {
        client.remove_pod(pod).await.unwrap();
    }
    assert!(!runs(vmm));
    assert!(strange.exists());
    std::fs::remove_dir(&strange).unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_full_disk_keeps_no_daemon_from_starting_and_no_pod_from_ending() {
    let mut daemon = Daemon::configured("guest.scratch_mib = 16").unwrap();
    let root = daemon.path().join("root");
    std::fs::create_dir(&root).unwrap();
    host::run("mount", &["-t", "tmpfs", "-o", "size=96m", "full", root.to_str().unwrap()]);
    let unmounted = Unmounted(root.clone());
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let (pod, id) = sleeper(&client, logs.path()).await;
    let fill = || std::fs::write(root.join("filler"), vec![1; 96 << 20]).unwrap_err();
    assert_eq!(fill().kind(), std::io::ErrorKind::StorageFull);
    for killed in [true, false] {
        if killed {
            daemon.kill();
        } else {
            daemon.terminate().unwrap();
        }
        fill();
        daemon.restart().await.unwrap();
        let client = daemon.client().await;
        assert_eq!(state(&client, &pod).await, cri::PodSandboxState::SandboxReady);
        assert_eq!(client.exec(&id, &["echo", "alive"]).await.unwrap().stdout, b"alive\n");
    }
    let client = daemon.client().await;
    adopted(&client, &pod).await;
    let error = client.create(&pod, "busybox", &["true"]).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    client.stop(&id, 0).await.unwrap();
    assert_eq!(client.status(&id).await.unwrap().state(), cri::ContainerState::ContainerExited);
    client.remove_pod(&pod).await.expect("a pod can go without a byte left");
    assert_eq!(
        daemon.leftovers().iter().filter(|thing| !thing.contains(" full ")).count(),
        0,
        "{:?}",
        daemon.leftovers()
    );
    daemon.kill();
    drop(unmounted);
}

/// A file system of a test's own, which goes with it.
struct Unmounted(PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test]
async fn a_daemon_without_descriptors_takes_its_pods_over_when_it_has_some() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let mut pods = Vec::new();
    for _ in 0..3 {
        pods.push(sleeper(&client, logs.path()).await);
    }
    let vmm = client.vmm_pid(&pods[0].0).await.unwrap();
    daemon.kill();
    daemon.restart_with_descriptors(26).await.unwrap();
    {
        let client = daemon.client().await;
        assert_eq!(client.pods().await.unwrap().len(), 3);
    }
    until("descriptors are missed", async || daemon.log().contains("Too many open files")).await;
    assert!(runs(vmm));
    let pid = daemon.pid().unwrap().as_raw_nonzero().to_string();
    host::run("prlimit", &["--pid", &pid, "--nofile=4096:4096"]);
    let client = daemon.client().await;
    for (pod, id) in &pods {
        adopted(&client, pod).await;
        assert_eq!(client.exec(id, &["echo", "alive"]).await.unwrap().stdout, b"alive\n");
        client.remove_pod(pod).await.unwrap();
    }
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_silent_guest_keeps_nobody_waiting_and_is_taken_over_when_it_speaks() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let (silent, id) = sleeper(&client, logs.path()).await;
    let (other, fine) = sleeper(&client, logs.path()).await;
    let vmm = client.vmm_pid(&silent).await.unwrap();
    daemon.kill();
    kill_process(process(vmm), Signal::STOP).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert_eq!(state(&client, &silent).await, cri::PodSandboxState::SandboxReady);
    assert_eq!(client.status(&id).await.unwrap().state(), cri::ContainerState::ContainerRunning);
    assert_eq!(client.exec(&fine, &["echo", "alive"]).await.unwrap().stdout, b"alive\n");
    adopted(&client, &other).await;
    assert!(not_adopted(&client, &silent).await.is_some());
    kill_process(process(vmm), Signal::CONT).unwrap();
    adopted(&client, &silent).await;
    assert_eq!(client.exec(&id, &["echo", "alive"]).await.unwrap().stdout, b"alive\n");
    client.remove_pod(&silent).await.unwrap();
    client.remove_pod(&other).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_start_whose_answer_was_lost_is_found_out() {
    let daemon = Daemon::start("[guest]\ncall_seconds = 1").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let id = client.create(&pod, "busybox", &["sleep", "100000"]).await.unwrap();
    let vmm = process(client.vmm_pid(&pod).await.unwrap());
    kill_process(vmm, Signal::STOP).unwrap();
    let error = client.start(&id).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    // A kubelet ends what is unknown before it starts another.
    assert_eq!(client.status(&id).await.unwrap().state(), cri::ContainerState::ContainerUnknown);
    kill_process(vmm, Signal::CONT).unwrap();
    let known = async || client.status(&id).await.unwrap().state() != cri::ContainerState::ContainerUnknown;
    until("it is found out", known).await;
    // The request reached the guest, or it did not.
    if client.status(&id).await.unwrap().state() == cri::ContainerState::ContainerCreated {
        client.start(&id).await.unwrap();
    }
    let seen = client.exec(&id, &["sh", "-c", "ps | grep -c '[s]leep 100000'"]).await.unwrap().stdout;
    assert_eq!(seen, b"1\n");
    client.stop(&id, 0).await.unwrap();
    assert_eq!(client.wait_exit(&id).await.unwrap().exit_code, 137);
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn what_a_client_of_the_daemon_before_waited_for_is_ended() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let (pod, id) = sleeper(&client, logs.path()).await;
    let call = tokio::spawn({
        let (client, id) = (client.clone(), id.clone());
        async move { client.exec_for(&id, &["sleep", "4711"], 3600).await }
    });
    let there = async |client: &Client| client.shell(&id, "ps").await.contains("sleep 4711");
    until("it runs", async || there(&client).await).await;
    daemon.kill();
    let _ = call.await;
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    adopted(&client, &pod).await;
    until("it is ended", async || !there(&client).await).await;
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_control_group_that_does_not_go_holds_up_its_own_pod_alone() {
    let mut daemon = Daemon::start("[guest]\ncall_seconds = 2").await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let (pod, _) = sleeper(&client, logs.path()).await;
    let (other, fine) = sleeper(&client, logs.path()).await;
    let [cgroup] = host::cgroups(&pod).try_into().expect("one control group");
    let inner = Path::new(&cgroup).join("inner");
    std::fs::create_dir(&inner).unwrap();
    let stop = cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() };
    let error = client.runtime.clone().stop_pod_sandbox(stop.clone()).await.unwrap_err();
    assert!(error.message().contains(&cgroup), "{}", error.message());
    assert_eq!(state(&client, &pod).await, cri::PodSandboxState::SandboxNotready, "its guest has ended");
    daemon.kill();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert_eq!(client.pods().await.unwrap().len(), 2);
    assert_eq!(client.exec(&fine, &["echo", "alive"]).await.unwrap().stdout, b"alive\n");
    let status = client.pod_status(&pod).await.unwrap();
    assert_eq!(status.state(), cri::PodSandboxState::SandboxNotready);
    std::fs::remove_dir(&inner).unwrap();
    client.remove_pod(&pod).await.unwrap();
    client.remove_pod(&other).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
    assert_eq!(host::cgroups(&pod), [""; 0]);
}

#[tokio::test]
async fn a_pod_that_was_asked_to_end_is_not_said_to_have_ended_by_itself() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod_as(pod_config(logs.path())).await.unwrap();
    let vmm = client.vmm_pid(&pod).await.unwrap();
    let stop = tokio::spawn({
        let (client, pod) = (client.clone(), pod.clone());
        async move { client.runtime.clone().stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod }).await }
    });
    until("it is on record that it is to end", async || {
        std::fs::read_to_string(record(&daemon, &pod)).unwrap().contains("\"stopping\": true")
    })
    .await;
    daemon.kill();
    let _ = stop.await;
    let _ = kill_process(process(vmm), Signal::KILL);
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    until("its end is seen", async || state(&client, &pod).await == cri::PodSandboxState::SandboxNotready).await;
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: true };
    let info = client.runtime.clone().pod_sandbox_status(request).await.unwrap().into_inner().info;
    assert!(!info["info"].contains("ended"), "{}", info["info"]);
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_container_that_was_half_made_leaves_its_name_free() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let (pod, _) = sleeper(&client, logs.path()).await;
    let config = nacelle_tests::client::container_config("busybox", &["sleep", "100000"]);
    let records = daemon.path().join("root/pods").join(&pod).join("containers");
    let count = || std::fs::read_dir(&records).map_or(0, Iterator::count);
    let call = tokio::spawn({
        let (client, pod, config) = (client.clone(), pod.clone(), config.clone());
        async move { client.create_as(&pod, config).await }
    });
    while count() < 2 && !call.is_finished() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    daemon.kill();
    let told = call.await.unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    if told.is_err() {
        let id = client.create_as(&pod, config).await.unwrap();
        client.start(&id).await.unwrap();
    }
    adopted(&client, &pod).await;
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}
