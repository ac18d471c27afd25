//! What pods and containers use, in the CRI's words.

use std::path::Path;

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{
    ContainerStats, CpuUsage, GroupUsage, InterfaceUsage, IoUsage, MemoryUsage, Pressure, SandboxStats, Stall,
};

use crate::{container, sandbox};

/// A container, which is in `pod`.
pub fn container(stats: &ContainerStats, pod: &SandboxStats) -> cri::ContainerStats {
    let (status, group) = (&stats.status, stats.usage.group.clone().unwrap_or_default());
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: status.id.clone(),
            metadata: Some(container::metadata(&status.config)),
            labels: status.config.labels.clone().into_iter().collect(),
            annotations: status.config.annotations.clone().into_iter().collect(),
        }),
        cpu: group.cpu.as_ref().map(|usage| cpu(usage, stats.nano_cores, pod.at)),
        memory: group.memory.as_ref().map(|usage| memory(usage, pod.at)),
        writable_layer: (stats.usage.writable_layer)
            .map(|usage| filesystem(&pod.directory, usage.bytes, usage.inodes, pod.at)),
        swap: group.memory.as_ref().map(|usage| cri::SwapUsage {
            timestamp: pod.at,
            swap_available_bytes: usage.swap_limit.map(|limit| value(limit.saturating_sub(usage.swap))),
            swap_usage_bytes: some(usage.swap),
        }),
        io: group.io.as_ref().map(|usage| io(usage, pod.at)),
    }
}

/// A pod with its containers.
pub fn pod(stats: &SandboxStats) -> cri::PodSandboxStats {
    let (status, GroupUsage { cpu: used, memory: held, io: moved, .. }) = (&stats.status, &stats.host);
    let processes = stats.guest.pids.as_ref();
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: status.id.clone(),
            metadata: Some(sandbox::metadata(&status.config)),
            labels: status.config.labels.clone().into_iter().collect(),
            annotations: status.config.annotations.clone().into_iter().collect(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: used.as_ref().map(|usage| cpu(usage, stats.nano_cores, stats.at)),
            memory: held.as_ref().map(|usage| memory(usage, stats.at)),
            network: Some(network(&stats.interfaces, stats.at)),
            process: processes.map(|pids| cri::ProcessUsage { timestamp: stats.at, process_count: some(pids.current) }),
            containers: stats.containers.iter().map(|found| container(found, stats)).collect(),
            io: moved.as_ref().map(|usage| io(usage, stats.at)),
        }),
        windows: None,
    }
}

/// Memory in use less what can be given up without harm, in bytes.
pub fn working_set(usage: &MemoryUsage) -> u64 {
    usage.usage.saturating_sub(usage.inactive_file)
}

fn cpu(usage: &CpuUsage, nano_cores: Option<u64>, timestamp: i64) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp,
        usage_core_nano_seconds: some(usage.usage.saturating_mul(1000)),
        usage_nano_cores: nano_cores.map(value),
        psi: usage.pressure.as_ref().map(pressure),
    }
}

fn memory(usage: &MemoryUsage, timestamp: i64) -> cri::MemoryUsage {
    let working_set = working_set(usage);
    cri::MemoryUsage {
        timestamp,
        working_set_bytes: some(working_set),
        available_bytes: (usage.limit > 0).then(|| value(usage.limit.saturating_sub(working_set))),
        usage_bytes: some(usage.usage),
        rss_bytes: some(usage.anonymous),
        page_faults: some(usage.page_faults),
        major_page_faults: some(usage.major_page_faults),
        psi: usage.pressure.as_ref().map(pressure),
    }
}

fn io(usage: &IoUsage, timestamp: i64) -> cri::IoUsage {
    cri::IoUsage { timestamp, psi: usage.pressure.as_ref().map(pressure) }
}

/// What something takes of the file system that `directory` lies on.
pub fn filesystem(directory: &Path, bytes: u64, inodes: u64, timestamp: i64) -> cri::FilesystemUsage {
    cri::FilesystemUsage {
        timestamp,
        fs_id: Some(cri::FilesystemIdentifier { mountpoint: directory.to_string_lossy().into_owned() }),
        used_bytes: some(bytes),
        inodes_used: some(inodes),
    }
}

/// The first interface is the one that the pod is reached by.
fn network(interfaces: &[InterfaceUsage], timestamp: i64) -> cri::NetworkUsage {
    let mut interfaces = interfaces.iter().map(interface);
    cri::NetworkUsage { timestamp, default_interface: interfaces.next(), interfaces: interfaces.collect() }
}

fn interface(usage: &InterfaceUsage) -> cri::NetworkInterfaceUsage {
    let (received, sent) = (usage.received.unwrap_or_default(), usage.sent.unwrap_or_default());
    cri::NetworkInterfaceUsage {
        name: usage.name.clone(),
        rx_bytes: some(received.bytes),
        rx_errors: some(received.errors),
        tx_bytes: some(sent.bytes),
        tx_errors: some(sent.errors),
    }
}

fn pressure(pressure: &Pressure) -> cri::PsiStats {
    let stall = |stall: &Stall| cri::PsiData {
        total: stall.total.saturating_mul(1000),
        avg10: stall.avg10,
        avg60: stall.avg60,
        avg300: stall.avg300,
    };
    cri::PsiStats { full: pressure.full.as_ref().map(stall), some: pressure.some.as_ref().map(stall) }
}

fn value(value: u64) -> cri::UInt64Value {
    cri::UInt64Value { value }
}

fn some(number: u64) -> Option<cri::UInt64Value> {
    Some(value(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_the_interfaces_and_a_limit_leaves_what_is_not_in_the_working_set() {
        let stall = Stall { total: 7, avg10: 1.5, ..Stall::default() };
        let usage =
            CpuUsage { usage: 5, pressure: Some(Pressure { some: Some(stall), full: None }), ..CpuUsage::default() };
        let found = cpu(&usage, Some(9), 3);
        assert_eq!((found.timestamp, found.usage_core_nano_seconds, found.usage_nano_cores), (3, some(5000), some(9)));
        let psi = found.psi.unwrap();
        assert_eq!((psi.some.unwrap().total, psi.full), (7000, None));

        let usage = MemoryUsage { usage: 100, inactive_file: 30, limit: 90, anonymous: 50, ..MemoryUsage::default() };
        let found = memory(&usage, 3);
        assert_eq!((found.working_set_bytes, found.available_bytes, found.rss_bytes), (some(70), some(20), some(50)));
        let open = memory(&MemoryUsage { limit: 0, ..usage }, 3);
        assert_eq!(open.available_bytes, None, "there is no limit");
        // Whatever a guest says.
        let nonsense = MemoryUsage { usage: 1, inactive_file: u64::MAX, limit: 1, ..MemoryUsage::default() };
        assert_eq!(memory(&nonsense, 3).working_set_bytes, some(0));
        assert_eq!(
            cpu(&CpuUsage { usage: u64::MAX, ..CpuUsage::default() }, None, 1).usage_core_nano_seconds,
            some(u64::MAX)
        );
    }

    #[test]
    fn the_first_interface_is_the_pods() {
        let interface = |name: &str| InterfaceUsage { name: name.into(), ..InterfaceUsage::default() };
        let found = network(&[interface("eth0"), interface("net1")], 1);
        assert_eq!(found.default_interface.unwrap().name, "eth0");
        assert_eq!(found.interfaces.len(), 1);
        assert_eq!(network(&[], 1).default_interface, None);
    }
}
