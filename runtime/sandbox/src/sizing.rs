//! How large a guest is: what its pod asks for, and what the guest itself needs.
//!
//! A guest is as large as the sum of its containers' limits, with a base for its kernel and
//! its agent. That sum says nothing of containers without a limit. Whether there are any,
//! the pod's own cgroup tells, which the kubelet limits only if every container has a
//! limit: if it does not, or no limit is known at all, there is room for them, too.

use serde::{Deserialize, Serialize};

use crate::cgroup::Bounds;
use crate::model::{Resources, SandboxConfig};
use crate::{Error, GuestConfig, Result};

/// Shares of cgroup v1 that stand for one processor.
const SHARES_PER_CPU: u64 = 1024;
const MIB: u64 = 1 << 20;

/// Size of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct GuestSize {
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub vcpus: u8,
}

impl GuestSize {
    /// Of the guest for a pod of which nothing is known.
    pub fn without_limits(guest: &GuestConfig) -> Self {
        Self { memory_mib: guest.memory_mib, vcpus: guest.vcpus }
    }

    /// Of the guest for this pod.
    ///
    /// # Errors
    /// It would be larger than the configuration allows.
    pub fn of(pod: &SandboxConfig, guest: &GuestConfig, bounds: Bounds) -> Result<Self> {
        let wanted = &pod.resources;
        let limit = bytes(wanted.memory_limit).saturating_add(hugepages(wanted)).div_ceil(MIB);
        let memory_mib = match (limit, bounds.open_memory) {
            (0, _) => guest.memory_mib,
            (limit, true) => limit.saturating_add(guest.memory_mib),
            (limit, false) => limit.saturating_add(guest.base_mib),
        };
        let most = if guest.max_memory_mib == 0 { host_memory_mib() } else { guest.max_memory_mib };
        if memory_mib > most {
            return Err(Error::Exhausted(format!(
                "the pod's memory limit of {limit} MiB makes a guest of {memory_mib} MiB, the most is {most} MiB: lower \
                 the limit or raise guest.max_memory_mib"
            )));
        }
        // The kubelet turns a request of processor time into shares, a limit into a quota.
        let quota = cpus(wanted);
        let quota = if quota > 0 && bounds.open_cpu { quota.saturating_add(guest.vcpus.into()) } else { quota };
        let request = u64::try_from(wanted.cpu_shares).unwrap_or(0).div_ceil(SHARES_PER_CPU);
        let vcpus = match quota.max(request) {
            0 => guest.vcpus.into(),
            // Without a limit, there is no less than without a request.
            wanted if quota == 0 => wanted.max(guest.vcpus.into()),
            wanted => wanted,
        };
        let vcpus = u8::try_from(vcpus).ok().filter(|vcpus| *vcpus <= guest.max_vcpus).ok_or_else(|| {
            Error::Exhausted(format!(
                "the pod asks for {vcpus} processors, the most is {}: lower its limit or raise guest.max_vcpus",
                guest.max_vcpus
            ))
        })?;
        Ok(Self { memory_mib, vcpus })
    }

    /// Whether containers can be given these limits in a guest of this size.
    ///
    /// # Errors
    /// Which of them is beyond it.
    pub fn check(&self, limits: &Resources) -> Result<()> {
        let memory = bytes(limits.memory_limit);
        if memory > self.memory_mib.saturating_mul(MIB) {
            return Err(Error::Exhausted(format!(
                "a memory limit of {memory} bytes is beyond the pod's guest, which has {} MiB and cannot grow: restart \
                 the pod with this limit",
                self.memory_mib
            )));
        }
        let cpus = cpus(limits);
        if cpus > self.vcpus.into() {
            return Err(Error::Exhausted(format!(
                "a limit of {cpus} processors is beyond the pod's guest, which has {} and cannot grow: restart the pod \
                 with this limit",
                self.vcpus
            )));
        }
        self.check_cpuset(&limits.cpuset_cpus)
    }

    /// Whether the guest has the processors of a list like `0-2,4`.
    ///
    /// # Errors
    /// Which it has not.
    pub fn check_cpuset(&self, list: &str) -> Result<()> {
        let last = list.split([',', '-']).filter_map(|number| number.trim().parse::<u64>().ok()).max();
        match last {
            Some(last) if last >= self.vcpus.into() => Err(Error::Invalid(format!(
                "cpuset_cpus {list:?} names processor {last}, the pod's guest has {} counted from 0: processors of the \
                 host cannot be named in a guest",
                self.vcpus
            ))),
            _ => Ok(()),
        }
    }
}

/// Whole processors that a quota is.
fn cpus(resources: &Resources) -> u64 {
    let period = if resources.cpu_period > 0 { resources.cpu_period } else { 100_000 };
    let quota = u64::try_from(resources.cpu_quota).unwrap_or(0);
    quota.div_ceil(period.unsigned_abs())
}

fn bytes(limit: i64) -> u64 {
    u64::try_from(limit).unwrap_or(0)
}

/// Huge pages come on top of a memory limit.
fn hugepages(resources: &Resources) -> u64 {
    resources.hugepages.iter().fold(0, |sum: u64, (_, limit)| sum.saturating_add(*limit))
}

fn host_memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit.max(1));
    #[allow(clippy::useless_conversion, reason = "the type differs between architectures")]
    let total = u64::try_from(info.totalram).unwrap_or(u64::MAX);
    total.saturating_mul(unit) / MIB
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> GuestConfig {
        GuestConfig {
            memory_mib: 256,
            base_mib: 64,
            max_memory_mib: 4096,
            vcpus: 1,
            max_vcpus: 8,
            ..Default::default()
        }
    }

    fn size(resources: Resources, bounds: Bounds) -> Result<(u64, u8)> {
        let pod = SandboxConfig { resources, ..SandboxConfig::default() };
        GuestSize::of(&pod, &guest(), bounds).map(|size| (size.memory_mib, size.vcpus))
    }

    #[test]
    fn a_pod_gets_what_its_containers_may_use_and_the_guest_needs() {
        let closed = Bounds::default();
        assert_eq!(size(Resources::default(), closed).unwrap(), (256, 1));
        let limits =
            Resources { memory_limit: 512 << 20, cpu_quota: 150_000, cpu_period: 100_000, ..Default::default() };
        assert_eq!(size(limits.clone(), closed).unwrap(), (576, 2));
        let huge = Resources { hugepages: vec![("2Mi".into(), 64 << 20)], ..limits.clone() };
        assert_eq!(size(huge, closed).unwrap().0, 640);
        // A request without a limit, and as little of one as a kubelet sends for none.
        assert_eq!(size(Resources { cpu_shares: 3072, ..Default::default() }, closed).unwrap().1, 3);
        assert_eq!(size(Resources { cpu_shares: 2, ..Default::default() }, closed).unwrap().1, 1);
        assert_eq!(
            size(Resources { cpu_quota: -1, memory_limit: -1, ..Default::default() }, closed).unwrap(),
            (256, 1)
        );
    }

    #[test]
    fn containers_without_a_limit_beside_some_with_one_have_room_too() {
        let open = Bounds { open_memory: true, open_cpu: true, pids: None };
        let limits = Resources { memory_limit: 512 << 20, cpu_quota: 100_000, ..Default::default() };
        assert_eq!(size(limits, open).unwrap(), (768, 2));
        assert_eq!(size(Resources::default(), open).unwrap(), (256, 1));
    }

    #[test]
    fn too_large_a_guest_is_refused_with_the_key_that_allows_it() {
        let memory = Resources { memory_limit: 8 << 30, ..Default::default() };
        let error = size(memory, Bounds::default()).unwrap_err().to_string();
        assert!(error.contains("guest.max_memory_mib") && error.contains("8192 MiB"), "{error}");
        for quota in [900_000, i64::MAX] {
            let cpu = Resources { cpu_quota: quota, ..Default::default() };
            assert!(size(cpu, Bounds::default()).unwrap_err().to_string().contains("guest.max_vcpus"));
        }
    }

    #[test]
    fn a_running_guest_takes_no_limit_beyond_its_size() {
        let size = GuestSize { memory_mib: 256, vcpus: 2 };
        size.check(&Resources {
            memory_limit: 256 << 20,
            cpu_quota: 200_000,
            cpuset_cpus: "0-1".into(),
            ..Default::default()
        })
        .unwrap();
        for beyond in [
            Resources { memory_limit: (256 << 20) + 1, ..Default::default() },
            Resources { cpu_quota: 200_001, ..Default::default() },
            Resources { cpuset_cpus: "0,2".into(), ..Default::default() },
        ] {
            assert!(size.check(&beyond).unwrap_err().to_string().contains("guest"));
        }
    }
}
