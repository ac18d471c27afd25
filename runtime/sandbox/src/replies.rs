//! What a guest's agent answers, with bounds.
//!
//! Whoever is root in a guest may be its agent: what comes from there is as long and as wrong as the message's limit lets it
//! be, and is multiplied by what is made of it. So each answer that is kept, or handed on, goes through here first.

use nacelle_proto::agent::v1 as api;

use crate::model::{ExitInfo, ExitReason, Identity};
use crate::{AgentFailure, Error, Result, clock};

/// Longest answer of any call in bytes: 31 containers with 128 devices each take less. What it is decoded to may be fifty
/// times as long.
pub const LIMIT: usize = 256 << 10;
/// Longest list of headers in bytes, an error's message among them. An agent of the first release sends messages as long as
/// the commands that they quote; a list that is longer costs its call, one four times as long the connection.
pub const HEADER_LIMIT: u32 = 256 << 10;
/// What is kept of an error's message, in bytes.
const MESSAGE_LIMIT: usize = 8192;

/// Most containers of one guest that are looked at: the ones that it may have at a time are fewer than its slots, those that
/// have ended included.
const CONTAINERS: usize = 256;
/// Most execs of one container.
const EXECS: usize = 4096;
/// Most groups of a container's user. A kernel takes 65,536, of which each copy of the container's status would have a copy.
const GROUPS: usize = 4096;
/// Slots of a guest's bus.
const SLOTS: std::ops::RangeInclusive<u32> = 1..=31;
/// Most interfaces, as agent.v1 says.
const INTERFACES: usize = 64;
/// Longest name of an interface in bytes (IFNAMSIZ without its NUL).
const INTERFACE_NAME: usize = 15;
/// Most devices of a control group, as an agent reads them.
const DEVICES: usize = 128;
/// Longest name of a device in bytes.
const DEVICE_NAME: usize = 32;
/// Most sizes of huge pages.
const HUGE_PAGES: usize = 8;
/// Most features of an agent, and the longest word that it tells of itself in bytes.
const FEATURES: usize = 64;
const WORD: usize = 64;

/// Whom a container's process runs as.
///
/// # Errors
/// There are more groups than can be.
pub fn created(answer: api::CreateContainerResponse) -> Result<Identity> {
    let api::CreateContainerResponse { uid, gid, groups } = answer;
    if groups.len() > GROUPS {
        let message = format!("its user has {} groups in the guest, at most {GROUPS} can be", groups.len());
        return Err(Error::Agent { action: "create the container".into(), kind: AgentFailure::Other, message });
    }
    Ok(Identity { uid, gid, groups })
}

/// How a container's process ended that was started at `started_at`, in nanoseconds since the Unix epoch by the host's clock:
/// it ended after that, and not in the future, whatever the guest's clock says.
pub fn exit(answer: &api::WaitResponse, started_at: i64) -> ExitInfo {
    let code = exit_code(answer);
    // An agent of the first release tells of any process of the container that was killed.
    let reason = match (answer.oom_killed && code == 128 + 9, code) {
        (true, _) => ExitReason::OomKilled,
        (false, 0) => ExitReason::Completed,
        (false, _) => ExitReason::Error,
    };
    let finished_at = finished_at(answer.finished_at, started_at, clock::now());
    ExitInfo { code, reason, message: String::new(), finished_at }
}

/// The exit code of a process, 0 to 255; 255 for one that can be none.
pub fn exit_code(answer: &api::WaitResponse) -> i32 {
    if (0..=255).contains(&answer.exit_code) { answer.exit_code } else { 255 }
}

fn finished_at(told: i64, started_at: i64, now: i64) -> i64 {
    let told = if told > 0 { told.min(now) } else { now };
    told.max(started_at)
}

/// The containers that a guest has: those whose names can be, each once, with the execs and devices that can be.
pub fn containers(answer: api::ListContainersResponse) -> Vec<api::ContainerInfo> {
    let mut containers: Vec<api::ContainerInfo> = Vec::new();
    for mut info in answer.containers {
        let known = containers.iter().any(|earlier| earlier.container_id == info.container_id);
        if known || !is_id(&info.container_id) {
            continue;
        }
        if containers.len() == CONTAINERS {
            break;
        }
        info.exec_ids.retain(|id| is_id(id));
        info.exec_ids.truncate(EXECS);
        info.devices.retain(|device| SLOTS.contains(&device.slot));
        info.devices.sort_unstable_by_key(|device| device.slot);
        info.devices.dedup();
        containers.push(info);
    }
    containers
}

/// What a pod uses.
pub fn stats(mut answer: api::StatsResponse) -> api::StatsResponse {
    answer.containers.retain(|usage| is_id(&usage.container_id));
    answer.containers.truncate(CONTAINERS);
    answer.containers.iter_mut().filter_map(|usage| usage.group.as_mut()).for_each(group);
    answer.pod.iter_mut().for_each(group);
    answer.interfaces.retain(|interface| is_name(&interface.name, INTERFACE_NAME));
    answer.interfaces.truncate(INTERFACES);
    answer
}

/// An agent's version, kernel and features, each a short word.
pub fn info(mut answer: api::InfoResponse) -> api::InfoResponse {
    for text in [&mut answer.agent_version, &mut answer.kernel_release] {
        if !is_name(text, WORD) {
            *text = "unknown".into();
        }
    }
    answer.features.retain(|feature| is_name(feature, WORD));
    answer.features.truncate(FEATURES);
    answer
}

/// An error's message, cut.
pub fn message(text: &str) -> String {
    let mut text = text.to_owned();
    if text.len() > MESSAGE_LIMIT {
        text.truncate(text.floor_char_boundary(MESSAGE_LIMIT));
        text.push_str(" [...]");
    }
    text
}

/// The figures of a control group; the numbers mean themselves.
fn group(usage: &mut api::GroupUsage) {
    if let Some(io) = &mut usage.io {
        io.devices.truncate(DEVICES);
        for device in &mut io.devices {
            if !is_name(&device.name, DEVICE_NAME) {
                device.name.clear();
            }
        }
    }
    usage.hugepages.retain(|pages| is_name(&pages.size, DEVICE_NAME));
    usage.hugepages.truncate(HUGE_PAGES);
    let cpu = usage.cpu.iter_mut().filter_map(|cpu| cpu.pressure.as_mut());
    let memory = usage.memory.iter_mut().filter_map(|memory| memory.pressure.as_mut());
    let io = usage.io.iter_mut().filter_map(|io| io.pressure.as_mut());
    for pressure in cpu.chain(memory).chain(io) {
        for stall in pressure.some.iter_mut().chain(&mut pressure.full) {
            for average in [&mut stall.avg10, &mut stall.avg60, &mut stall.avg300] {
                *average = if average.is_finite() { average.clamp(0.0, 100.0) } else { 0.0 };
            }
        }
    }
}

/// As the agent's calls take it.
fn is_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    (1..=64).contains(&id.len()) && id.bytes().all(allowed) && id != "." && id != ".."
}

/// A word that may be shown, and be a label of a metric.
fn is_name(name: &str, limit: usize) -> bool {
    (1..=limit).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_as_many_groups_as_can_be_kept() {
        let answer = |count: u32| api::CreateContainerResponse { uid: 1, gid: 2, groups: (0..count).collect() };
        let identity = created(answer(GROUPS as u32)).unwrap();
        assert_eq!((identity.uid, identity.gid, identity.groups.len()), (1, 2, GROUPS));
        let error = created(answer(1_000_000)).unwrap_err().to_string();
        assert!(error.contains("1000000 groups"), "{error}");
    }

    #[test]
    fn an_end_is_after_the_start_and_not_in_the_future_by_whatever_clock() {
        assert_eq!(finished_at(50, 10, 100), 50);
        assert_eq!(finished_at(5, 10, 100), 10);
        assert_eq!(finished_at(i64::MAX, 10, 100), 100);
        for unknown in [0, -1, i64::MIN] {
            assert_eq!(finished_at(unknown, 10, 100), 100);
        }
        // The host's own clock was set back meanwhile.
        assert_eq!(finished_at(50, 200, 100), 200);
    }

    #[test]
    fn only_a_process_that_was_killed_was_killed_for_want_of_memory() {
        let end = |exit_code, oom_killed| {
            let info = exit(&api::WaitResponse { exit_code, oom_killed, finished_at: 1 }, 0);
            (info.code, info.reason)
        };
        assert_eq!(end(137, true), (137, "OOMKilled".into()));
        assert_eq!(end(0, true), (0, "Completed".into()));
        assert_eq!(end(1, true), (1, "Error".into()));
        assert_eq!(end(137, false), (137, "Error".into()));
        for impossible in [-1, 256, i32::MIN, i32::MAX] {
            assert_eq!(end(impossible, false), (255, "Error".into()));
        }
    }

    #[test]
    fn a_list_has_each_container_once_and_nothing_that_is_none() {
        let info = |id: &str| api::ContainerInfo { container_id: id.into(), ..api::ContainerInfo::default() };
        let mut first = info("a");
        first.exec_ids = ["e", "", "../e", "e f"].map(str::to_owned).into();
        first.exec_ids.extend((0..100_000).map(|n| n.to_string()));
        first.devices = [0, 3, 3, 31, 32, u32::MAX].map(|slot| api::Device { slot }).into();
        let mut all = vec![first, info("a"), info(""), info("a/b"), info(&"x".repeat(65)), info("..")];
        all.extend((0..100_000).map(|n| info(&n.to_string())));
        let found = containers(api::ListContainersResponse { containers: all });
        assert_eq!(found.len(), CONTAINERS);
        assert_eq!(found[0].exec_ids[..2], ["e", "0"]);
        assert_eq!(found[0].exec_ids.len(), EXECS);
        assert_eq!(found[0].devices, [3, 31].map(|slot| api::Device { slot }));
        assert_eq!(found[1].container_id, "0");
    }

    #[test]
    fn figures_are_as_many_as_a_guest_can_have() {
        let interface = |name: &str| api::InterfaceUsage { name: name.into(), ..api::InterfaceUsage::default() };
        let stall =
            |average| Some(api::Stall { total: u64::MAX, avg10: average, avg60: f64::NAN, avg300: f64::INFINITY });
        let device = api::DeviceUsage { name: "x\ny".into(), ..api::DeviceUsage::default() };
        let usage = api::GroupUsage {
            io: Some(api::IoUsage { devices: vec![device; 100_000], pressure: None }),
            hugepages: vec![api::HugePageUsage { size: "2MB".into(), bytes: 1 }; 100_000],
            cpu: Some(api::CpuUsage {
                pressure: Some(api::Pressure { some: stall(-1.0), full: stall(1e300) }),
                ..api::CpuUsage::default()
            }),
            ..api::GroupUsage::default()
        };
        let container = |id: &str| api::ContainerUsage {
            container_id: id.into(),
            group: Some(usage.clone()),
            ..api::ContainerUsage::default()
        };
        let mut interfaces = vec![interface(""), interface("eth0"), interface("sixteen-letters-"), interface("a\"b c")];
        interfaces.extend((0..100_000).map(|n| interface(&format!("e{n}"))));
        let found = stats(api::StatsResponse {
            containers: vec![container("a"), container("\n")],
            pod: Some(usage.clone()),
            interfaces,
            scratch: None,
        });
        assert_eq!(found.interfaces.len(), INTERFACES);
        assert_eq!((found.interfaces[0].name.as_str(), found.interfaces[1].name.as_str()), ("eth0", "e0"));
        assert_eq!(found.containers.len(), 1);
        let group = found.containers.into_iter().next().unwrap().group.unwrap();
        assert_eq!(Some(&group), found.pod.as_ref());
        let io = group.io.unwrap();
        assert_eq!((io.devices.len(), io.devices[0].name.as_str(), group.hugepages.len()), (DEVICES, "", HUGE_PAGES));
        let pressure = group.cpu.unwrap().pressure.unwrap();
        let (some, full) = (pressure.some.unwrap(), pressure.full.unwrap());
        assert_eq!((some.avg10, full.avg10, some.avg60, some.avg300), (0.0, 100.0, 0.0, 0.0));
    }

    #[test]
    fn what_an_agent_says_of_itself_is_short() {
        let told = info(api::InfoResponse {
            agent_version: "0.1.0".into(),
            kernel_release: "6.12\n<script>".into(),
            features: (0..100_000).map(|n| if n % 2 == 0 { format!("f{n}") } else { "x".repeat(1000) }).collect(),
        });
        assert_eq!((told.agent_version.as_str(), told.kernel_release.as_str()), ("0.1.0", "unknown"));
        assert_eq!((told.features.len(), told.features[1].as_str()), (FEATURES, "f2"));
        assert_eq!(message("short"), "short");
        assert!(message(&"\u{2026}".repeat(10_000)).len() < MESSAGE_LIMIT + 10);
    }
}
