//! Where everything of a pod lies on the host.
//!
//! Under `root`, which survives a reboot: `pods/<id>/sandbox.json`,
//! `pods/<id>/containers/<container id>.json`, `pods/<id>/network.json`,
//! `pods/<id>/scratch.img`.
//! Under `run`, which need not: `pods/<id>/{vmm.json,vmm.log,vsock,control,console}`.

use std::io;
use std::path::{Path, PathBuf};

use crate::Error;

/// Longest path a unix socket can have, without the terminating zero.
const SOCKET_PATH_LIMIT: usize = 107;
/// Name of the record of a pod's network.
const NETWORK: &str = "network.json";

/// The two trees.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
    run: PathBuf,
}

impl Layout {
    /// Checks that the paths of sockets will not be too long.
    pub fn new(root: &Path, run: &Path) -> Result<Self, Error> {
        let layout = Self { root: root.into(), run: run.into() };
        let longest = layout.pod(&"0".repeat(64)).ready_socket();
        let length = longest.as_os_str().len();
        if length > SOCKET_PATH_LIMIT {
            return Err(Error::Invalid(format!(
                "run directory {} is too long by {} bytes for unix sockets below it: configure a shorter one",
                run.display(),
                length - SOCKET_PATH_LIMIT
            )));
        }
        Ok(layout)
    }

    /// Directory of all pods' records.
    pub fn pods_root(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// Records of all pods' networks, whether they are there or not.
    pub fn networks(&self) -> io::Result<Vec<PathBuf>> {
        let pods = std::fs::read_dir(self.pods_root())?;
        pods.map(|entry| Ok(entry?.path().join(NETWORK))).collect()
    }

    /// Directory of all pods' sockets.
    pub fn pods_run(&self) -> PathBuf {
        self.run.join("pods")
    }

    /// Held by the daemon that owns the tree.
    pub fn lock(&self) -> PathBuf {
        self.root.join("daemon.lock")
    }

    /// One pod's paths.
    pub fn pod(&self, id: &str) -> PodPaths {
        PodPaths { root: self.pods_root().join(id), run: self.pods_run().join(id) }
    }
}

/// One pod's paths.
#[derive(Debug, Clone)]
pub struct PodPaths {
    /// Its directory under `root`.
    pub root: PathBuf,
    /// Its directory under `run`.
    pub run: PathBuf,
}

impl PodPaths {
    /// The sandbox's record.
    pub fn record(&self) -> PathBuf {
        self.root.join("sandbox.json")
    }

    /// The record of its network.
    pub fn network(&self) -> PathBuf {
        self.root.join(NETWORK)
    }

    /// Directory of the containers' records.
    pub fn containers(&self) -> PathBuf {
        self.root.join("containers")
    }

    /// A container's record.
    pub fn container(&self, id: &str) -> PathBuf {
        self.containers().join(format!("{id}.json"))
    }

    /// The pod's writable disk.
    pub fn scratch(&self) -> PathBuf {
        self.root.join("scratch.img")
    }

    /// The machine's description, read by the VMM.
    pub fn vmm_config(&self) -> PathBuf {
        self.run.join("vmm.json")
    }

    /// What the VMM says on standard error.
    pub fn vmm_log(&self) -> PathBuf {
        self.run.join("vmm.log")
    }

    /// The VMM's process, written by itself.
    pub fn vmm_process(&self) -> PathBuf {
        self.run.join("vmm.pid")
    }

    /// Socket to the guest's vsock ports.
    pub fn vsock(&self) -> PathBuf {
        self.run.join("vsock")
    }

    /// Socket the agent's ready line arrives at.
    pub fn ready_socket(&self) -> PathBuf {
        nacelle_vmm::config::MachineConfig::vsock_listener(&self.vsock(), nacelle_proto::stdio::READY_PORT)
    }

    /// The VMM's control socket.
    pub fn control(&self) -> PathBuf {
        self.run.join("control")
    }

    /// End of the guest's console.
    pub fn console(&self) -> PathBuf {
        self.run.join("console")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_run_directory_fits_and_a_long_one_is_refused() {
        Layout::new(Path::new("/var/lib/nacelle"), Path::new("/run/nacelle")).unwrap();
        let long = format!("/{}", "x".repeat(60));
        let error = Layout::new(Path::new("/r"), Path::new(&long)).unwrap_err().to_string();
        assert!(error.contains("too long"), "{error}");
    }
}
