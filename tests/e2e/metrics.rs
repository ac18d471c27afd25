//! Metrics of a pod at work.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, log_lines, pod_config};

/// What a container that has no quota, or has not used a disk, has no value of.
const OPTIONAL: [&str; 6] = [
    "container_blkio_device_usage_total",
    "container_fs_reads_bytes_total",
    "container_fs_reads_total",
    "container_fs_writes_bytes_total",
    "container_fs_writes_total",
    "container_spec_cpu_quota",
];

#[tokio::test]
async fn every_metric_that_is_described_is_reported_with_its_labels() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let config = pod_config(logs.path());
    let name = config.metadata.clone().unwrap().name;
    let pod = client.run_pod_as(config).await.unwrap();
    let id = client.create(&pod, "busybox", &["sh", "-c", "sleep 10000 & exec 5<>/tmp/open; echo ready; wait"]).await;
    let id = id.unwrap();
    client.start(&id).await.unwrap();
    let log = client.status(&id).await.unwrap().log_path;
    while log_lines(&log).unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut runtime = client.runtime.clone();
    let answer = runtime.list_metric_descriptors(cri::ListMetricDescriptorsRequest {}).await.unwrap().into_inner();
    let described: BTreeMap<_, _> = answer.descriptors.iter().map(|d| (d.name.as_str(), d)).collect();
    assert!(described.len() >= 45);
    let answer = runtime.list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest {}).await.unwrap().into_inner();
    let found = answer.pod_metrics.iter().find(|metrics| metrics.pod_sandbox_id == pod).expect("the pod");
    let [container] = found.container_metrics.as_slice() else {
        panic!("{} containers", found.container_metrics.len())
    };
    assert_eq!(container.container_id, id);
    let mut reported = BTreeSet::new();
    for metric in found.metrics.iter().chain(&container.metrics) {
        assert_eq!(metric.label_values.len(), described[metric.name.as_str()].label_keys.len(), "{}", metric.name);
        assert!(metric.label_values.contains(&name), "{metric:?}");
        reported.insert(metric.name.as_str());
    }
    let missing: Vec<_> =
        described.keys().filter(|name| !reported.contains(**name) && !OPTIONAL.contains(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let of = |metrics: &[cri::Metric], name: &str| -> u64 {
        metrics.iter().filter(|metric| metric.name == name).map(|metric| metric.value.unwrap().value).sum()
    };
    for (name, least) in [
        ("container_memory_working_set_bytes", 4096),
        ("container_processes", 2),
        ("container_threads", 2),
        // Three streams and one more.
        ("container_file_descriptors", 4),
        ("container_ulimits_soft", 1),
        ("container_start_time_seconds", 1_700_000_000),
        ("container_fs_limit_bytes", 1 << 30),
        ("container_fs_inodes_free", 1),
        ("container_spec_cpu_shares", 1),
    ] {
        assert!(of(&container.metrics, name) >= least, "{name} {}", of(&container.metrics, name));
    }
    assert!(of(&found.metrics, "container_network_receive_packets_total") > 0);
    assert!(
        of(&found.metrics, "container_memory_usage_bytes") > of(&container.metrics, "container_memory_usage_bytes")
    );
    client.remove_pod(&pod).await.unwrap();
}
