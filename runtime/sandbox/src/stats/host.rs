//! What a pod takes from the host: its control group's figures, or where the host keeps
//! none, its VMM's.

use std::fs;
use std::sync::LazyLock;
use std::time::Instant;

use nacelle_proto::agent::v1::{CpuUsage, GroupUsage, MemoryUsage};

use crate::cgroup::Cgroup;

/// Ticks a second in /proc; the same for every program on x86 (time(7), USER_HZ).
const TICKS: u64 = 100;
/// What a clock counts from.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Reads both. Blocks.
pub fn usage(cgroup: &Cgroup, vmm: Option<u32>) -> GroupUsage {
    let now = u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let group = cgroup.usage(now);
    let process = || vmm.map(process_usage).unwrap_or_default();
    // Controllers that the host does not hand down, or no cgroup at all.
    if group.cpu.is_some() && group.memory.is_some() {
        return group;
    }
    let process = process();
    GroupUsage { read_at: now, cpu: group.cpu.or(process.cpu), memory: group.memory.or(process.memory), ..group }
}

fn process_usage(pid: u32) -> GroupUsage {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let stat = read("stat");
    // The command name may contain anything, so count from its closing parenthesis: the next
    // field is the third (proc(5)).
    let fields: Vec<_> =
        stat.rsplit_once(')').map(|(_, rest)| rest.split_ascii_whitespace().collect()).unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).and_then(|field| field.parse::<u64>().ok());
    let microseconds = |ticks: u64| ticks.saturating_mul(1_000_000 / TICKS);
    let cpu = field(14).zip(field(15)).map(|(user, system)| CpuUsage {
        usage: microseconds(user.saturating_add(system)),
        user: microseconds(user),
        system: microseconds(system),
        ..CpuUsage::default()
    });
    let status = read("status");
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_ascii_whitespace().next()?.parse::<u64>().ok().map(|kib| kib.saturating_mul(1024))
    };
    let memory = kib("VmRSS").map(|resident| MemoryUsage {
        usage: resident,
        peak: kib("VmHWM").unwrap_or(0),
        anonymous: kib("RssAnon").unwrap_or(0).saturating_add(kib("RssShmem").unwrap_or(0)),
        file: kib("RssFile").unwrap_or(0),
        swap: kib("VmSwap").unwrap_or(0),
        page_faults: field(10).unwrap_or(0),
        major_page_faults: field(12).unwrap_or(0),
        ..MemoryUsage::default()
    });
    GroupUsage { cpu, memory, ..GroupUsage::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_a_group_is_read_by_itself() {
        let held = vec![1u8; 8 << 20];
        let nowhere = Cgroup::named("/no/such/parent", "ab").unwrap();
        let usage = usage(&nowhere, Some(std::process::id()));
        let memory = usage.memory.unwrap();
        assert!(memory.usage > 8 << 20 && memory.anonymous > 8 << 20 && memory.page_faults > 0, "{memory:?}");
        assert!(usage.cpu.is_some() && usage.read_at > 0);
        drop(held);
        assert_eq!(super::usage(&nowhere, Some(u32::MAX)).memory, None);
        assert_eq!(super::usage(&nowhere, None).cpu, None);
    }
}
