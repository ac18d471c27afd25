//! Limits: the CRI's to ours and back.

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::Resources;
use tonic::Status;

use crate::status::invalid;

/// Units of page sizes, as the kernel names them.
const PAGE_UNITS: [&str; 3] = ["KB", "MB", "GB"];

/// Translates limits, of which none may be given; `field` is where they were.
pub fn resources(field: &str, resources: Option<cri::LinuxContainerResources>) -> Result<Resources, Status> {
    let Some(asked) = resources else { return Ok(Resources::default()) };
    let within = |name: &str, value: i64, least: i64, most: i64| {
        if value == 0 || (least..=most).contains(&value) {
            return Ok(());
        }
        Err(invalid(&format!("{field}.{name}"), format!("{value} is not {least} to {most}, nor 0 for not set")))
    };
    within("cpu_period", asked.cpu_period, 1000, 1_000_000)?;
    if asked.cpu_quota != -1 {
        within("cpu_quota", asked.cpu_quota, 1000, i64::MAX)?;
    }
    // Less than two shares is what the kubelet may send for no request.
    within("cpu_shares", asked.cpu_shares, 1, 262_144)?;
    within("memory_limit_in_bytes", asked.memory_limit_in_bytes, -1, i64::MAX)?;
    within("memory_swap_limit_in_bytes", asked.memory_swap_limit_in_bytes, -1, i64::MAX)?;
    within("oom_score_adj", asked.oom_score_adj, -1000, 1000)?;
    let (memory, swap) = (asked.memory_limit_in_bytes, asked.memory_swap_limit_in_bytes);
    if swap > 0 && swap < memory {
        let problem = format!("{swap} is of memory and swap together, and less than the memory limit of {memory}");
        return Err(invalid(&format!("{field}.memory_swap_limit_in_bytes"), problem));
    }
    for (name, list) in [("cpuset_cpus", &asked.cpuset_cpus), ("cpuset_mems", &asked.cpuset_mems)] {
        if !list.is_empty() && !is_list(list) {
            return Err(invalid(&format!("{field}.{name}"), format!("{list:?} is not a list like 0-3,7")));
        }
    }
    for (index, limit) in asked.hugepage_limits.iter().enumerate() {
        let digits = PAGE_UNITS.iter().find_map(|unit| limit.page_size.strip_suffix(unit)).unwrap_or_default();
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            let problem = format!("{:?} is not a size like 2MB", limit.page_size);
            return Err(invalid(&format!("{field}.hugepage_limits[{index}].page_size"), problem));
        }
    }
    for name in asked.unified.keys() {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !name.bytes().all(plain) || !name.contains('.') || name.starts_with('.') || name.starts_with("cgroup.") {
            let problem = format!("{name:?} is not the name of a controller's file, like memory.high");
            return Err(invalid(&format!("{field}.unified"), problem));
        }
    }
    Ok(Resources {
        cpu_period: asked.cpu_period,
        cpu_quota: asked.cpu_quota,
        cpu_shares: asked.cpu_shares,
        memory_limit: memory,
        memory_swap_limit: swap,
        oom_score_adj: asked.oom_score_adj,
        cpuset_cpus: asked.cpuset_cpus,
        cpuset_mems: asked.cpuset_mems,
        hugepages: asked.hugepage_limits.into_iter().map(|limit| (limit.page_size, limit.limit)).collect(),
        unified: asked.unified.into_iter().collect(),
    })
}

/// Whether it is numbers and ranges of them, separated by commas.
fn is_list(list: &str) -> bool {
    let number = |text: &str| text.parse::<u16>().ok();
    list.split(',').all(|part| match part.split_once('-') {
        Some((first, last)) => number(first).zip(number(last)).is_some_and(|(first, last)| first <= last),
        None => number(part).is_some(),
    })
}

/// The other way round.
pub fn back(resources: &Resources) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        cpu_period: resources.cpu_period,
        cpu_quota: resources.cpu_quota,
        cpu_shares: resources.cpu_shares,
        memory_limit_in_bytes: resources.memory_limit,
        memory_swap_limit_in_bytes: resources.memory_swap_limit,
        oom_score_adj: resources.oom_score_adj,
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepage_limits: resources
            .hugepages
            .iter()
            .map(|(size, limit)| cri::HugepageLimit { page_size: size.clone(), limit: *limit })
            .collect(),
        unified: resources.unified.clone().into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_a_kubelet_sends_comes_back_as_it_was() {
        let sent = cri::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            memory_swap_limit_in_bytes: 64 << 20,
            oom_score_adj: -998,
            cpuset_cpus: "0-1,3".into(),
            cpuset_mems: "0".into(),
            hugepage_limits: vec![cri::HugepageLimit { page_size: "2MB".into(), limit: 0 }],
            unified: [("memory.high".to_owned(), "100".to_owned())].into(),
        };
        assert_eq!(back(&resources("r", Some(sent.clone())).unwrap()), sent);
        assert_eq!(resources("r", None).unwrap(), Resources::default());
    }

    #[test]
    fn each_impossible_limit_is_named_by_its_field() {
        type Spoil = fn(&mut cri::LinuxContainerResources);
        let cases: &[(&str, Spoil)] = &[
            ("cpu_period", |r| r.cpu_period = 1),
            ("cpu_period", |r| r.cpu_period = -1),
            ("cpu_quota", |r| r.cpu_quota = -2),
            ("cpu_quota", |r| r.cpu_quota = 5),
            ("cpu_shares", |r| r.cpu_shares = -1),
            ("cpu_shares", |r| r.cpu_shares = 262_145),
            ("memory_limit_in_bytes", |r| r.memory_limit_in_bytes = -2),
            ("memory_swap_limit_in_bytes", |r| r.memory_swap_limit_in_bytes = -2),
            ("memory_swap_limit_in_bytes", |r| (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (9, 8)),
            ("oom_score_adj", |r| r.oom_score_adj = 1001),
            ("cpuset_cpus", |r| r.cpuset_cpus = "a".into()),
            ("cpuset_cpus", |r| r.cpuset_cpus = "3-1".into()),
            ("cpuset_mems", |r| r.cpuset_mems = "0,".into()),
            ("hugepage_limits[0].page_size", |r| {
                r.hugepage_limits.push(cri::HugepageLimit { page_size: "2M/../x".into(), limit: 1 })
            }),
            ("unified", |r| drop(r.unified.insert("../memory.max".into(), "1".into()))),
            ("unified", |r| drop(r.unified.insert("cgroup.procs".into(), "1".into()))),
        ];
        for (field, spoil) in cases {
            let mut asked = cri::LinuxContainerResources::default();
            spoil(&mut asked);
            let status = resources("config.linux.resources", Some(asked)).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            let expected = format!("config.linux.resources.{field}: ");
            assert!(status.message().starts_with(&expected), "{} is not about {expected}", status.message());
        }
    }

    proptest! {
        #[test]
        fn no_limits_make_it_panic(period: i64, quota: i64, shares: i64, memory: i64, swap: i64, list in ".{0,12}", size in ".{0,6}") {
            let limit = cri::HugepageLimit { page_size: size.clone(), limit: 1 };
            let _ = resources("r", Some(cri::LinuxContainerResources {
                cpu_period: period, cpu_quota: quota, cpu_shares: shares, memory_limit_in_bytes: memory,
                memory_swap_limit_in_bytes: swap, oom_score_adj: memory, cpuset_cpus: list, cpuset_mems: size.clone(),
                hugepage_limits: vec![limit], unified: [(size, String::new())].into(),
            }));
        }
    }
}
