//! How large a guest is: what its pod asks for, and what the guest itself needs.
//!
//! A guest is as large as the sum of its containers' limits, with a base for its kernel and
//! its agent, and what its kernel keeps of each page. That sum says nothing of containers without
//! a limit. Whether there are any, the pod's own cgroup tells, which the kubelet limits only if
//! every container has a limit: if it does not, or no limit is known at all, there is room for
//! them, too.
//!
//! Where the cgroup is limited, guest and VMM fit into it ([`memory`]), or else the host's kernel
//! would end the whole pod: the guest is made smaller. First the base is cut, down to what a guest
//! needs; then its containers reach the guest's end before they reach their limits, of which the
//! log tells; and a pod whose containers could not use half of their limits is refused.

mod memory;

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
    /// It would be larger than the configuration allows, or the pod's cgroup on the host is too
    /// small for a guest.
    pub fn of(pod: &SandboxConfig, guest: &GuestConfig, bounds: Bounds) -> Result<Self> {
        let wanted = &pod.resources;
        let memory_mib = memory_mib(pod, guest, bounds)?;
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
                "the pod asks for {vcpus} processors, the most is {}: lower its limit, or raise max_vcpus of its handler or of \
                 guest",
                guest.max_vcpus
            ))
        })?;
        Ok(Self { memory_mib, vcpus })
    }

    /// What the pod's containers cannot have of their limits in a guest of this size, in words.
    pub fn shortage(&self, pod: &SandboxConfig) -> Option<String> {
        let (limit, left) = (limit_mib(&pod.resources), memory::left_in(self.memory_mib));
        (left < limit).then(|| {
            format!(
                "its containers may use {limit} MiB, of which its guest has room for {left} within the pod's cgroup: \
                 name a RuntimeClass whose overhead.podFixed.memory is {}Mi or more",
                memory::overhead_for(limit)
            )
        })
    }

    /// Whether a container, or the pod, that has the limits `before` can be given the limits that
    /// `change` names, in a guest of this size.
    ///
    /// # Errors
    /// Which of them is beyond it.
    pub fn check(&self, before: &Resources, change: &Resources) -> Result<()> {
        let memory = bytes(change.memory_limit);
        let left = memory::left_in(self.memory_mib);
        // What it has, a guest that was made to fit its cgroup may have no room for.
        if memory > left.saturating_mul(MIB) && memory > bytes(before.memory_limit) {
            return Err(Error::Exhausted(format!(
                "a memory limit of {memory} bytes is beyond the pod's guest, which has {} MiB, {left} of them for \
                 containers, and cannot grow: restart the pod with this limit",
                self.memory_mib
            )));
        }
        let cpus = cpus(change);
        if cpus > self.vcpus.into() {
            return Err(Error::Exhausted(format!(
                "a limit of {cpus} processors is beyond the pod's guest, which has {} and cannot grow: restart the pod \
                 with this limit",
                self.vcpus
            )));
        }
        Ok(())
    }
}

/// Memory of the guest for this pod.
fn memory_mib(pod: &SandboxConfig, guest: &GuestConfig, bounds: Bounds) -> Result<u64> {
    let limit = limit_mib(&pod.resources);
    let wanted = match (limit, bounds.open_memory) {
        (0, _) => guest.memory_mib,
        (limit, true) => memory::guest_for(limit, guest.memory_mib),
        (limit, false) => memory::guest_for(limit, guest.base_mib),
    };
    let most = if guest.max_memory_mib == 0 { host_memory_mib() } else { guest.max_memory_mib };
    if wanted > most {
        return Err(Error::Exhausted(format!(
            "the pod, with a memory limit of {limit} MiB, wants a guest of {wanted} MiB, the most is {most} MiB: ask for \
             less, or raise max_memory_mib of its handler or of guest"
        )));
    }
    let Some(host) = host_limit_mib(pod, bounds) else { return Ok(wanted) };
    let fitting = wanted.min(memory::guest_within(host));
    let left = memory::left_in(fitting);
    if left < memory::LEAST_LEFT.max(limit / 2) {
        let containers = limit.max(memory::LEAST_LEFT);
        return Err(Error::Exhausted(format!(
            "the pod's cgroup is limited to {host} MiB, in which a guest leaves its containers {left} MiB, and they want \
             {containers}: name a RuntimeClass whose overhead.podFixed.memory is {}Mi or more",
            memory::overhead_for(containers)
        )));
    }
    Ok(fitting)
}

/// What guest and VMM may take of the host: the closer of what the kubelet's cgroup has, and of
/// what ours below it gets ([`Cgroup::limit`](crate::cgroup::Cgroup::limit)).
fn host_limit_mib(pod: &SandboxConfig, bounds: Bounds) -> Option<u64> {
    let (limit, overhead) = (bytes(pod.resources.memory_limit), bytes(pod.overhead.memory_limit));
    let own = (limit > 0 && overhead > 0).then(|| limit.saturating_add(overhead));
    own.into_iter().chain(bounds.memory).min().map(|bytes| bytes / MIB)
}

/// What containers may use by their limits, rounded up.
fn limit_mib(resources: &Resources) -> u64 {
    bytes(resources.memory_limit).saturating_add(hugepages(resources)).div_ceil(MIB)
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
        assert_eq!(size(limits.clone(), closed).unwrap(), (613, 2));
        let huge = Resources { hugepages: vec![("2Mi".into(), 64 << 20)], ..limits.clone() };
        assert_eq!(size(huge, closed).unwrap().0, 678);
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
        let open = Bounds { open_memory: true, open_cpu: true, ..Bounds::default() };
        let limits = Resources { memory_limit: 512 << 20, cpu_quota: 100_000, ..Default::default() };
        assert_eq!(size(limits, open).unwrap(), (809, 2));
        assert_eq!(size(Resources::default(), open).unwrap(), (256, 1));
    }

    #[test]
    fn too_large_a_guest_is_refused_with_the_key_that_allows_it() {
        let memory = Resources { memory_limit: 8 << 30, ..Default::default() };
        let error = size(memory, Bounds::default()).unwrap_err().to_string();
        assert!(error.contains("max_memory_mib") && error.contains("8192 MiB"), "{error}");
        for quota in [900_000, i64::MAX] {
            let cpu = Resources { cpu_quota: quota, ..Default::default() };
            assert!(size(cpu, Bounds::default()).unwrap_err().to_string().contains("max_vcpus"));
        }
    }

    /// A pod as a kubelet makes it: the cgroup has the limits and the overhead, in MiB.
    fn pod_of(limit: u64, overhead: u64) -> (SandboxConfig, Bounds) {
        let bytes = |mib: u64| Resources { memory_limit: i64::try_from(mib * MIB).unwrap(), ..Default::default() };
        let pod = SandboxConfig { resources: bytes(limit), overhead: bytes(overhead), ..Default::default() };
        (pod, Bounds { memory: Some((limit + overhead) * MIB), ..Bounds::default() })
    }

    fn large() -> GuestConfig {
        GuestConfig { base_mib: 96, max_memory_mib: 1 << 20, ..guest() }
    }

    proptest::proptest! {
        #[test]
        fn guest_and_vmm_fit_the_cgroup_or_are_refused(limit in 1..512_u64 << 10, overhead in 0..20_u64 << 10) {
            let (pod, bounds) = pod_of(limit, overhead);
            match GuestSize::of(&pod, &large(), bounds) {
                Ok(size) => {
                    proptest::prop_assert!(memory::taken_by(size.memory_mib) <= limit + overhead);
                    let left = memory::left_in(size.memory_mib);
                    proptest::prop_assert_eq!(left < limit, overhead < memory::overhead_for(limit));
                    proptest::prop_assert_eq!(size.shortage(&pod).is_some(), left < limit);
                    proptest::prop_assert!(left >= limit / 2);
                }
                Err(error) => {
                    let named = format!("overhead.podFixed.memory is {}Mi", memory::overhead_for(limit.max(16)));
                    proptest::prop_assert!(error.to_string().contains(&named), "{}", error);
                    let (pod, bounds) = pod_of(limit, memory::overhead_for(limit.max(16)));
                    let size = GuestSize::of(&pod, &large(), bounds).unwrap();
                    proptest::prop_assert_eq!(size.shortage(&pod), None);
                }
            }
        }
    }

    #[test]
    fn a_guest_is_made_to_fit_its_cgroup() {
        let sized = |limit, overhead| {
            let (pod, bounds) = pod_of(limit, overhead);
            GuestSize::of(&pod, &large(), bounds).map(|size| (size.memory_mib, size.shortage(&pod)))
        };
        // Nothing but the base is cut.
        assert_eq!(sized(512, 96).unwrap(), (597, None));
        // All of it is there.
        assert_eq!(sized(512, 256).unwrap(), (memory::guest_for(512, 96), None));
        // A pod without a RuntimeClass, and a large one whose RuntimeClass is for small ones.
        let (memory, words) = sized(1024, 0).unwrap();
        assert!(
            memory < 1024 && words.as_ref().is_some_and(|words| words.contains("overhead.podFixed.memory")),
            "{words:?}"
        );
        assert!(sized(64 << 10, 64).unwrap().1.is_some());
        assert!(sized(64, 0).unwrap_err().to_string().contains("is limited to 64 MiB"));
        // Of which nothing but the cgroup is known.
        let bounds = Bounds { memory: Some(120 * MIB), ..Bounds::default() };
        let size = GuestSize::of(&SandboxConfig::default(), &guest(), bounds).unwrap();
        assert!(memory::taken_by(size.memory_mib) <= 120, "{size:?}");
    }

    #[test]
    fn a_running_guest_takes_no_limit_beyond_its_size() {
        let size = GuestSize { memory_mib: 256, vcpus: 2 };
        let left = i64::try_from(memory::left_in(256) * MIB).unwrap();
        let none = Resources::default();
        let fitting = Resources {
            memory_limit: left,
            cpu_quota: 200_000,
            // The host's, of which the guest knows none.
            cpuset_cpus: "12-15".into(),
            ..Default::default()
        };
        size.check(&none, &fitting).unwrap();
        for beyond in [
            Resources { memory_limit: left + 1, ..Default::default() },
            Resources { cpu_quota: 200_001, ..Default::default() },
        ] {
            assert!(size.check(&none, &beyond).unwrap_err().to_string().contains("guest"));
        }
        // One that had it from the start keeps it.
        let more = Resources { memory_limit: 512 << 20, ..Default::default() };
        size.check(&more, &more).unwrap();
        assert!(size.check(&more, &Resources { memory_limit: (512 << 20) + 1, ..Default::default() }).is_err());
    }
}
