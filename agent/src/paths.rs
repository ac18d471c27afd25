//! Where the agent keeps and finds things.

use std::path::{Path, PathBuf};

/// The agent's places. In a guest they are [`Paths::guest`]; tests move them.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Everything the agent writes.
    pub run: PathBuf,
    /// The `sysfs` with the PCI bus.
    pub sysfs: PathBuf,
    /// The agent's own executable, which it runs again as the helper.
    pub executable: PathBuf,
}

/// The unified control group hierarchy; libcontainer knows no other place.
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// The control group that holds the containers' own, below [`CGROUPS`].
pub const POD_CGROUP: &str = "pod";

impl Paths {
    /// The places in a guest.
    pub fn guest() -> Self {
        // Not /proc/self/exe: that names the file on the initramfs's own mount, which is
        // writable, so a container could write to the agent through it. By its path the
        // helper runs from the read-only root that init puts on top.
        Self { run: "/run/nacelle".into(), sysfs: "/sys".into(), executable: "/init".into() }
    }

    /// The bundle, mounts and files of one container.
    pub fn container(&self, id: &str) -> PathBuf {
        self.run.join("containers").join(id)
    }

    /// Where libcontainer keeps its state, one directory a container.
    pub fn state(&self) -> PathBuf {
        self.run.join("state")
    }

    /// The pod's own files that are mounted into containers.
    pub fn etc(&self) -> PathBuf {
        self.run.join("etc")
    }

    /// The pod's writable disk, or a directory in memory as long as there is none.
    pub fn scratch(&self) -> PathBuf {
        self.run.join("scratch")
    }

    /// Where the device of volumes is mounted.
    pub fn volumes(&self) -> PathBuf {
        self.run.join("volumes")
    }

    /// The files that stand for the namespaces of a pod with a user namespace.
    pub fn namespaces(&self) -> PathBuf {
        self.run.join("namespaces")
    }

    /// Device files for containers that may not make any, where they work.
    pub fn devices(&self) -> PathBuf {
        self.run.join("devices")
    }

    /// The upper layer and overlay work directory of one container.
    pub fn upper(&self, id: &str) -> PathBuf {
        self.scratch().join("containers").join(id)
    }
}

/// The control group of one container, as cgroupsPath and as a directory.
pub fn container_cgroup(id: &str) -> (PathBuf, PathBuf) {
    let relative = Path::new("/").join(POD_CGROUP).join(id);
    let absolute = Path::new(CGROUPS).join(POD_CGROUP).join(id);
    (relative, absolute)
}
