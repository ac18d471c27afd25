//! What pods and containers use: it shows where it is used, and is gone when they are.

use std::io::Read;
use std::net::TcpListener;
use std::time::Duration;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, limit, pod_config};
use nacelle_tests::daemon::Daemon;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;
use tonic::Code;

const MIB: u64 = 1 << 20;
/// The gateway of the node's network, see hack/node.
const GATEWAY: &str = "10.244.0.1";

fn value(value: &Option<cri::UInt64Value>) -> u64 {
    value.expect("a value").value
}

/// Asks for a container's figures until `enough` says that they are as they should be.
async fn until(
    client: &Client,
    id: &str,
    what: &str,
    enough: impl Fn(&cri::ContainerStats) -> bool,
) -> cri::ContainerStats {
    let deadline = Instant::now() + limit(60);
    loop {
        let stats = client.stats(id).await.unwrap();
        if enough(&stats) {
            return stats;
        }
        assert!(Instant::now() < deadline, "{what}: {stats:#?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn a_busy_containers_time_grows_and_an_idle_ones_does_not() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let busy = client.create(&pod, "busybox", &["sh", "-c", "while :; do :; done"]).await.unwrap();
    let idle = client.create(&pod, "busybox", &["sleep", "10000"]).await.unwrap();
    for id in [&busy, &idle] {
        client.start(id).await.unwrap();
    }
    let used = |stats: &cri::ContainerStats| value(&stats.cpu.as_ref().unwrap().usage_core_nano_seconds);
    let first = until(&client, &busy, "no time used", |stats| used(stats) > 100_000_000).await;
    let pod_first = client.pod_stats(&pod).await.unwrap().linux.unwrap().cpu.unwrap();
    let rate = |stats: &cri::ContainerStats| stats.cpu.as_ref().unwrap().usage_nano_cores.map(|rate| rate.value);
    let second = until(&client, &busy, "no rate", |stats| rate(stats).is_some()).await;
    assert!(used(&second) > used(&first));
    // At least a twentieth of a processor: it has one, with others.
    assert!(rate(&second).unwrap() > 50_000_000, "{:?}", second.cpu);
    // What it took to start is in its first rates.
    let calm = |stats: &cri::ContainerStats| rate(stats).is_some_and(|rate| rate < 20_000_000);
    until(&client, &idle, "time used by nothing", calm).await;

    // The guest's second is not the host's: the pod's rate may come later than its containers'.
    let deadline = Instant::now() + limit(60);
    let (stats, cpu) = loop {
        let stats = client.pod_stats(&pod).await.unwrap().linux.unwrap();
        let cpu = stats.cpu.unwrap();
        if cpu.usage_nano_cores.is_some() {
            break (stats, cpu);
        }
        assert!(Instant::now() < deadline, "no rate of the pod: {stats:#?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    assert!(value(&cpu.usage_core_nano_seconds) > value(&pod_first.usage_core_nano_seconds));
    assert!(value(&cpu.usage_nano_cores) > 0 && cpu.timestamp > pod_first.timestamp);
    // Two containers, each of one process.
    assert_eq!(value(&stats.process.unwrap().process_count), 2);
    assert_eq!(stats.containers.len(), 2);
    let psi = second.cpu.unwrap().psi.expect("the guest's kernel counts pressure");
    assert!(psi.some.is_some() && psi.full.is_some());
    assert!(second.io.unwrap().psi.is_some() && second.memory.unwrap().psi.is_some());
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn memory_that_is_held_and_files_that_are_written_show() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let hold = "BEGIN { held = sprintf(\"%31457280s\", \"x\"); system(\"sleep 10000\") }";
    let mut config = container_config("busybox", &["awk", hold]);
    let limits = cri::LinuxContainerResources { memory_limit_in_bytes: (64 * MIB) as i64, ..Default::default() };
    config.linux.as_mut().unwrap().resources = Some(limits);
    config.labels.insert("holds".into(), "memory".into());
    let id = client.create_as(&pod, config).await.unwrap();
    client.start(&id).await.unwrap();
    let rss = |stats: &cri::ContainerStats| value(&stats.memory.as_ref().unwrap().rss_bytes);
    let stats = until(&client, &id, "memory not seen", |stats| rss(stats) >= 30 * MIB).await;
    let attributes = stats.attributes.as_ref().unwrap();
    assert_eq!((attributes.id.as_str(), attributes.labels["holds"].as_str()), (id.as_str(), "memory"));
    let memory = stats.memory.as_ref().unwrap();
    let working_set = value(&memory.working_set_bytes);
    assert!((30 * MIB..=64 * MIB).contains(&working_set), "{memory:?}");
    assert_eq!(value(&memory.available_bytes), 64 * MIB - working_set);
    assert!(value(&memory.usage_bytes) >= working_set);
    assert!(value(&memory.page_faults) >= 30 * MIB / 4096 / 512, "{memory:?}");
    assert_eq!(value(&stats.swap.as_ref().unwrap().swap_usage_bytes), 0);
    let host = client.pod_stats(&pod).await.unwrap().linux.unwrap().memory.unwrap();
    assert!(value(&host.working_set_bytes) > working_set, "the guest is more than its container: {host:?}");

    let layer = |stats: &cri::ContainerStats| {
        let layer = stats.writable_layer.as_ref().expect("a writable layer");
        (value(&layer.used_bytes), value(&layer.inodes_used))
    };
    let (bytes, inodes) = layer(&until(&client, &id, "not counted", |stats| stats.writable_layer.is_some()).await);
    client.shell(&id, "dd if=/dev/zero of=/large bs=1M count=8 && touch /a /b /c && sync").await;
    let written = until(&client, &id, "files not seen", |stats| layer(stats).0 >= bytes + 8 * MIB).await;
    assert_eq!(layer(&written).1, inodes + 4);
    let directory = written.writable_layer.unwrap().fs_id.unwrap().mountpoint;
    assert!(std::path::Path::new(&directory).is_dir(), "{directory} is none of the host");
    let info = client.images.clone().image_fs_info(cri::ImageFsInfoRequest {}).await.unwrap().into_inner();
    let (images, containers) = (&info.image_filesystems[0], &info.container_filesystems[0]);
    assert_eq!(containers.fs_id.as_ref().unwrap().mountpoint, directory);
    assert!(value(&containers.used_bytes) >= 8 * MIB && value(&images.used_bytes) > 0, "{info:?}");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_over_the_network_is_counted() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let id = client.create(&pod, "busybox", &["sleep", "10000"]).await.unwrap();
    client.start(&id).await.unwrap();
    let interface = async || {
        let network = client.pod_stats(&pod).await.unwrap().linux.unwrap().network.unwrap();
        assert!(network.timestamp > 0 && network.interfaces.is_empty());
        network.default_interface.expect("the pod has a network")
    };
    let before = interface().await;
    assert_eq!(before.name, "eth0");
    let listener = TcpListener::bind((GATEWAY, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let sink = std::thread::spawn(move || {
        let mut received = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut received).unwrap();
        received.len()
    });
    client.shell(&id, &format!("head -c 2097152 /dev/zero | nc {GATEWAY} {port}")).await;
    assert_eq!(sink.join().unwrap() as u64, 2 * MIB);
    let after = interface().await;
    assert!(value(&after.tx_bytes) >= value(&before.tx_bytes) + 2 * MIB, "{before:?} {after:?}");
    assert!(value(&after.rx_bytes) > value(&before.rx_bytes), "acknowledgements: {before:?} {after:?}");
    assert_eq!((value(&after.rx_errors), value(&after.tx_errors)), (0, 0));
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn what_has_ended_uses_nothing() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let mut config = pod_config(logs.path());
    config.labels.insert("test".into(), "ended".into());
    let pod = client.run_pod_as(config).await.unwrap();
    let stays = client.create(&pod, "busybox", &["sleep", "10000"]).await.unwrap();
    let ends = client.create(&pod, "busybox", &["sleep", "10000"]).await.unwrap();
    let list = async || {
        let filter = cri::ContainerStatsFilter { pod_sandbox_id: pod.clone(), ..Default::default() };
        let request = cri::ListContainerStatsRequest { filter: Some(filter) };
        let stats = client.runtime.clone().list_container_stats(request).await.unwrap().into_inner().stats;
        stats.into_iter().map(|stats| stats.attributes.unwrap().id).collect::<Vec<_>>()
    };
    assert_eq!(list().await, [""; 0], "nothing has started");
    let error = client.stats(&stays).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    client.start(&stays).await.unwrap();
    client.start(&ends).await.unwrap();
    let mut both = vec![stays.clone(), ends.clone()];
    both.sort();
    let mut listed = list().await;
    listed.sort();
    assert_eq!(listed, both);
    client.stop(&ends, 0).await.unwrap();
    assert_eq!(list().await, std::slice::from_ref(&stays));
    let error = client.stats(&ends).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains(&ends), "{error}");

    let pods = async |label: &str| {
        let label_selector = [("test".to_owned(), label.to_owned())].into();
        let filter = cri::PodSandboxStatsFilter { label_selector, ..Default::default() };
        let request = cri::ListPodSandboxStatsRequest { filter: Some(filter) };
        client.runtime.clone().list_pod_sandbox_stats(request).await.unwrap().into_inner().stats.len()
    };
    assert_eq!((pods("ended").await, pods("other").await), (1, 0));
    client.runtime.clone().stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    assert_eq!((pods("ended").await, list().await.len()), (0, 0));
    let error = client.pod_stats(&pod).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_does_not_answer_is_left_out_of_the_lists() {
    let daemon = Daemon::start("[guest]\ncall_seconds = 1").await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let (stuck, other) = (client.run_pod(logs.path()).await.unwrap(), client.run_pod(logs.path()).await.unwrap());
    let vmm = Pid::from_raw(client.vmm_pid(&stuck).await.unwrap()).unwrap();
    kill_process(vmm, Signal::STOP).unwrap();
    let request = cri::ListPodSandboxStatsRequest::default();
    let stats = client.runtime.clone().list_pod_sandbox_stats(request).await.unwrap().into_inner().stats;
    let ids: Vec<_> = stats.into_iter().map(|stats| stats.attributes.unwrap().id).collect();
    assert_eq!(ids, std::slice::from_ref(&other));
    let error = client.pod_stats(&stuck).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    let told = |line: &str| line.contains("left out of the statistics") && line.contains(&stuck);
    assert!(daemon.log().lines().any(told), "{}", daemon.log());
    kill_process(vmm, Signal::CONT).unwrap();
    for pod in [&stuck, &other] {
        client.remove_pod(pod).await.unwrap();
    }
}
