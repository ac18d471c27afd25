//! Limits of the container, as the guest's cgroup gets them.

use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxHugepageLimitBuilder,
    LinuxMemoryBuilder, LinuxResources, LinuxResourcesBuilder,
};

use super::internal;
use crate::model::Resources;
use crate::{Error, Result};

/// Devices an ordinary container may use: major and minor, none for all.
const DEVICES: &[(i64, Option<i64>)] = &[
    (1, Some(3)), // null
    (1, Some(5)), // zero
    (1, Some(7)), // full
    (1, Some(8)), // random
    (1, Some(9)), // urandom
    (5, Some(0)), // tty
    (5, Some(2)), // ptmx
    (136, None),  // pts
];

/// Builds the limits.
pub fn build(asked: &Resources, privileged: bool) -> Result<LinuxResources> {
    let mut cpu = LinuxCpuBuilder::default();
    if asked.cpu_shares > 0 {
        cpu = cpu.shares(asked.cpu_shares.unsigned_abs());
    }
    if asked.cpu_period > 0 {
        cpu = cpu.period(asked.cpu_period.unsigned_abs());
    }
    if asked.cpu_quota != 0 {
        cpu = cpu.quota(asked.cpu_quota);
    }
    // cpuset_cpus and cpuset_mems name the host's, which are for the VMM's cgroup.
    let mut memory = LinuxMemoryBuilder::default();
    if asked.memory_limit < 0 || asked.memory_swap_limit < -1 {
        return Err(Error::Invalid(format!("memory limit {} bytes must not be negative", asked.memory_limit)));
    }
    if asked.memory_limit > 0 {
        memory = memory.limit(asked.memory_limit);
    }
    if asked.memory_swap_limit != 0 {
        memory = memory.swap(asked.memory_swap_limit);
    }
    let hugepages = asked
        .hugepages
        .iter()
        .map(|(size, limit)| {
            let limit = i64::try_from(*limit).unwrap_or(i64::MAX);
            LinuxHugepageLimitBuilder::default().page_size(size.clone()).limit(limit).build().map_err(internal)
        })
        .collect::<Result<Vec<_>>>()?;
    let mut resources = LinuxResourcesBuilder::default()
        .cpu(cpu.build().map_err(internal)?)
        .memory(memory.build().map_err(internal)?)
        .devices(devices(privileged)?);
    if !hugepages.is_empty() {
        resources = resources.hugepage_limits(hugepages);
    }
    if !asked.unified.is_empty() {
        resources = resources.unified(asked.unified.clone().into_iter().collect::<std::collections::HashMap<_, _>>());
    }
    resources.build().map_err(internal)
}

fn devices(privileged: bool) -> Result<Vec<LinuxDeviceCgroup>> {
    let all = |allow: bool| {
        LinuxDeviceCgroupBuilder::default().allow(allow).typ(LinuxDeviceType::A).access("rwm").build().map_err(internal)
    };
    if privileged {
        return Ok(vec![all(true)?]);
    }
    let mut rules = vec![all(false)?];
    for (major, minor) in DEVICES {
        let mut rule =
            LinuxDeviceCgroupBuilder::default().allow(true).typ(LinuxDeviceType::C).major(*major).access("rwm");
        if let Some(minor) = minor {
            rule = rule.minor(*minor);
        }
        rules.push(rule.build().map_err(internal)?);
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_of_the_host_are_not_the_guest_s() {
        let asked = Resources {
            cpu_quota: 5000,
            cpuset_cpus: "12-15,63".into(),
            cpuset_mems: "1".into(),
            ..Resources::default()
        };
        let limits = build(&asked, false).unwrap();
        let cpu = limits.cpu().as_ref().unwrap();
        assert_eq!((cpu.quota(), cpu.cpus(), cpu.mems()), (Some(5000), &None, &None));
    }
}
