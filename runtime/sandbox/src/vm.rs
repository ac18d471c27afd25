//! One guest from outside: start its VMM, wait until its agent is ready, see it end.
//!
//! The VMM is a process of its own that outlives the daemon. It is held by a pidfd, so
//! that a number reused by another process is never mistaken for it, and watched by a
//! task that publishes its end.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nacelle_vmm::config::{MachineConfig, Start};
use nacelle_vmm::control::{Access, Client, ClientError, Request, Response};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::layout::PodPaths;
use crate::record::ProcessId;
use crate::sizing::GuestSize;
use crate::{Error, ManagerConfig, Result};

/// Lines of the guest's console that go into an error message.
const CONSOLE_LINES: usize = 15;

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// In words.
    pub reason: String,
    /// Whether the host's kernel killed it for want of memory.
    pub out_of_memory: bool,
}

impl End {
    /// An end for `reason`, unless `cgroup` knows a better one.
    pub fn new(reason: &str, cgroup: Option<&Cgroup>) -> Self {
        let out_of_memory = cgroup.is_some_and(|cgroup| cgroup.oom_kills() > 0);
        let reason = if out_of_memory { OUT_OF_MEMORY } else { reason };
        Self { reason: reason.to_owned(), out_of_memory }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)
    }
}

const OUT_OF_MEMORY: &str = "the host's out-of-memory killer ended its VMM: the pod came to the memory limit of its \
                             cgroup on the host, or the host has no more";

/// What tells that a guest's agent is ready.
#[derive(Debug)]
pub enum Sign {
    /// Its ready line, on this socket.
    Line(UnixListener),
    /// That the machine runs: the agent of a clone has been ready before.
    Runs,
}

/// A running (or ended) VMM.
#[derive(Debug)]
pub struct Vm {
    id: String,
    process: ProcessId,
    pidfd: Arc<OwnedFd>,
    paths: PodPaths,
    call_deadline: Duration,
    exit: watch::Receiver<Option<End>>,
}

impl Vm {
    /// Starts the VMM process in the pod's cgroup; [`Vm::ready`] waits for the guest.
    pub fn spawn(
        config: &ManagerConfig,
        id: &str,
        paths: &PodPaths,
        size: GuestSize,
        start: Start,
        cgroup: Option<&Cgroup>,
    ) -> Result<(Self, Sign)> {
        let sign = match start {
            Start::Clone(_) => Sign::Runs,
            Start::Boot | Start::Template(_) => {
                let socket = paths.ready_socket();
                Sign::Line(UnixListener::bind(&socket).map_err(Error::io("listen on", &socket))?)
            }
        };
        let machine = MachineConfig {
            id: id.into(),
            kernel: config.guest.kernel.clone(),
            initramfs: config.guest.initramfs.clone(),
            cmdline: config.guest_command_line(),
            memory_mib: size.memory_mib,
            vcpus: size.vcpus,
            vsock: paths.vsock(),
            control: paths.control(),
            console: paths.console(),
            start,
        };
        let text = serde_json::to_vec(&machine).map_err(|e| Error::Internal(e.to_string()))?;
        fs::write(paths.vmm_config(), text).map_err(Error::io("write", paths.vmm_config()))?;
        let log = File::create(paths.vmm_log()).map_err(Error::io("create", paths.vmm_log()))?;
        let mut command = Command::new(&config.program);
        command.arg("vmm").arg("--config").arg(paths.vmm_config());
        // It can be asked before it runs.
        let control =
            nacelle_vmm::control::listen(&machine.control).map_err(Error::io("listen on", &machine.control))?;
        command.stdin(Stdio::from(control)).stdout(Stdio::null()).stderr(Stdio::from(log)).current_dir("/");
        // A process group of its own: an interrupt typed at the daemon's terminal is not
        // for the pods.
        command.process_group(0);
        if let Some(cgroup) = cgroup {
            cgroup.hold(&mut command)?;
        }
        let pid = command.spawn().map_err(Error::io("start", &config.program))?.id();
        let start_time = start_time(pid).ok_or_else(|| Error::Internal(format!("process {pid} has no stat")))?;
        Self::attach(config, id, paths, cgroup.cloned(), ProcessId { pid, start_time })
            .ok_or_else(|| Error::Internal(format!("process {pid} cannot be held")))
            .map(|vm| (vm, sign))
    }

    /// Takes hold of the VMM of an earlier daemon, if it still runs.
    pub fn attach(
        config: &ManagerConfig,
        id: &str,
        paths: &PodPaths,
        cgroup: Option<Cgroup>,
        process: ProcessId,
    ) -> Option<Self> {
        let pid = Pid::from_raw(i32::try_from(process.pid).ok()?)?;
        let pidfd = Arc::new(rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).ok()?);
        // Only now is the number pinned: is it still the process of the record?
        if start_time(process.pid)? != process.start_time {
            return None;
        }
        let (ended, exit) = watch::channel(None);
        // SAFETY: the descriptor stays open and the same for as long as it is registered: the
        // AsyncFd holds a share of its only owner, which nobody can take it out of.
        let watched = unsafe { AsyncFd::register(pidfd.clone()) }.ok()?;
        let log = paths.vmm_log();
        tokio::spawn(async move {
            let _ = watched.readable().await;
            let reason = exit_reason(watched.get_ref().as_fd(), &log);
            let _ = ended.send(Some(End::new(&reason, cgroup.as_ref())));
        });
        Some(Self { id: id.into(), process, pidfd, paths: paths.clone(), call_deadline: config.call_deadline(), exit })
    }

    /// The VMM's process.
    pub fn process(&self) -> ProcessId {
        self.process
    }

    /// Becomes `Some` when the VMM has ended.
    pub fn exit(&self) -> watch::Receiver<Option<End>> {
        self.exit.clone()
    }

    /// Waits for the end of the VMM.
    pub async fn wait_exit(&self) -> End {
        let mut exit = self.exit.clone();
        let end = exit.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        end.unwrap_or_else(|| End::new("its end was not observed", None))
    }

    /// Waits for the sign that the agent is ready.
    pub async fn ready(&self, sign: Sign, deadline: Duration) -> Result<()> {
        let failed = |reason: String| Error::Boot { id: self.id.clone(), reason, console: self.console() };
        let seen = async {
            let Sign::Line(listener) = sign else {
                let answer = self.call_within(deadline, "start the machine", Request::Status, Vec::new()).await;
                if let Err(Error::Vmm { source: ClientError::Refused(_) | ClientError::Answer(_), .. }) | Ok(_) = answer
                {
                    return answer.map(drop);
                }
                // It has ended, and what is said of its end says more.
                std::future::pending().await
            };
            match announcement(&listener).await {
                Ok(line) if line.starts_with("ready ") => {
                    let _ = fs::remove_file(self.paths.ready_socket());
                    Ok(())
                }
                Ok(line) => Err(failed(format!("the agent said {line:?} instead of being ready"))),
                Err(error) => Err(failed(format!("waiting for the agent: {error}"))),
            }
        };
        tokio::select! {
            result = seen => result,
            end = self.wait_exit() => Err(failed(end.reason)),
            () = tokio::time::sleep(deadline) => Err(failed(format!(
                "the agent was not ready within {deadline:?}; if the host is slow, raise guest.boot_seconds or timeout_scale"
            ))),
        }
    }

    /// The last lines of the guest's console as the tail of an error message.
    pub fn console(&self) -> String {
        let lines = nacelle_vmm::console::tail(&self.paths.console(), CONSOLE_LINES).unwrap_or_default();
        if lines.is_empty() {
            return String::new();
        }
        lines.iter().fold("; last lines of its console:".to_owned(), |text, line| text + "\n  " + line)
    }

    /// Puts a disk on the guest's bus and returns its slot.
    pub async fn add_disk(&self, read_only: bool, files: Vec<File>) -> Result<u8> {
        match self.call("add a disk", Request::AddDisk { read_only, owner: String::new() }, files).await? {
            Response::Device { slot } => Ok(slot),
            other => Err(Error::Internal(format!("the VMM answered {other:?} to add a disk"))),
        }
    }

    /// Puts a network interface on the guest's bus and returns its slot.
    pub async fn add_net(&self, mac: [u8; 6], mtu: u16, tap: File) -> Result<u8> {
        match self
            .call("add a network interface", Request::AddNet { mac, mtu, owner: String::new() }, vec![tap])
            .await?
        {
            Response::Device { slot } => Ok(slot),
            other => Err(Error::Internal(format!("the VMM answered {other:?} to add a network interface"))),
        }
    }

    /// Puts the device of volumes on the guest's bus, unless it is there, and returns its slot.
    pub async fn add_fs(&self) -> Result<u8> {
        match self.call("add the device of volumes", Request::AddFs, Vec::new()).await? {
            Response::Device { slot } => Ok(slot),
            other => Err(Error::Internal(format!("the VMM answered {other:?} to add the device of volumes"))),
        }
    }

    /// Gives the guest a volume.
    pub async fn add_volume(&self, name: String, access: Access, file: File) -> Result<()> {
        self.call("add a volume", Request::AddVolume { name, access }, vec![file]).await.map(drop)
    }

    /// Takes a volume away. One that is not there is fine.
    pub async fn remove_volume(&self, name: String) -> Result<()> {
        self.call("remove a volume", Request::RemoveVolume { name }, Vec::new()).await.map(drop)
    }

    /// Saves the machine, a template, and waits until it has ended.
    pub async fn save(&self) -> Result<()> {
        self.call("save the machine", Request::Save, Vec::new()).await?;
        self.wait_or_kill(self.call_deadline).await;
        Ok(())
    }

    /// Takes a device off the guest's bus.
    pub async fn remove_device(&self, slot: u8) -> Result<()> {
        self.call("remove a device", Request::RemoveDevice { slot, owner: String::new() }, Vec::new()).await.map(drop)
    }

    async fn call(&self, action: &'static str, request: Request, files: Vec<File>) -> Result<Response> {
        self.call_within(self.call_deadline, action, request, files).await
    }

    async fn call_within(
        &self,
        limit: Duration,
        action: &'static str,
        request: Request,
        files: Vec<File>,
    ) -> Result<Response> {
        let path = self.paths.control();
        let failed = move |source| Error::Vmm { action: action.to_owned(), source };
        tokio::task::spawn_blocking(move || {
            let mut client = Client::connect(&path, Instant::now()).map_err(failed)?;
            let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            client.call(&request, &files, limit).map_err(failed)
        })
        .await
        .map_err(|e| Error::Internal(e.to_string()))?
    }

    /// Ends the VMM with SIGKILL and waits until it is gone.
    pub async fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        self.wait_exit().await;
    }

    /// Waits for the end of the guest for as long as `limit`, then kills.
    pub async fn wait_or_kill(&self, limit: Duration) {
        let begun = Instant::now();
        if tokio::time::timeout(limit, self.wait_exit()).await.is_err() {
            tracing::warn!(sandbox = %self.id, waited = ?begun.elapsed(), "guest did not power off: killing its VMM");
            self.kill().await;
        }
    }
}

/// What the agent says of itself on its connection to `listener`.
///
/// The guest's kernel gives a connection two seconds, which a host short of time may need to
/// notice it: then it is closed without a word, and the agent comes again.
async fn announcement(listener: &UnixListener) -> std::io::Result<String> {
    loop {
        let line = ready_line(listener.accept().await?.0).await?;
        if !line.is_empty() {
            return Ok(line);
        }
    }
}

/// The first line of `stream`, of 64 bytes at most; empty if it was closed without a word.
async fn ready_line(mut stream: UnixStream) -> std::io::Result<String> {
    let mut line = [0; 64];
    let mut length = 0;
    while let Some(rest) = line.get_mut(length..) {
        let got = stream.read(rest).await?;
        length += got;
        if got == 0 || rest.is_empty() || line.get(..length).is_some_and(|l| l.contains(&b'\n')) {
            break;
        }
    }
    let _ = stream.shutdown().await;
    Ok(String::from_utf8_lossy(line.get(..length).unwrap_or_default()).into_owned())
}

/// Why the process behind the pidfd ended; reaps it if it is our child.
fn exit_reason(pidfd: std::os::fd::BorrowedFd<'_>, log: &Path) -> String {
    let status = rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED).ok().flatten();
    let words = match &status {
        Some(status) => match (status.exit_status(), status.terminating_signal()) {
            (Some(0), _) => "the guest powered off".to_owned(),
            (Some(code), _) => format!("the VMM ended with exit code {code}"),
            (_, Some(signal)) => format!("the VMM was killed by signal {signal}"),
            _ => "the VMM ended".to_owned(),
        },
        None => "the VMM ended".to_owned(),
    };
    let said = fs::read(log).unwrap_or_default();
    let said = String::from_utf8_lossy(said.get(said.len().saturating_sub(2048)..).unwrap_or_default());
    let said: Vec<_> = said.lines().rev().take(3).map(str::trim).filter(|line| !line.is_empty()).collect();
    if said.is_empty() { words } else { format!("{words}: {}", said.into_iter().rev().collect::<Vec<_>>().join("; ")) }
}

/// Field 22 of /proc/PID/stat.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may contain anything, so count from its closing parenthesis.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_agent_whose_connection_was_given_up_may_come_again() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("ready")).unwrap();
        let agent = async {
            drop(UnixStream::connect(dir.path().join("ready")).await.unwrap());
            let mut stream = UnixStream::connect(dir.path().join("ready")).await.unwrap();
            stream.write_all(b"ready 0.1.0\n").await.unwrap();
            stream
        };
        let (line, _) = tokio::join!(announcement(&listener), agent);
        assert_eq!(line.unwrap(), "ready 0.1.0\n");
    }

    #[test]
    fn own_start_time_is_stable() {
        let first = start_time(std::process::id()).unwrap();
        assert!(first > 0);
        assert_eq!(start_time(std::process::id()), Some(first));
        assert_eq!(start_time(u32::MAX), None);
    }
}
