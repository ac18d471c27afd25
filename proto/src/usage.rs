//! What a control group uses: the files of cgroup v2 (Linux, `admin-guide/cgroup-v2.rst`),
//! read into [`GroupUsage`].
//!
//! The agent reads the containers' groups, the daemon the pod's on the host. A file that is
//! missing means that its controller is not there; a line that makes no sense counts as not
//! there. Nothing here fails.

use std::fs;
use std::path::Path;

use crate::agent::v1::{
    CpuUsage, DeviceUsage, GroupUsage, HugePageUsage, IoUsage, MemoryUsage, PidsUsage, Pressure, Stall,
};

/// Sizes of huge pages that x86 has, as the kernel names them.
const HUGE_PAGES: [&str; 2] = ["2MB", "1GB"];
/// Most devices of one group: as many as a guest's bus holds, with partitions.
const DEVICE_LIMIT: usize = 128;

/// Reads a group. `now` is the reader's monotonic clock in nanoseconds.
#[must_use]
pub fn read(group: &Path, now: u64) -> GroupUsage {
    let text = |file: &str| fs::read_to_string(group.join(file)).ok();
    let pressure = |file: &str| text(file).and_then(|text| pressure(&text));
    GroupUsage {
        read_at: now,
        cpu: text("cpu.stat").map(|stat| CpuUsage { pressure: pressure("cpu.pressure"), ..cpu(&stat) }),
        memory: text("memory.current").map(|current| MemoryUsage {
            usage: number(&current).unwrap_or(0),
            peak: text("memory.peak").and_then(|peak| number(&peak)).unwrap_or(0),
            limit: text("memory.max").and_then(|limit| number(&limit)).unwrap_or(0),
            swap: text("memory.swap.current").and_then(|swap| number(&swap)).unwrap_or(0),
            swap_limit: text("memory.swap.max").and_then(|limit| number(&limit)),
            limit_hits: text("memory.events").map_or(0, |events| field(&events, "max")),
            oom_kills: text("memory.events").map_or(0, |events| field(&events, "oom_kill")),
            pressure: pressure("memory.pressure"),
            ..memory(&text("memory.stat").unwrap_or_default())
        }),
        // The file may be empty: nothing was read or written yet.
        io: text("io.stat").map(|stat| IoUsage { devices: devices(&stat), pressure: pressure("io.pressure") }),
        pids: text("pids.current").map(|current| PidsUsage {
            current: number(&current).unwrap_or(0),
            limit: text("pids.max").and_then(|limit| number(&limit)).unwrap_or(0),
        }),
        hugepages: HUGE_PAGES
            .into_iter()
            .filter_map(|size| {
                let bytes = number(&text(&format!("hugetlb.{size}.current"))?)?;
                Some(HugePageUsage { size: size.to_owned(), bytes })
            })
            .collect(),
    }
}

/// A file with one number; none for `max`.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The value of a `name value` line, 0 if there is none.
fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(number).unwrap_or(0)
}

fn cpu(stat: &str) -> CpuUsage {
    CpuUsage {
        usage: field(stat, "usage_usec"),
        user: field(stat, "user_usec"),
        system: field(stat, "system_usec"),
        periods: field(stat, "nr_periods"),
        throttled_periods: field(stat, "nr_throttled"),
        throttled: field(stat, "throttled_usec"),
        pressure: None,
    }
}

fn memory(stat: &str) -> MemoryUsage {
    MemoryUsage {
        anonymous: field(stat, "anon"),
        file: field(stat, "file"),
        file_mapped: field(stat, "file_mapped"),
        inactive_file: field(stat, "inactive_file"),
        kernel: field(stat, "kernel"),
        page_faults: field(stat, "pgfault"),
        major_page_faults: field(stat, "pgmajfault"),
        ..MemoryUsage::default()
    }
}

/// Lines like `254:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`.
fn devices(stat: &str) -> Vec<DeviceUsage> {
    let device = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut device = DeviceUsage { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let Some(value) = number(value) else { continue };
            match key {
                "rbytes" => device.read_bytes = value,
                "wbytes" => device.written_bytes = value,
                "rios" => device.reads = value,
                "wios" => device.writes = value,
                _ => {}
            }
        }
        Some(device)
    };
    stat.lines().filter_map(device).take(DEVICE_LIMIT).collect()
}

/// Lines like `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`. None where the kernel counts
/// no pressure.
fn pressure(text: &str) -> Option<Pressure> {
    let stall = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        let mut stall = Stall::default();
        for (key, value) in line.split_ascii_whitespace().filter_map(|word| word.split_once('=')) {
            let average = || value.parse().ok().filter(|average: &f64| average.is_finite()).unwrap_or(0.0);
            match key {
                "avg10" => stall.avg10 = average(),
                "avg60" => stall.avg60 = average(),
                "avg300" => stall.avg300 = average(),
                "total" => stall.total = number(value).unwrap_or(0),
                _ => {}
            }
        }
        Some(stall)
    };
    let pressure = Pressure { some: stall("some"), full: stall("full") };
    pressure.some.is_some().then_some(pressure)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (file, content) in files {
            fs::write(directory.path().join(file), content).unwrap();
        }
        directory
    }

    #[test]
    fn a_group_is_read_with_all_its_controllers() {
        let group = group(&[
            (
                "cpu.stat",
                "usage_usec 7000\nuser_usec 5000\nsystem_usec 2000\nnr_periods 9\nnr_throttled 3\nthrottled_usec 11\n",
            ),
            ("cpu.pressure", "some avg10=1.50 avg60=0.20 avg300=0.00 total=42\n"),
            ("memory.current", "31457280\n"),
            ("memory.peak", "41943040\n"),
            ("memory.max", "67108864\n"),
            ("memory.swap.current", "4096\n"),
            ("memory.swap.max", "0\n"),
            ("memory.events", "low 0\nhigh 0\nmax 4\noom 2\noom_kill 1\n"),
            (
                "memory.stat",
                "anon 20971520\nfile 8388608\nkernel 1048576\nfile_mapped 4096\ninactive_file 2097152\npgfault 77\npgmajfault 5\n",
            ),
            (
                "memory.pressure",
                "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=2\n",
            ),
            ("io.stat", "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\nnonsense\n259:1 \n"),
            ("pids.current", "12\n"),
            ("pids.max", "max\n"),
            ("hugetlb.2MB.current", "2097152\n"),
        ]);
        let usage = read(group.path(), 5);
        assert_eq!(usage.read_at, 5);
        let cpu = usage.cpu.unwrap();
        assert_eq!((cpu.usage, cpu.user, cpu.system), (7000, 5000, 2000));
        assert_eq!((cpu.periods, cpu.throttled_periods, cpu.throttled), (9, 3, 11));
        let pressure = cpu.pressure.unwrap();
        assert_eq!(pressure.some.unwrap(), Stall { total: 42, avg10: 1.5, avg60: 0.2, avg300: 0.0 });
        assert_eq!(pressure.full, None, "there is no line of that name");
        let memory = usage.memory.unwrap();
        assert_eq!((memory.usage, memory.peak, memory.limit), (30 << 20, 40 << 20, 64 << 20));
        assert_eq!((memory.anonymous, memory.file, memory.inactive_file), (20 << 20, 8 << 20, 2 << 20));
        assert_eq!((memory.file_mapped, memory.kernel), (4096, 1 << 20), "not the line that begins the same");
        assert_eq!((memory.swap, memory.swap_limit), (4096, Some(0)));
        assert_eq!((memory.page_faults, memory.major_page_faults), (77, 5));
        assert_eq!((memory.limit_hits, memory.oom_kills), (4, 1));
        assert_eq!(memory.pressure.unwrap().full.unwrap().total, 2);
        let io = usage.io.unwrap();
        assert_eq!(io.devices.len(), 2);
        let device = &io.devices[0];
        assert_eq!((device.major, device.minor), (254, 0));
        assert_eq!((device.read_bytes, device.written_bytes, device.reads, device.writes), (4096, 8192, 1, 2));
        assert_eq!(usage.pids.unwrap(), PidsUsage { current: 12, limit: 0 });
        assert_eq!(usage.hugepages, [HugePageUsage { size: "2MB".into(), bytes: 2 << 20 }]);
    }

    #[test]
    fn what_is_not_there_is_absent_and_nonsense_is_nothing() {
        let group = group(&[("cpu.stat", "usage_usec\nuser_usec x\n"), ("io.pressure", "")]);
        let usage = read(group.path(), 0);
        assert_eq!(usage.cpu, Some(CpuUsage::default()));
        assert_eq!((usage.memory, usage.io, usage.pids), (None, None, None));
        assert_eq!(
            pressure("some avg10=NaN avg60=inf total=-1"),
            Some(Pressure { some: Some(Stall::default()), full: None })
        );
        assert_eq!(read(Path::new("/no/such/group"), 0), GroupUsage::default());
    }
}
