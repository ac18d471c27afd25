use std::collections::{BTreeMap, BTreeSet};

use nacelle_sandbox::{
    ContainerConfig, ContainerState, ContainerStatus, ContainerUsage, CpuUsage, DeviceUsage, FilesystemUsage,
    HugePageUsage, InterfaceUsage, IoUsage, LayerUsage, MemoryUsage, PidsUsage, Pressure, ProcessUsage, Resources,
    SandboxConfig, SandboxState, SandboxStatus, Stall, TrafficUsage,
};

use super::*;

/// What clients of the interface expect, beside what depends on how a pod is made.
const EXPECTED: [&str; 45] = [
    "container_blkio_device_usage_total",
    "container_cpu_cfs_periods_total",
    "container_cpu_cfs_throttled_periods_total",
    "container_cpu_cfs_throttled_seconds_total",
    "container_cpu_system_seconds_total",
    "container_cpu_usage_seconds_total",
    "container_cpu_user_seconds_total",
    "container_file_descriptors",
    "container_fs_inodes_free",
    "container_fs_inodes_total",
    "container_fs_limit_bytes",
    "container_fs_reads_bytes_total",
    "container_fs_reads_total",
    "container_fs_usage_bytes",
    "container_fs_writes_bytes_total",
    "container_fs_writes_total",
    "container_last_seen",
    "container_memory_cache",
    "container_memory_failcnt",
    "container_memory_failures_total",
    "container_memory_kernel_usage",
    "container_memory_mapped_file",
    "container_memory_max_usage_bytes",
    "container_memory_rss",
    "container_memory_swap",
    "container_memory_usage_bytes",
    "container_memory_working_set_bytes",
    "container_network_receive_bytes_total",
    "container_network_receive_errors_total",
    "container_network_receive_packets_dropped_total",
    "container_network_receive_packets_total",
    "container_network_transmit_bytes_total",
    "container_network_transmit_errors_total",
    "container_network_transmit_packets_dropped_total",
    "container_network_transmit_packets_total",
    "container_oom_events_total",
    "container_processes",
    "container_sockets",
    "container_spec_cpu_period",
    "container_spec_cpu_shares",
    "container_spec_memory_limit_bytes",
    "container_spec_memory_swap_limit_bytes",
    "container_start_time_seconds",
    "container_threads",
    "container_threads_max",
];

/// A group with everything in it.
fn group() -> GroupUsage {
    let stall = Some(Stall { total: 9_000_000, ..Stall::default() });
    let pressure = Some(Pressure { some: stall, full: stall });
    GroupUsage {
        read_at: 1,
        cpu: Some(CpuUsage { usage: 7_900_000, pressure, ..CpuUsage::default() }),
        memory: Some(MemoryUsage { usage: 100, inactive_file: 40, pressure, ..MemoryUsage::default() }),
        io: Some(IoUsage {
            devices: vec![DeviceUsage { major: 254, read_bytes: 5, name: "vda".into(), ..DeviceUsage::default() }],
            pressure,
        }),
        pids: Some(PidsUsage { current: 3, limit: 0 }),
        hugepages: vec![HugePageUsage { size: "2MB".into(), bytes: 0 }],
    }
}

fn pod() -> SandboxStats {
    let container = ContainerStats {
        status: ContainerStatus {
            id: "c1".into(),
            sandbox_id: "p1".into(),
            config: ContainerConfig {
                name: "web".into(),
                image: "busybox".into(),
                resources: Resources { cpu_quota: 5000, ..Resources::default() },
                ..ContainerConfig::default()
            },
            image_id: "sha256:1".into(),
            state: ContainerState::Running,
            created_at: 1,
            started_at: 5_000_000_000,
            exit: None,
            log_path: String::new(),
            user: None,
            stop_signal: 15,
        },
        usage: ContainerUsage {
            container_id: "c1".into(),
            group: Some(group()),
            writable_layer: Some(LayerUsage { bytes: 4096, inodes: 1 }),
            processes: Some(ProcessUsage { processes: 2, open_files_limit: Some(1024), ..ProcessUsage::default() }),
        },
        nano_cores: None,
    };
    let traffic = Some(TrafficUsage { bytes: 11, ..TrafficUsage::default() });
    let interface =
        |name: &str| InterfaceUsage { name: name.into(), received: traffic, sent: traffic, ..Default::default() };
    SandboxStats {
        status: SandboxStatus {
            id: "p1".into(),
            config: SandboxConfig { name: "pod".into(), namespace: "ns".into(), ..SandboxConfig::default() },
            state: SandboxState::Ready,
            created_at: 2_000_000_000,
            ips: Vec::new(),
            vmm_pid: Some(1),
            message: String::new(),
            size: None,
            silent_since: None,
            not_adopted: None,
            versions: nacelle_sandbox::Versions::default(),
        },
        at: 6_000_000_000,
        host: group(),
        nano_cores: None,
        guest: group(),
        interfaces: vec![interface("eth0"), interface("net1")],
        scratch: Some(FilesystemUsage::default()),
        directory: "/var".into(),
        containers: vec![container],
    }
}

#[test]
fn every_expected_metric_is_described_and_reported_with_the_same_labels() {
    let described: BTreeMap<_, _> = descriptors().into_iter().map(|d| (d.name.clone(), d)).collect();
    assert_eq!(described.len(), FAMILIES.len(), "two of one name");
    for name in EXPECTED {
        assert!(described.contains_key(name), "{name}");
    }
    let pod = metrics(&pod());
    let all: Vec<_> = pod.metrics.iter().chain(pod.container_metrics.iter().flat_map(|c| &c.metrics)).collect();
    let mut series = BTreeSet::new();
    for metric in &all {
        let descriptor = &described[&metric.name];
        assert_eq!(metric.label_values.len(), descriptor.label_keys.len(), "{}", metric.name);
        assert!(
            series.insert((&metric.name, &metric.label_values)),
            "{} twice: {:?}",
            metric.name,
            metric.label_values
        );
        assert!(metric.timestamp > 0 && metric.value.is_some());
    }
    let reported: BTreeSet<_> = all.iter().map(|metric| metric.name.as_str()).collect();
    let missing: Vec<_> = described.keys().filter(|name| !reported.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "described and not reported: {missing:?}");
    assert!(described.values().all(|d| d.help.ends_with('.') && d.label_keys.len() >= LABELS.len()));
}

#[test]
fn the_network_is_the_pods_and_layers_are_the_containers() {
    let pod = metrics(&pod());
    let find = |metrics: &[cri::Metric], name: &str| -> Vec<(Vec<String>, u64)> {
        let named = metrics.iter().filter(|metric| metric.name == name);
        named.map(|metric| (metric.label_values.clone(), metric.value.unwrap().value)).collect()
    };
    let container = &pod.container_metrics[0].metrics;
    let received = find(&pod.metrics, "container_network_receive_bytes_total");
    let labels = |values: &[&str]| values.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(
        received,
        [
            (labels(&["", "p1", "", "", "ns", "pod", "eth0"]), 11),
            (labels(&["", "p1", "", "", "ns", "pod", "net1"]), 11)
        ]
    );
    assert!(find(container, "container_network_receive_bytes_total").is_empty());
    let used = find(container, "container_cpu_usage_seconds_total");
    assert_eq!(used, [(labels(&["web", "c1", "busybox", "c1", "ns", "pod", "total"]), 7)]);
    assert_eq!(find(&pod.metrics, "container_cpu_usage_seconds_total").len(), 1, "with its overhead");
    assert_eq!(find(container, "container_fs_usage_bytes")[0].1, 4096);
    assert!(find(&pod.metrics, "container_fs_usage_bytes").is_empty());
    assert_eq!(find(container, "container_start_time_seconds")[0].1, 5);
    assert_eq!(find(container, "container_pressure_io_stalled_seconds_total")[0].1, 9);
}
