//! The pod's cgroup on the host (cgroup v2): holds the VMM, named by the sandbox id.
//!
//! It lies below the one that the kubelet made for the pod, whose limits therefore hold
//! the guest, its VMM and all that it maps. A VMM is born in its cgroup, so no page of it
//! is charged elsewhere.
//!
//! With the systemd driver the kubelet names a slice. The VMM's cgroup is made directly
//! below that slice's, not as a scope over D-Bus: the slice's limits hold all the same, a
//! pod can start, and be cleaned up, while systemd is being restarted, and it takes no
//! connection to a bus. systemd leaves cgroups alone that it does not know, but not what their
//! parents hand down: it takes a controller from a slice that is not delegated when none of its
//! own units below wants it, and with it the limits of the VMM's cgroup. So controllers are
//! looked at, and enabled again, whenever a cgroup is used ([`Cgroup::complete`]); the slice's own
//! limits, which hold the pod, are not touched by that.
//!
//! Where the host has no writable cgroup v2 hierarchy a pod runs without one; limits from
//! outside then do not apply, and `nacelle check` says so.

mod cpuset;
mod end;

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nacelle_proto::agent::v1::GroupUsage;
use nacelle_proto::usage;
use serde::{Deserialize, Serialize};

use crate::model::Resources;
use crate::{Error, Result};

const HIERARCHY: &str = "/sys/fs/cgroup";
const PREFIX: &str = "nacelle-";
/// Parent of pods whose caller named none.
const DEFAULT_PARENT: &str = "nacelle";
/// What a pod is limited by and what is told of it.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// How the kubelet of this host names the cgroups of its pods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// By slices, where systemd is the host's init, and by paths elsewhere.
    #[default]
    Auto,
    /// By paths.
    Cgroupfs,
    /// By slices.
    Systemd,
}

impl CgroupDriver {
    /// Whether it is slices.
    #[must_use]
    pub fn is_systemd(self) -> bool {
        match self {
            Self::Auto => Path::new("/run/systemd/system").is_dir(),
            Self::Cgroupfs => false,
            Self::Systemd => true,
        }
    }
}

/// What bounds a pod from outside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Whether the kubelet made a cgroup for the pod and left its memory unlimited, because
    /// not every container has a limit.
    pub open_memory: bool,
    /// How much memory that cgroup may have, in bytes, if it is limited.
    pub memory: Option<u64>,
    /// The same of processor time.
    pub open_cpu: bool,
    /// How many processes the pod may have.
    pub pids: Option<u64>,
}

/// One pod's cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup of a sandbox under `parent` (as the kubelet names it, empty for
    /// the default), or returns none where there is no cgroup v2.
    pub fn create(parent: &str, sandbox_id: &str) -> Result<Option<Self>> {
        if !available() {
            return Ok(None);
        }
        let cgroup = Self::named(parent, sandbox_id)?;
        fs::create_dir_all(&cgroup.path).map_err(Error::io("create cgroup", &cgroup.path))?;
        cgroup.enable_controllers();
        Ok(Some(cgroup))
    }

    /// The cgroup that [`Cgroup::create`] would make, whether it is there or not.
    pub fn named(parent: &str, sandbox_id: &str) -> Result<Self> {
        Ok(Self { path: parent_path(parent)?.join(format!("{PREFIX}{sandbox_id}")) })
    }

    /// Enables again what its parents no longer hand down. What limited it is then to be written
    /// again.
    pub fn complete(&self) {
        let Ok(there) = fs::read_to_string(self.path.join("cgroup.controllers")) else { return };
        if !CONTROLLERS.iter().all(|name| there.split_whitespace().any(|on| on == *name)) {
            self.enable_controllers();
        }
    }

    /// Every ancestor hands its controllers down. One that cannot (it holds processes of
    /// its own) leaves the pod with fewer, which costs figures, not the pod.
    fn enable_controllers(&self) {
        let mut ancestors: Vec<_> =
            self.path.ancestors().skip(1).take_while(|path| path.starts_with(HIERARCHY)).collect();
        ancestors.reverse();
        for ancestor in ancestors {
            let file = ancestor.join("cgroup.subtree_control");
            let enabled = fs::read_to_string(&file).unwrap_or_default();
            for controller in CONTROLLERS.iter().filter(|name| !enabled.split_whitespace().any(|on| on == **name)) {
                if let Err(error) = fs::write(&file, format!("+{controller}")) {
                    tracing::debug!(cgroup = %ancestor.display(), controller, %error, "controller not enabled");
                }
            }
        }
    }

    /// Has `command` start its process inside.
    pub fn hold(&self, command: &mut Command) -> Result<()> {
        let path = self.path.join("cgroup.procs");
        let procs = File::options().write(true).open(&path).map_err(Error::io("open", &path))?;
        // SAFETY: between fork and exec the closure makes one system call, on a descriptor
        // that it owns and a constant; it allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(move || {
                // 0 stands for the process that writes.
                match libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1) {
                    1 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        Ok(())
    }

    /// Limits the pod from outside beyond what its parent does. What is zero stays as it
    /// is; a memory limit needs an overhead beside it, for the guest is more than its
    /// containers. May be repeated, and must be where a controller was away ([`Cgroup::complete`]).
    ///
    /// # Errors
    /// The pod uses more memory already than it would be left with.
    pub fn limit(&self, resources: &Resources, overhead: &Resources) -> Result<()> {
        let write = |file: &str, value: String| {
            let path = self.path.join(file);
            match fs::read_to_string(&path) {
                Ok(before) if before.trim() == value => Ok(()),
                _ => fs::write(&path, value).map_err(Error::io("write", &path)),
            }
        };
        if resources.cpu_quota > 0 {
            let period = if resources.cpu_period > 0 { resources.cpu_period } else { 100_000 };
            // The overhead's share of the same period.
            let extra = match (overhead.cpu_quota, overhead.cpu_period) {
                (quota, own) if quota > 0 && own > 0 => quota.saturating_mul(period) / own,
                _ => 0,
            };
            write("cpu.max", format!("{} {period}", resources.cpu_quota.saturating_add(extra)))?;
        }
        if resources.cpu_shares > 0 {
            write("cpu.weight", nacelle_proto::cpu::weight(resources.cpu_shares.unsigned_abs()).to_string())?;
        }
        if resources.memory_limit > 0 && overhead.memory_limit > 0 {
            let limit = resources.memory_limit.saturating_add(overhead.memory_limit).unsigned_abs();
            let used = self.number("memory.current").unwrap_or(0);
            if used > limit && self.number("memory.max").is_none_or(|before| before > limit) {
                return Err(Error::Exhausted(format!(
                    "the pod's guest holds {used} bytes of memory, which is more than the {limit} bytes it would be \
                     left with: restart the pod to make it smaller"
                )));
            }
            write("memory.max", limit.to_string())?;
        }
        Ok(())
    }

    /// Keeps what is in it to these processors and memory nodes of the host, of which each item
    /// is a list that one of the pod's containers has. Where the host has no cpuset, or not
    /// these processors, it runs wherever its parent does.
    pub fn pin<'a>(&self, cpus: impl IntoIterator<Item = &'a str>, mems: impl IntoIterator<Item = &'a str>) {
        for (file, mut list) in [("cpuset.cpus", cpuset::union(cpus)), ("cpuset.mems", cpuset::union(mems))] {
            let path = self.path.join(file);
            // Also empty where nothing was restricted.
            let before = fs::read_to_string(&path);
            if list.is_empty() && before.as_ref().is_ok_and(|before| !before.trim().is_empty()) {
                // A group with processes cannot be given none again: it gets all that its parent has.
                let parent = self.path.parent().map(|parent| parent.join(format!("{file}.effective")));
                list = parent.and_then(|all| fs::read_to_string(all).ok()).unwrap_or_default().trim().to_owned();
            }
            let same = before.map(|before| before.trim() == list);
            if let Err(error) = same.and_then(|same| if same { Ok(()) } else { fs::write(&path, format!("{list}\n")) })
            {
                tracing::debug!(path = %path.display(), list, %error, "not restricted");
            }
        }
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// How many processes in it the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let read = |group: &Path| fs::read_to_string(group.join("memory.events"));
        // Without the controller, its parent tells: that is the pod's alone.
        let parent = || read(self.path.parent().filter(|parent| !is_shared(parent)).unwrap_or(&self.path));
        let events = read(&self.path).or_else(|_| parent()).unwrap_or_default();
        let line = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }

    /// What is in it uses; its memory limit is the closer one of its own and its parent's.
    /// `now` is a monotonic clock in nanoseconds.
    pub fn usage(&self, now: u64) -> GroupUsage {
        self.complete();
        let mut usage = usage::read(&self.path, now);
        let parents = self.path.parent().and_then(|parent| fs::read_to_string(parent.join("memory.max")).ok());
        let parents = parents.and_then(|limit| limit.trim().parse::<u64>().ok());
        if let (Some(memory), Some(limit)) = (&mut usage.memory, parents) {
            memory.limit = if memory.limit == 0 { limit } else { memory.limit.min(limit) };
        }
        usage
    }

    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()
    }
}

/// What `parent`, as the kubelet made and named it, says about its pod.
pub fn bounds(parent: &str) -> Result<Bounds> {
    if parent.is_empty() {
        return Ok(Bounds::default());
    }
    let path = parent_path(parent)?;
    let read = |file: &str| fs::read_to_string(path.join(file)).ok();
    let first = |text: Option<String>| text.and_then(|text| text.split_whitespace().next().map(str::to_owned));
    let open = |file: &str| first(read(file)).is_some_and(|limit| limit == "max");
    Ok(Bounds {
        open_memory: open("memory.max"),
        memory: first(read("memory.max")).and_then(|limit| limit.parse().ok()),
        open_cpu: open("cpu.max"),
        pids: first(read("pids.max")).and_then(|limit| limit.parse().ok()),
    })
}

/// Whether it is one for pods of which nobody said where they belong.
fn is_shared(parent: &Path) -> bool {
    parent == Path::new(HIERARCHY).join(DEFAULT_PARENT)
}

/// The directory of a parent cgroup: a path, or the name of a slice, which stands for all
/// the slices it is in (systemd.slice(5)): `a-b.slice` lies in `a.slice`.
fn parent_path(parent: &str) -> Result<PathBuf> {
    let invalid = |problem: &str| Error::Invalid(format!("cgroup_parent {parent:?} {problem}"));
    let relative = if parent.is_empty() { DEFAULT_PARENT } else { parent.trim_start_matches('/') };
    if relative.split('/').any(|part| part == ".." || part == ".") || relative.contains('\0') {
        return Err(invalid("must not contain . or .."));
    }
    let base = relative.rsplit('/').next().unwrap_or_default();
    let Some(name) = base.strip_suffix(".slice") else { return Ok(Path::new(HIERARCHY).join(relative)) };
    let mut path = PathBuf::from(HIERARCHY);
    if name == "-" {
        return Ok(path);
    }
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return Err(invalid("is not the name of a slice"));
        }
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    Ok(path)
}

/// Whether there is a cgroup v2 hierarchy that we may write to.
fn available() -> bool {
    Path::new(HIERARCHY).join("cgroup.controllers").exists()
        && rustix::fs::access(HIERARCHY, rustix::fs::Access::WRITE_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(parent: &str) -> PathBuf {
        parent_path(parent).unwrap()
    }

    #[test]
    fn parents_stay_inside_the_hierarchy() {
        assert!(Cgroup::named("/kubepods/../..", "ab").is_err());
        let cgroup = Cgroup::named("/kubepods/burstable/pod1", "ab").unwrap();
        assert_eq!(cgroup.path, Path::new("/sys/fs/cgroup/kubepods/burstable/pod1/nacelle-ab"));
        assert_eq!(Cgroup::named("", "ab").unwrap().path, Path::new("/sys/fs/cgroup/nacelle/nacelle-ab"));
    }

    #[test]
    fn a_slice_lies_in_the_slices_its_name_tells() {
        let expected = "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice";
        assert_eq!(path("kubepods-burstable-pod1_2.slice"), Path::new(expected));
        assert_eq!(
            path("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"),
            Path::new(expected)
        );
        assert_eq!(path("system.slice"), Path::new("/sys/fs/cgroup/system.slice"));
        assert_eq!(path("-.slice"), Path::new(HIERARCHY));
        for bad in ["a--b.slice", "-a.slice", "a-.slice", ".slice", "x/../a.slice"] {
            assert!(parent_path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pod_whose_parent_is_not_there_is_bounded_by_what_was_asked() {
        assert_eq!(bounds("/no/such/parent").unwrap(), Bounds::default());
        assert_eq!(bounds("").unwrap(), Bounds::default());
    }
}
