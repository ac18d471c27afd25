//! Limits: `linux.resources` as files of the unified hierarchy.
//!
//! The agent writes them itself, for a container that is built and for one that lives
//! alike, so that both mean the same. What the kernel does not take is an error that names
//! the file: no limit is dropped.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use libcontainer::oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};
use nacelle_proto::cpu::weight;

use crate::error::{Error, Result};

const FIELD: &str = "linux.resources";

/// A file of the group, and what to write to it.
type Setting = (String, String);

/// Writes what `resources` names to the control group; the rest stays as it is.
pub fn apply(group: &Path, resources: &LinuxResources) -> Result<()> {
    let read = |file: &str| fs::read_to_string(group.join(file)).ok();
    for (file, value) in settings(resources, &read)? {
        let path = group.join(&file);
        match fs::OpenOptions::new().write(true).open(&path).and_then(|mut open| {
            use std::io::Write;
            open.write_all(value.as_bytes())
        }) {
            Ok(()) => {}
            // No pages of this size are no more than none.
            Err(error) if error.kind() == ErrorKind::NotFound && file.starts_with("hugetlb.") && value == "0" => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(Error::invalid(FIELD, format!("the guest's kernel has no {file}")));
            }
            Err(error) => return Err(Error::invalid(FIELD, format!("{file} cannot be set to {value:?}: {error}"))),
        }
    }
    Ok(())
}

/// Refuses less memory than the container cannot be without: the kernel would not refuse,
/// it would kill.
pub fn check_memory(group: &Path, resources: &LinuxResources) -> Result<()> {
    let limit = resources.memory().as_ref().and_then(LinuxMemory::limit).and_then(|limit| u64::try_from(limit).ok());
    let Some(limit) = limit.filter(|limit| *limit > 0) else { return Ok(()) };
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let field = |name: &str| {
        let line = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let held = field("anon").saturating_add(field("shmem")).saturating_add(field("unevictable"));
    if held > limit {
        return Err(Error::State(format!(
            "the container holds {held} bytes of memory that cannot be taken from it, more than the new limit of {limit}"
        )));
    }
    Ok(())
}

fn settings(resources: &LinuxResources, read: &impl Fn(&str) -> Option<String>) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    let mut set = |file: &str, value: String| settings.push((file.to_owned(), value));
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, read, &mut set);
    }
    if let Some(memory) = resources.memory() {
        memory_settings(memory, read, &mut set)?;
    }
    if let Some(pids) = resources.pids() {
        match pids.limit() {
            0 => {}
            limit => set("pids.max", or_max(limit)),
        }
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let bytes = limit.limit().to_string();
        set(&format!("hugetlb.{}.max", limit.page_size()), bytes.clone());
        set(&format!("hugetlb.{}.rsvd.max", limit.page_size()), bytes);
    }
    // Last: who names a file means it.
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        if file.contains('/') || file.starts_with("cgroup.") || !file.contains('.') {
            return Err(Error::invalid(FIELD, format!("unified: {file:?} is not a controller's file")));
        }
        set(file, value.clone());
    }
    Ok(settings)
}

fn cpu_settings(cpu: &LinuxCpu, read: &impl Fn(&str) -> Option<String>, set: &mut impl FnMut(&str, String)) {
    if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
        set("cpu.weight", weight(shares).to_string());
    }
    let quota = cpu.quota().filter(|quota| *quota != 0).map(or_max);
    let period = cpu.period().filter(|period| *period > 0);
    match (quota, period) {
        (None, None) => {}
        // The kernel keeps the period it has.
        (Some(quota), None) => set("cpu.max", quota),
        (quota, Some(period)) => {
            let before = || read("cpu.max").and_then(|text| text.split_whitespace().next().map(str::to_owned));
            let quota = quota.or_else(before).unwrap_or_else(|| "max".into());
            set("cpu.max", format!("{quota} {period}"));
        }
    }
    if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
        set("cpuset.cpus", cpus.clone());
    }
    if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
        set("cpuset.mems", mems.clone());
    }
    if let Some(idle) = cpu.idle() {
        set("cpu.idle", idle.to_string());
    }
}

fn memory_settings(
    memory: &LinuxMemory,
    read: &impl Fn(&str) -> Option<String>,
    set: &mut impl FnMut(&str, String),
) -> Result<()> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    match memory.swap().filter(|swap| *swap != 0) {
        None => {}
        Some(both) if both < 0 => set("memory.swap.max", "max".into()),
        Some(both) => {
            // cgroup v2 counts swap alone, the specification counts both.
            let before = || read("memory.max").and_then(|text| text.trim().parse::<i64>().ok());
            let alone = match limit.filter(|limit| *limit > 0).or_else(before) {
                Some(limit) if limit <= both => both - limit,
                Some(limit) => {
                    let problem = format!("memory and swap of {both} bytes are less than the memory limit of {limit}");
                    return Err(Error::invalid(FIELD, problem));
                }
                None => return Err(Error::invalid(FIELD, "a limit of memory and swap needs a memory limit")),
            };
            set("memory.swap.max", alone.to_string());
        }
    }
    if let Some(limit) = limit {
        set("memory.max", or_max(limit));
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation > 0) {
        set("memory.low", reservation.to_string());
    }
    Ok(())
}

/// A negative limit is none.
fn or_max(limit: i64) -> String {
    if limit < 0 { "max".into() } else { limit.to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings_of(json: serde_json::Value, before: &[(&str, &str)]) -> Result<Vec<(String, String)>> {
        let resources: LinuxResources = serde_json::from_value(json).unwrap();
        let read = |file: &str| before.iter().find(|(name, _)| *name == file).map(|(_, text)| (*text).to_owned());
        settings(&resources, &read)
    }

    fn pairs(settings: &[(String, String)]) -> Vec<(&str, &str)> {
        settings.iter().map(|(file, value)| (file.as_str(), value.as_str())).collect()
    }

    #[test]
    fn every_limit_has_its_file() {
        let all = json!({
            "cpu": {"shares": 1024, "quota": 50000, "period": 100_000, "cpus": "0", "mems": "0"},
            "memory": {"limit": 1000, "swap": 1500},
            "pids": {"limit": 7},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}],
            "unified": {"memory.high": "900", "io.max": "8:0 rbps=1"},
        });
        let settings = settings_of(all, &[]).unwrap();
        assert_eq!(
            pairs(&settings),
            [
                ("cpu.weight", "100"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0"),
                ("cpuset.mems", "0"),
                ("memory.swap.max", "500"),
                ("memory.max", "1000"),
                ("pids.max", "7"),
                ("hugetlb.2MB.max", "4194304"),
                ("hugetlb.2MB.rsvd.max", "4194304"),
                ("io.max", "8:0 rbps=1"),
                ("memory.high", "900"),
            ]
        );
        assert!(settings_of(json!({}), &[]).unwrap().is_empty());
    }

    #[test]
    fn a_change_is_completed_by_what_is_there() {
        let before = [("cpu.max", "5000 100000\n"), ("memory.max", "1000\n")];
        assert_eq!(
            pairs(&settings_of(json!({"cpu": {"period": 50000}, "memory": {"swap": 1200}}), &before).unwrap()),
            [("cpu.max", "5000 50000"), ("memory.swap.max", "200")]
        );
        let unlimited = json!({"cpu": {"quota": -1}, "memory": {"limit": -1, "swap": -1}});
        assert_eq!(
            pairs(&settings_of(unlimited, &before).unwrap()),
            [("cpu.max", "max"), ("memory.swap.max", "max"), ("memory.max", "max")]
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            json!({"memory": {"limit": 1000, "swap": 900}}),
            json!({"memory": {"swap": 900}}),
            json!({"unified": {"cgroup.procs": "1"}}),
            json!({"unified": {"../memory.max": "1"}}),
            json!({"unified": {"x": "1"}}),
        ] {
            assert!(matches!(settings_of(bad, &[]), Err(Error::Invalid { .. })));
        }
    }

    #[test]
    fn a_limit_that_cannot_be_written_is_named() {
        let group = tempfile::tempdir().unwrap();
        let resources: LinuxResources = serde_json::from_value(json!({"pids": {"limit": 7}})).unwrap();
        let error = apply(group.path(), &resources).unwrap_err().to_string();
        assert!(error.contains("pids.max"), "{error}");
        fs::write(group.path().join("pids.max"), "").unwrap();
        apply(group.path(), &resources).unwrap();
        assert_eq!(fs::read_to_string(group.path().join("pids.max")).unwrap(), "7");
        let none = json!({"hugepageLimits": [{"pageSize": "1GB", "limit": 0}]});
        apply(group.path(), &serde_json::from_value(none).unwrap()).expect("no pages of a size that is not there");
        let some = json!({"hugepageLimits": [{"pageSize": "1GB", "limit": 1}]});
        assert!(apply(group.path(), &serde_json::from_value(some).unwrap()).is_err());
    }

    #[test]
    fn memory_in_use_is_not_taken_away() {
        let group = tempfile::tempdir().unwrap();
        fs::write(group.path().join("memory.stat"), "anon 500\nfile 9000\nshmem 100\n").unwrap();
        let check = |limit: i64| {
            let resources = serde_json::from_value(json!({"memory": {"limit": limit}})).unwrap();
            check_memory(group.path(), &resources)
        };
        assert!(matches!(check(599), Err(Error::State(_))));
        check(600).unwrap();
        check(-1).unwrap();
    }
}
