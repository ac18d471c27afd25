//! Every metric: its name, what it says, where its values come from.
//!
//! A container has all of them. A pod as a whole has its processor time, memory, pressure and
//! network: the VMM and the guest's own use are in its figures.

use nacelle_proto::runtime::v1::MetricType;
use nacelle_sandbox::{
    CpuUsage, DeviceUsage, FilesystemUsage, IoUsage, MemoryUsage, PidsUsage, Pressure, ProcessUsage, Resources, Stall,
    TrafficUsage,
};

use super::Subject;
use crate::stats::working_set;

/// A metric with all of its label values.
pub(super) struct Family {
    pub(super) name: &'static str,
    /// A sentence for people.
    pub(super) help: &'static str,
    pub(super) kind: MetricType,
    /// Labels beside those that all have.
    pub(super) labels: &'static [&'static str],
    /// The values of one subject; none if it has no such thing.
    pub(super) values: fn(&Subject) -> Vec<Value>,
}

/// A value and its labels beside those that all have.
pub(super) struct Value {
    pub(super) labels: Vec<String>,
    pub(super) value: u64,
}

/// One value without labels of its own.
fn one(value: Option<u64>) -> Vec<Value> {
    value.map(|value| Value { labels: Vec::new(), value }).into_iter().collect()
}

/// One value with one label of its own.
fn labelled(label: &str, value: Option<u64>) -> Vec<Value> {
    value.map(|value| Value { labels: vec![label.into()], value }).into_iter().collect()
}

const fn counter(name: &'static str, help: &'static str, values: fn(&Subject) -> Vec<Value>) -> Family {
    Family { name, help, kind: MetricType::Counter, labels: &[], values }
}

const fn gauge(name: &'static str, help: &'static str, values: fn(&Subject) -> Vec<Value>) -> Family {
    Family { name, help, kind: MetricType::Gauge, labels: &[], values }
}

impl Family {
    const fn by(self, labels: &'static [&'static str]) -> Self {
        Self { labels, ..self }
    }
}

impl Subject<'_> {
    fn cpu(&self, value: impl Fn(&CpuUsage) -> u64) -> Vec<Value> {
        one(self.group.cpu.as_ref().map(value))
    }

    fn memory(&self, value: impl Fn(&MemoryUsage) -> u64) -> Vec<Value> {
        one(self.group.memory.as_ref().map(value))
    }

    /// Limits, as they were asked for.
    fn spec(&self, value: impl Fn(&Resources) -> Option<i64>) -> Vec<Value> {
        let value = self.container.and_then(|container| value(&container.status.config.resources));
        // Less than zero is no limit, which these metrics write as zero.
        one(value.map(|value| u64::try_from(value).unwrap_or(0)))
    }

    fn processes(&self, value: impl Fn(&ProcessUsage) -> Option<u64>) -> Vec<Value> {
        one(self.container.and_then(|container| container.usage.processes.as_ref()).and_then(value))
    }

    fn pids(&self, value: impl Fn(&PidsUsage) -> u64) -> Vec<Value> {
        one(self.container.and(self.group.pids.as_ref()).map(value))
    }

    fn scratch(&self, value: impl Fn(&FilesystemUsage) -> u64) -> Vec<Value> {
        labelled(SCRATCH, self.container.and(self.pod.scratch.as_ref()).map(value))
    }

    fn devices(&self, value: impl Fn(&DeviceUsage) -> u64) -> Vec<Value> {
        let of = |device: &DeviceUsage| Value { labels: vec![name(device)], value: value(device) };
        self.io().map(of).collect()
    }

    /// Devices of the guest: those of the pod as a whole are none.
    fn io(&self) -> impl Iterator<Item = &DeviceUsage> {
        self.container.and(self.group.io.as_ref()).into_iter().flat_map(|io: &IoUsage| &io.devices)
    }

    fn traffic(&self, sent: bool, value: impl Fn(&TrafficUsage) -> u64) -> Vec<Value> {
        // The network is the pod's.
        let interfaces = self.pod.interfaces.iter().filter(|_| self.container.is_none());
        interfaces
            .map(|interface| {
                let traffic = if sent { &interface.sent } else { &interface.received };
                Value { labels: vec![interface.name.clone()], value: traffic.as_ref().map(&value).unwrap_or_default() }
            })
            .collect()
    }
}

/// Seconds for which some, or all, had to wait.
fn stalled(pressure: Option<&Pressure>, all: bool) -> Vec<Value> {
    let stall = |pressure: &Pressure| if all { pressure.full } else { pressure.some };
    one(pressure.and_then(stall).map(|stall: Stall| seconds(stall.total)))
}

fn seconds(microseconds: u64) -> u64 {
    microseconds / 1_000_000
}

/// A device's name, or else its numbers.
fn name(device: &DeviceUsage) -> String {
    match device.name.as_str() {
        "" => format!("{}:{}", device.major, device.minor),
        name => name.to_owned(),
    }
}

/// What the disk with the writable layers is called.
const SCRATCH: &str = "scratch";

/// The period of a quota that names none, in microseconds.
const PERIOD: i64 = 100_000;
/// The shares of a container that names none.
const SHARES: i64 = 1024;

pub(super) const FAMILIES: &[Family] = &[
    counter("container_cpu_usage_seconds_total", "Processor time used, in seconds.", |s| {
        labelled("total", s.group.cpu.as_ref().map(|cpu| seconds(cpu.usage)))
    })
    .by(&["cpu"]),
    counter("container_cpu_user_seconds_total", "Processor time used outside the kernel, in seconds.", |s| {
        s.cpu(|cpu| seconds(cpu.user))
    }),
    counter("container_cpu_system_seconds_total", "Processor time used in the kernel, in seconds.", |s| {
        s.cpu(|cpu| seconds(cpu.system))
    }),
    counter("container_cpu_cfs_periods_total", "Periods in which a quota of processor time was in force.", |s| {
        s.cpu(|cpu| cpu.periods)
    }),
    counter("container_cpu_cfs_throttled_periods_total", "Periods in which the quota was used up.", |s| {
        s.cpu(|cpu| cpu.throttled_periods)
    }),
    counter(
        "container_cpu_cfs_throttled_seconds_total",
        "Time spent waiting for the next period with the quota used up, in seconds.",
        |s| s.cpu(|cpu| seconds(cpu.throttled)),
    ),
    gauge("container_memory_usage_bytes", "Memory in use, page cache included, in bytes.", |s| s.memory(|m| m.usage)),
    gauge("container_memory_working_set_bytes", "Memory in use that cannot be given up without harm, in bytes.", |s| {
        s.memory(working_set)
    }),
    gauge("container_memory_max_usage_bytes", "Highest memory in use so far, in bytes.", |s| s.memory(|m| m.peak)),
    gauge("container_memory_rss", "Memory of processes that no file is behind, in bytes.", |s| {
        s.memory(|m| m.anonymous)
    }),
    gauge("container_memory_cache", "Page cache, in bytes.", |s| s.memory(|m| m.file)),
    gauge("container_memory_mapped_file", "Files mapped into memory, in bytes.", |s| s.memory(|m| m.file_mapped)),
    gauge("container_memory_kernel_usage", "Memory that the kernel holds, in bytes.", |s| s.memory(|m| m.kernel)),
    gauge("container_memory_swap", "Memory that was swapped out, in bytes.", |s| s.memory(|m| m.swap)),
    counter("container_memory_failcnt", "How often the memory limit was come to.", |s| s.memory(|m| m.limit_hits)),
    counter("container_memory_failures_total", "Page faults, by their kind.", |s| {
        let Some(memory) = &s.group.memory else { return Vec::new() };
        let faults = [("pgfault", memory.page_faults), ("pgmajfault", memory.major_page_faults)];
        let value = |(kind, value): (&str, u64), scope: &str| Value { labels: vec![kind.into(), scope.into()], value };
        faults.into_iter().flat_map(|fault| ["container", "hierarchy"].map(|scope| value(fault, scope))).collect()
    })
    .by(&["failure_type", "scope"]),
    counter("container_oom_events_total", "Processes that the out-of-memory killer has ended.", |s| {
        s.memory(|m| m.oom_kills)
    }),
    gauge("container_hugetlb_usage_bytes", "Huge pages in use, in bytes.", |s| {
        let of = |huge: &nacelle_sandbox::HugePageUsage| Value { labels: vec![huge.size.clone()], value: huge.bytes };
        s.group.hugepages.iter().map(of).collect()
    })
    .by(&["pagesize"]),
    counter(
        "container_pressure_cpu_waiting_seconds_total",
        "Time in which a task waited for a processor, in seconds.",
        |s| stalled(s.group.cpu.as_ref().and_then(|cpu| cpu.pressure.as_ref()), false),
    ),
    counter(
        "container_pressure_cpu_stalled_seconds_total",
        "Time in which all tasks waited for a processor, in seconds.",
        |s| stalled(s.group.cpu.as_ref().and_then(|cpu| cpu.pressure.as_ref()), true),
    ),
    counter(
        "container_pressure_memory_waiting_seconds_total",
        "Time in which a task waited for memory, in seconds.",
        |s| stalled(s.group.memory.as_ref().and_then(|memory| memory.pressure.as_ref()), false),
    ),
    counter(
        "container_pressure_memory_stalled_seconds_total",
        "Time in which all tasks waited for memory, in seconds.",
        |s| stalled(s.group.memory.as_ref().and_then(|memory| memory.pressure.as_ref()), true),
    ),
    counter(
        "container_pressure_io_waiting_seconds_total",
        "Time in which a task waited for a disk, in seconds.",
        |s| stalled(s.group.io.as_ref().and_then(|io| io.pressure.as_ref()), false),
    ),
    counter(
        "container_pressure_io_stalled_seconds_total",
        "Time in which all tasks waited for a disk, in seconds.",
        |s| stalled(s.group.io.as_ref().and_then(|io| io.pressure.as_ref()), true),
    ),
    counter("container_network_receive_bytes_total", "Bytes received.", |s| s.traffic(false, |t| t.bytes))
        .by(INTERFACE),
    counter("container_network_receive_packets_total", "Packets received.", |s| s.traffic(false, |t| t.packets))
        .by(INTERFACE),
    counter("container_network_receive_errors_total", "Errors while receiving.", |s| s.traffic(false, |t| t.errors))
        .by(INTERFACE),
    counter("container_network_receive_packets_dropped_total", "Received packets that were dropped.", |s| {
        s.traffic(false, |t| t.dropped)
    })
    .by(INTERFACE),
    counter("container_network_transmit_bytes_total", "Bytes sent.", |s| s.traffic(true, |t| t.bytes)).by(INTERFACE),
    counter("container_network_transmit_packets_total", "Packets sent.", |s| s.traffic(true, |t| t.packets))
        .by(INTERFACE),
    counter("container_network_transmit_errors_total", "Errors while sending.", |s| s.traffic(true, |t| t.errors))
        .by(INTERFACE),
    counter("container_network_transmit_packets_dropped_total", "Packets that were dropped instead of sent.", |s| {
        s.traffic(true, |t| t.dropped)
    })
    .by(INTERFACE),
    gauge("container_fs_usage_bytes", "What the container has written takes, in bytes.", |s| {
        let layer = s.container.and_then(|container| container.usage.writable_layer);
        labelled(SCRATCH, layer.map(|layer| layer.bytes))
    })
    .by(DEVICE),
    gauge("container_fs_limit_bytes", "Size of the pod's writable disk, in bytes.", |s| s.scratch(|f| f.total_bytes))
        .by(DEVICE),
    gauge("container_fs_inodes_total", "Inodes of the pod's writable disk.", |s| s.scratch(|f| f.total_inodes))
        .by(DEVICE),
    gauge("container_fs_inodes_free", "Inodes left on the pod's writable disk.", |s| s.scratch(|f| f.free_inodes))
        .by(DEVICE),
    counter("container_fs_reads_total", "Reads from disks.", |s| s.devices(|d| d.reads)).by(DEVICE),
    counter("container_fs_reads_bytes_total", "Bytes read from disks.", |s| s.devices(|d| d.read_bytes)).by(DEVICE),
    counter("container_fs_writes_total", "Writes to disks.", |s| s.devices(|d| d.writes)).by(DEVICE),
    counter("container_fs_writes_bytes_total", "Bytes written to disks.", |s| s.devices(|d| d.written_bytes))
        .by(DEVICE),
    counter("container_blkio_device_usage_total", "Bytes read from and written to disks.", |s| {
        let of = |device: &DeviceUsage| {
            [("read", device.read_bytes), ("write", device.written_bytes)].map(|(operation, value)| Value {
                labels: vec![name(device), device.major.to_string(), device.minor.to_string(), operation.into()],
                value,
            })
        };
        s.io().flat_map(of).collect()
    })
    .by(&["device", "major", "minor", "operation"]),
    gauge("container_processes", "Processes that run.", |s| s.processes(|p| Some(p.processes))),
    gauge("container_threads", "Threads that run.", |s| s.pids(|p| p.current)),
    gauge("container_threads_max", "Most threads there may be; 0 for no limit.", |s| s.pids(|p| p.limit)),
    gauge("container_file_descriptors", "Open files, sockets included.", |s| s.processes(|p| Some(p.open_files))),
    gauge("container_sockets", "Open sockets.", |s| s.processes(|p| Some(p.sockets))),
    gauge("container_ulimits_soft", "Soft limits of the container's own process.", |s| {
        labelled("max_open_files", s.container.and_then(|container| container.usage.processes?.open_files_limit))
    })
    .by(&["ulimit"]),
    gauge("container_spec_cpu_period", "Period of the quota of processor time, in microseconds.", |s| {
        s.spec(|r| Some(if r.cpu_period == 0 { PERIOD } else { r.cpu_period }))
    }),
    gauge("container_spec_cpu_quota", "Processor time in each period, in microseconds.", |s| {
        s.spec(|r| Some(r.cpu_quota).filter(|quota| *quota > 0))
    }),
    gauge("container_spec_cpu_shares", "Weight in the distribution of processor time.", |s| {
        s.spec(|r| Some(if r.cpu_shares == 0 { SHARES } else { r.cpu_shares }))
    }),
    gauge("container_spec_memory_limit_bytes", "Memory limit in bytes; 0 for none.", |s| {
        s.spec(|r| Some(r.memory_limit))
    }),
    gauge("container_spec_memory_swap_limit_bytes", "Limit of memory and swap together in bytes; 0 for none.", |s| {
        s.spec(|r| Some(r.memory_swap_limit))
    }),
    gauge(
        "container_spec_memory_reservation_limit_bytes",
        "Memory that is not taken for others, in bytes; 0 for none.",
        |s| {
            s.spec(|r| {
                let kept = r.unified.get("memory.min").or_else(|| r.unified.get("memory.low"));
                Some(kept.and_then(|kept| kept.parse().ok()).unwrap_or(0))
            })
        },
    ),
    gauge("container_start_time_seconds", "When it was started, in seconds since the Unix epoch.", |s| {
        let started = s.container.map_or(s.pod.status.created_at, |container| container.status.started_at);
        one(u64::try_from(started / 1_000_000_000).ok())
    }),
    gauge("container_last_seen", "When the figures were read, in seconds since the Unix epoch.", |s| {
        one(u64::try_from(s.pod.at / 1_000_000_000).ok())
    }),
];

const INTERFACE: &[&str] = &["interface"];
const DEVICE: &[&str] = &["device"];
