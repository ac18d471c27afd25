//! What makes the generic guest into one pod's: its random numbers, its name, its files, its
//! kernel parameters, its clock and its scratch disk. And the end of it all.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nacelle_proto::agent::v1::ConfigureSandboxRequest;
use rustix::mount::{MountFlags, UnmountFlags, unmount};

use crate::agent::Agent;
use crate::container::cgroup::Cgroup;
use crate::container::{mount_at, unmount_at};
use crate::error::{Error, Result};
use crate::ids::IdMap;
use crate::namespaces::{PodNamespaces, as_user};
use crate::paths::{CGROUPS, POD_CGROUP};
use crate::patience::scaled;
use crate::pod_init::PodPids;
use crate::{clock, hugepages, random};

/// How long containers may take to end when the guest is shut down.
const PATIENCE: Duration = Duration::from_secs(5);
/// /etc/hosts of a pod that is given none.
const DEFAULT_HOSTS: &[u8] = b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// Whether, and with which disk, the sandbox is configured, and the pod's processes.
#[derive(Debug, Default)]
pub struct Sandbox {
    configured: Mutex<Option<Configured>>,
    /// The pod's PID namespace, once a container asks for it, of a pod without namespaces of
    /// its own.
    pub pids: PodPids,
    /// Those of a pod with a user namespace.
    namespaces: OnceLock<PodNamespaces>,
}

#[derive(Debug)]
struct Configured {
    scratch: Option<u32>,
}

impl Sandbox {
    /// Containers share what is configured, so they come after it.
    pub fn check_configured(&self) -> Result<()> {
        match *self.lock() {
            Some(_) => Ok(()),
            None => Err(Error::State("the sandbox is not configured yet; call ConfigureSandbox first".into())),
        }
    }

    /// The pod's user namespace and what belongs to it; none for a pod in the guest's.
    pub fn namespaces(&self) -> Option<&PodNamespaces> {
        self.namespaces.get()
    }

    /// What a user of the pod is in the guest. One that is not mapped is the pod's root: it
    /// can be nobody's process.
    pub fn outside_user(&self, inside: u32) -> u32 {
        match self.namespaces() {
            Some(namespaces) => namespaces.ids.uids.outside(inside).unwrap_or(namespaces.ids.root().0),
            None => inside,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Configured>> {
        self.configured.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    /// Configures the sandbox, or configures it anew.
    pub async fn configure_sandbox(self: &Arc<Self>, request: ConfigureSandboxRequest) -> Result<()> {
        let agent = self.clone();
        self.blocking(move || agent.configure(&request)).await
    }

    fn configure(&self, request: &ConfigureSandboxRequest) -> Result<()> {
        random::start_over(&request.entropy)?;
        let sysctls = request.sysctls.iter().map(|(name, value)| Ok((sysctl_path(name)?, value)));
        let sysctls = sysctls.collect::<Result<Vec<_>>>()?;
        let ids = request.user_namespace.as_ref().map(IdMap::parse).transpose()?;
        // Held all the while: two configurations at once would mix.
        let mut configured = self.sandbox.lock();
        self.enter_user_namespace(ids, configured.is_some())?;
        let scratch = request.scratch.as_ref().map(|device| device.slot);
        match &*configured {
            None => self.mount_scratch(scratch)?,
            Some(before) if before.scratch == scratch => {}
            Some(_) => return Err(Error::State("the sandbox is configured with another scratch disk".into())),
        }
        *configured = Some(Configured { scratch });
        let namespaces = self.sandbox.namespaces();
        if !request.hostname.is_empty() {
            let set = || rustix::system::sethostname(request.hostname.as_bytes());
            let result = namespaces.map_or_else(|| Ok(set()), |namespaces| namespaces.inside(set));
            result?.map_err(Error::system("set the host name"))?;
        }
        self.configure_network(&request.interfaces)?;
        self.write_etc(request)?;
        let set = || sysctls.iter().try_for_each(|(path, value)| set_sysctl(path, value, namespaces));
        match namespaces {
            Some(namespaces) if !sysctls.is_empty() => namespaces.inside(set)??,
            _ => set()?,
        }
        limit_processes(request.pids_limit)?;
        for (size, bytes) in &request.hugepages {
            hugepages::reserve(Path::new("/sys/kernel/mm/hugepages"), size, *bytes)?;
        }
        clock::start(request.clock_seconds, request.clock_nanoseconds)
    }

    /// Makes the pod's user namespace, or sees that it is the one that was made.
    fn enter_user_namespace(&self, ids: Option<IdMap>, configured: bool) -> Result<()> {
        let made = self.sandbox.namespaces();
        match (made, ids) {
            (Some(made), Some(ids)) if made.ids == ids => Ok(()),
            (None, None) => Ok(()),
            (None, Some(ids)) if !configured => {
                let namespaces = PodNamespaces::create(&self.paths, ids)?;
                // Shared memory is the pod's.
                namespaces.give(Path::new("/dev/shm"))?;
                // Nobody else sets it: the configuration is locked.
                let _ = self.sandbox.namespaces.set(namespaces);
                Ok(())
            }
            _ => Err(Error::State("the sandbox is configured with another user namespace".into())),
        }
    }

    fn mount_scratch(&self, slot: Option<u32>) -> Result<()> {
        let directory = self.paths.scratch();
        fs::create_dir_all(&directory).map_err(Error::path("make the directory", &directory))?;
        let Some(slot) = slot else { return Ok(()) };
        let device = self.bus.block_device(slot)?;
        // It dies with the pod: blocks go back to the host as soon as they are free, and
        // nothing waits for the disk's cache.
        mount_at(&device, &directory, "ext4", MountFlags::NOATIME | MountFlags::NODEV, "discard,barrier=0")
    }

    fn write_etc(&self, request: &ConfigureSandboxRequest) -> Result<()> {
        let etc = self.paths.etc();
        fs::create_dir_all(&etc).map_err(Error::path("make the directory", &etc))?;
        let write = |name: &str, content: &[u8]| {
            let path = etc.join(name);
            fs::write(&path, content).map_err(Error::path("write", &path))?;
            self.sandbox.namespaces().map_or(Ok(()), |namespaces| namespaces.give(&path))
        };
        if !request.resolv_conf.is_empty() {
            write("resolv.conf", &request.resolv_conf)?;
        }
        write("hosts", if request.hosts.is_empty() { DEFAULT_HOSTS } else { &request.hosts })?;
        write("hostname", format!("{}\n", request.hostname).as_bytes())
    }

    /// Ends everything that runs and writes everything out. Blocks, up to seconds; what
    /// cannot be undone in order is left to the power-off.
    pub fn end_everything(&self) {
        let pod = Cgroup::at(Path::new(CGROUPS).join(POD_CGROUP));
        let _ = pod.kill();
        let deadline = Instant::now() + scaled(PATIENCE);
        while pod.populated() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        for container in self.containers() {
            let root = self.paths.container(&container.id).join("rootfs");
            let _ = unmount(&root, UnmountFlags::DETACH);
        }
        let scratch = self.sandbox.lock().as_ref().and_then(|configured| configured.scratch);
        if scratch.is_some() {
            let _ = unmount_at(&self.paths.scratch());
        }
        rustix::fs::sync();
    }
}

/// The file of a kernel parameter. As with sysctl(8), the first separator decides whether
/// `.` or `/` separates: `net.ipv4.conf.all.rp_filter`, `net/ipv4/conf/eth0.5/rp_filter`.
fn sysctl_path(name: &str) -> Result<PathBuf> {
    let slashed = name.find(['.', '/']).is_some_and(|at| name[at..].starts_with('/'));
    let relative = if slashed { name.to_owned() } else { name.replace('.', "/") };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.@:".contains(&byte);
    let bad = |part: &str| part.is_empty() || part == "." || part == ".." || !part.bytes().all(allowed);
    if relative.split('/').any(bad) {
        return Err(Error::invalid("sysctls", format!("{name:?} is no kernel parameter")));
    }
    Ok(Path::new("/proc/sys").join(relative))
}

fn set_sysctl(path: &Path, value: &str, namespaces: Option<&PodNamespaces>) -> Result<()> {
    let name = path.strip_prefix("/proc/sys").unwrap_or(path).display();
    let written = match (fs::write(path, value), namespaces) {
        // Those of an IPC namespace are set by its own root, and by no other.
        (Err(error), Some(namespaces)) if error.kind() == ErrorKind::PermissionDenied => {
            as_user(namespaces.ids.root().0, || fs::write(path, value)).and_then(|written| written)
        }
        (written, _) => written,
    };
    written.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::invalid("sysctls", format!("the guest's kernel has no parameter {name}")),
        _ => Error::invalid("sysctls", format!("{name} cannot be set to {value:?} in the guest: {error}")),
    })
}

/// All containers together, as the host limits the pod.
fn limit_processes(limit: u64) -> Result<()> {
    if limit == 0 {
        return Ok(());
    }
    let file = Path::new(CGROUPS).join(POD_CGROUP).join("pids.max");
    fs::write(&file, limit.to_string()).map_err(Error::path("limit the pod's processes by", file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_parameters_stay_below_proc_sys() {
        let path = |name: &str| sysctl_path(name).unwrap();
        assert_eq!(path("net.core.somaxconn"), Path::new("/proc/sys/net/core/somaxconn"));
        assert_eq!(path("net/ipv4/conf/eth0.5/rp_filter"), Path::new("/proc/sys/net/ipv4/conf/eth0.5/rp_filter"));
        for bad in ["", ".", "/", "..", "/etc/passwd", "net/../../x", "net..core", "kernel/", "a\0b", "a b"] {
            assert!(sysctl_path(bad).is_err(), "{bad:?}");
        }
    }
}
