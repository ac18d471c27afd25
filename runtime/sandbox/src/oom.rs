//! Whom the host's kernel ends first when its memory is short: `oom_score_adj` of a pod's VMM.
//!
//! A VMM holds all the memory of its pod, and the daemon that starts it is spared by the kernel
//! (its unit says so), which a child inherits. So every child gets a value of its own before it
//! is another program: a VMM its pod's, everything else the neutral one.
//!
//! The kubelet gives a value to each container and none to the pod, by the pod's class of
//! service (`pkg/kubelet/qos/policy.go`): -997 for a guaranteed pod, 1000 for one of best
//! effort, and 1000 less the share of the node's memory that the container requests for one in
//! between, 3 to 999. Before there are containers, the class is in the name of the pod's
//! cgroup; then their values say what the pod requests in all.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::{Mode, OFlags};

/// What a process has to which nobody gave a value.
pub const NEUTRAL: i16 = 0;
/// Of a pod whose requests are its limits.
const GUARANTEED: i16 = -997;
/// Of a pod that requests nothing and has no limit.
const BEST_EFFORT: i16 = 1000;
/// Of a pod in between: that of a request for all of the node's memory, and of next to none.
const BURSTABLE: std::ops::RangeInclusive<i16> = 3..=999;

/// What the name of the cgroup that the kubelet made for a pod says. One that no kubelet made
/// says nothing.
pub fn of_parent(parent: &str) -> i16 {
    let last = parent.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    // `…-kubepods-burstable-podUID.slice`, where dashes of the uid are underscores, or
    // `…/kubepods/burstable/podUID`.
    let mut parts: Vec<_> = match last.strip_suffix(".slice") {
        Some(name) => name.split('-').collect(),
        None => parent.split('/').filter(|part| !part.is_empty()).collect(),
    };
    let is_pod = parts.pop().is_some_and(|pod| pod.starts_with("pod"));
    match (is_pod, parts.as_slice()) {
        (true, [.., "kubepods", "besteffort"]) => BEST_EFFORT,
        (true, [.., "kubepods", "burstable"]) => *BURSTABLE.end(),
        (true, [.., "kubepods"]) => GUARANTEED,
        _ => NEUTRAL,
    }
}

/// What a pod has whose containers have these values, of which zero is not known; none if none
/// is known.
///
/// The pod uses what its containers use and requests what they request. So what a container's
/// value lacks to 1000, its request, is added up.
pub fn of_containers(values: impl IntoIterator<Item = i64>) -> Option<i16> {
    let known: Vec<_> = values.into_iter().filter(|value| *value != 0).collect();
    let least = *known.iter().min()?;
    if least < 0 {
        return i16::try_from(least.max(-1000)).ok();
    }
    if known.iter().all(|value| *value >= BEST_EFFORT.into()) {
        return Some(BEST_EFFORT);
    }
    let requested = known.iter().fold(0_i64, |sum, value| sum.saturating_add(1000_i64.saturating_sub(*value).max(0)));
    let value = 1000_i64.saturating_sub(requested).clamp((*BURSTABLE.start()).into(), (*BURSTABLE.end()).into());
    i16::try_from(value).ok()
}

/// Has `command` start its process with this value. Where it is less than the daemon's and the
/// daemon may not lower it (in a user namespace), the process keeps the daemon's.
pub fn prepare(command: &mut Command, value: i16) {
    let text = value.to_string();
    // SAFETY: between fork and exec the closure makes three system calls on a constant path and
    // on bytes that it owns; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || {
            let own = rustix::fs::open(c"/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            if let Ok(own) = own {
                let _ = rustix::io::write(own, text.as_bytes());
            }
            Ok(())
        });
    }
}

/// Changes the value of a process; `runs` says whether it has not ended yet.
///
/// # Errors
/// It has ended, or the daemon may not.
pub fn change(pid: u32, value: i16, runs: impl FnOnce() -> bool) -> io::Result<()> {
    let file = rustix::fs::open(format!("/proc/{pid}/oom_score_adj"), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // What was opened is the process that the number stood for then: the right one, if that runs still.
    if !runs() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let mut before = [0; 8];
    let length = rustix::io::read(&file, &mut before)?;
    let text = value.to_string();
    if before.get(..length).is_some_and(|before| before.trim_ascii() == text.as_bytes()) {
        return Ok(());
    }
    rustix::io::pwrite(&file, text.as_bytes(), 0).map(drop).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_of_a_pod_is_in_the_name_of_its_cgroup() {
        for (parent, value) in [
            ("/kubepods/pod3d1b8f6e-7a", -997),
            ("/kubepods/besteffort/pod3d1b8f6e-7a", 1000),
            ("/kubepods/burstable/pod3d1b8f6e-7a/", 999),
            ("/kubelet/kubepods/besteffort/pod1", 1000),
            ("kubepods-pod3d1b8f6e_7a.slice", -997),
            ("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod3d1b8f6e_7a.slice", 1000),
            ("kubelet-kubepods-burstable-pod1.slice", 999),
            ("", 0),
            ("/kubepods", 0),
            ("/kubepods/burstable", 0),
            ("system.slice", 0),
            ("/podman/pod1", 0),
        ] {
            assert_eq!(of_parent(parent), value, "{parent}");
        }
    }

    #[test]
    fn a_pod_requests_what_its_containers_request() {
        assert_eq!(of_containers([]), None);
        assert_eq!(of_containers([0, 0]), None);
        assert_eq!(of_containers([-997, -997]), Some(-997));
        assert_eq!(of_containers([1000, 0]), Some(1000));
        // A quarter of the node's memory each.
        assert_eq!(of_containers([750, 750]), Some(500));
        assert_eq!(of_containers([999]), Some(999));
        assert_eq!(of_containers([1000, 999]), Some(999));
        assert_eq!(of_containers([10, 10, 10]), Some(3));
        assert_eq!(of_containers([i64::MIN, i64::MAX]), Some(-1000));
    }

    #[test]
    fn a_child_has_its_own_value_and_not_its_parent_s() {
        let own: i16 = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim().parse().unwrap();
        let value = if own == 300 { 400 } else { 300.max(own) };
        let mut command = Command::new("cat");
        command.arg("/proc/self/oom_score_adj");
        prepare(&mut command, value);
        let said = command.output().unwrap().stdout;
        assert_eq!(String::from_utf8_lossy(&said).trim(), value.to_string());
        let after = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap();
        assert_eq!(after.trim(), own.to_string(), "the parent keeps its own");
    }

    #[test]
    fn only_a_process_that_runs_is_changed() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let path = format!("/proc/{}/oom_score_adj", child.id());
        let before = std::fs::read_to_string(&path).unwrap();
        assert!(change(child.id(), 900, || false).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), before);
        change(child.id(), 900, || true).unwrap();
        change(child.id(), 900, || true).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap().trim(), "900");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(change(child.id(), 800, || true).is_err());
    }
}
