//! A daemon with everything of its own, and the means to break it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, limit};
use nacelle_tests::daemon::Daemon;
use nacelle_tests::disk::Disk;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::plan::Whim;

/// How often things are looked at.
pub const PAUSE: Duration = Duration::from_millis(50);
/// Size of the file system of the records, in MiB.
const ROOT_MIB: u64 = 768;

/// The daemon, its network and its disk.
pub struct Node {
    daemon: Daemon,
    program: PathBuf,
    bridge: String,
    cgroup: String,
    /// A block volume of containers.
    disk: Option<Disk>,
    /// How much of the log was looked at.
    read: usize,
}

impl Node {
    /// Makes the place, and starts the daemon in it.
    pub async fn new(program: &Path, log: Option<&Path>) -> Result<Self> {
        let daemon = Daemon::networked(
            "network.plugin_seconds = 4\n[guest]\nkernel = \"/usr/lib/nacelle/vmlinux\"\n\
             initramfs = \"/usr/lib/nacelle/initramfs.cpio\"\ncall_seconds = 10\n",
        )?;
        if let Some(log) = log {
            std::os::unix::fs::symlink(log, daemon.path().join("log"))?;
        }
        let name = daemon.path().file_name().context("a name")?.to_string_lossy().into_owned();
        let bridge = format!("nt-{name}");
        let cgroup = format!("/torture-{name}");
        let node = Self { daemon, program: program.into(), bridge, cgroup, disk: None, read: 0 };
        let root = node.path().join("root");
        fs::create_dir(&root)?;
        let size = std::ffi::CString::new(format!("size={ROOT_MIB}m,mode=0700"))?;
        mount("torture", &root, "tmpfs", MountFlags::empty(), size.as_c_str()).context("mount a tmpfs")?;
        fs::create_dir_all(format!("/sys/fs/cgroup{}", node.cgroup))?;
        node.network()?;
        let mut node = node;
        node.disk = Some(Disk::attach(1 << 20));
        node.serve().await?;
        Ok(node)
    }

    fn network(&self) -> Result<()> {
        let path = self.path();
        let plugin = path.join("plugins/fitful");
        // The real one, and what it is told to do besides by a file, once.
        let script = format!(
            r#"#!/bin/sh
cd {}
config=$(cat)
whim() {{
    file=whim.$CNI_COMMAND.$1
    [ -e $file ] || return 0
    read how <$file
    : >met
    case $how in
    fail) rm $file; echo '{{"code":11,"msg":"not in the mood"}}'; exit 1 ;;
    kill) rm $file; kill -9 $$ ;;
    stop) rm $file; kill -STOP $$ ;;
    hang) while [ -e $file ]; do sleep 0.1; done ;;
    esac
}}
whim before
answer=$(printf %s "$config" | /usr/lib/cni/bridge)
status=$?
whim after
printf %s "$answer"
exit $status
"#,
            path.display()
        );
        fs::write(&plugin, script)?;
        fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755))?;
        let list = json!({ "cniVersion": "1.0.0", "name": self.bridge, "plugins": [{
            "type": "fitful", "bridge": self.bridge, "isGateway": true,
            "ipam": {
                "type": "host-local", "ranges": [[{ "subnet": "10.247.0.0/16" }]], "dataDir": path.join("ipam"),
            },
        }]});
        fs::write(path.join("cni/10.conflist"), list.to_string())?;
        Ok(())
    }

    pub fn path(&self) -> &Path {
        self.daemon.path()
    }

    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// A block volume.
    pub fn disk(&self) -> cri::Device {
        self.disk.as_ref().map_or_else(cri::Device::default, |disk| disk.device("rw"))
    }

    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    pub fn pid(&self) -> Option<Pid> {
        self.daemon.pid()
    }

    /// A client, whose connection may break.
    pub async fn client(&self) -> Result<Client> {
        Client::connect(&self.daemon.socket()).await
    }

    /// Starts the daemon (again) with these failpoints, and does not wait for it.
    pub fn launch(&mut self, failpoints: &str) -> Result<()> {
        self.daemon.kill();
        let variables = [("FAILPOINTS", failpoints), ("RUST_LOG", "info,nacelle::failpoint=debug")];
        self.daemon.launch(&self.program, &variables)
    }

    /// Starts it (again) without, and waits until it answers.
    pub async fn serve(&mut self) -> Result<Client> {
        self.launch("")?;
        self.daemon.answered().await?;
        self.client().await
    }

    /// Waits until the daemon answers, stands still, or has ended.
    pub async fn answers_or_not(&mut self) -> Result<()> {
        let deadline = Instant::now() + limit(30);
        loop {
            if self.has_ended() || self.stands_still() {
                return Ok(());
            }
            if tokio::time::timeout(PAUSE * 2, self.daemon.answered()).await.is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the daemon does not answer");
            }
        }
    }

    pub fn has_ended(&mut self) -> bool {
        self.daemon.status().is_some()
    }

    pub fn kill(&mut self) {
        self.daemon.kill();
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            let _ = kill_process(pid, signal);
        }
    }

    /// Whether SIGSTOP has come to the daemon.
    pub fn stands_still(&self) -> bool {
        let stat = self.pid().and_then(|pid| fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).ok());
        stat.is_some_and(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')))
    }

    /// What the daemon has said since this was last asked.
    pub fn said(&mut self) -> String {
        let log = self.daemon.log();
        let new = log.get(self.read..).unwrap_or_default().to_owned();
        self.read = log.len();
        new
    }

    /// Its open descriptors, by what they are.
    pub fn descriptors(&self) -> Vec<String> {
        let Some(pid) = self.pid() else { return Vec::new() };
        let entries = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_pid())).into_iter().flatten().flatten();
        let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        links.map(|link| link.display().to_string()).collect()
    }

    /// Has the plugin do something else, once.
    pub fn arm(&self, whim: Whim) -> Result<()> {
        let _ = fs::remove_file(self.path().join("met"));
        Ok(fs::write(self.whim(whim), format!("{}\n", whim.how))?)
    }

    /// Whether it has come to that.
    pub fn is_met(&self) -> bool {
        self.path().join("met").exists()
    }

    /// Lets the plugin go on.
    pub fn disarm(&self, whim: Whim) {
        let _ = fs::remove_file(self.whim(whim));
    }

    /// Lets a plugin that has stopped itself go on.
    pub fn continue_plugin(&self) {
        let plugin = self.path().join("plugins/fitful").display().to_string();
        for (pid, command) in nacelle_tests::host::processes() {
            if command.contains(&plugin)
                && let Some(pid) = Pid::from_raw(pid)
            {
                let _ = kill_process(pid, Signal::CONT);
            }
        }
    }

    fn whim(&self, whim: Whim) -> PathBuf {
        self.path().join(format!("whim.{}.{}", whim.command, whim.when))
    }

    /// Fills the file system of the records.
    pub fn fill(&self) -> Result<()> {
        let mut file = fs::File::create(self.path().join("root/ballast"))?;
        let (large, small) = (vec![0; 1 << 20], vec![0; 1 << 12]);
        while file.write_all(&large).is_ok() {}
        while file.write_all(&small).is_ok() {}
        Ok(())
    }

    /// Makes room there again.
    pub fn empty(&self) {
        let _ = fs::remove_file(self.path().join("root/ballast"));
    }

    /// Lets the daemon have only so many descriptors more than it has; or as many as it likes.
    pub fn limit_descriptors(&self, more: Option<u64>) -> Result<()> {
        let most = prlimit(self.pid(), Resource::Nofile, Rlimit { current: Some(1 << 16), maximum: Some(1 << 16) });
        most.context("prlimit")?;
        let Some(more) = more else { return Ok(()) };
        let current = Some(self.descriptors().len() as u64 + more);
        prlimit(self.pid(), Resource::Nofile, Rlimit { current, maximum: Some(1 << 16) }).context("prlimit")?;
        Ok(())
    }

    /// Waits until something holds, or for so long at most; whether it does.
    pub async fn until(longest: Duration, mut holds: impl FnMut() -> bool) -> bool {
        let deadline = Instant::now() + longest;
        while !holds() {
            if Instant::now() > deadline {
                return false;
            }
            sleep(PAUSE).await;
        }
        true
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.daemon.kill();
        let cgroup = format!("/sys/fs/cgroup{}", self.cgroup);
        let _ = fs::write(Path::new(&cgroup).join("cgroup.kill"), "1");
        for entry in fs::read_dir(&cgroup).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(&cgroup);
        if let Some(disk) = self.disk.take() {
            disk.detach();
        }
        let _ = unmount(self.path().join("root"), UnmountFlags::DETACH);
        let _ = std::process::Command::new("ip").args(["link", "delete", &self.bridge]).status();
    }
}
