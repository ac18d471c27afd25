//! One guest from outside: start its VMM, wait until its agent is ready, see it end.
//!
//! The VMM is a process of its own that outlives the daemon. It is held by a pidfd, so
//! that a number reused by another process is never mistaken for it, and watched by a
//! task that publishes its end.

mod devices;
mod process;
mod words;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nacelle_vmm::config::{MachineConfig, Start};
use nacelle_vmm::control::ClientError;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OnceCell, watch};

use crate::cgroup::Cgroup;
use crate::failpoint::step;
use crate::handlers::GuestKind;
use crate::layout::PodPaths;
use crate::record::ProcessId;
use crate::{Error, ManagerConfig, Result, oom};

pub use devices::{Devices, Features, stop};

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
    features: OnceCell<Features>,
    exit: watch::Receiver<Option<End>>,
}

impl Vm {
    /// Starts the VMM process in the pod's cgroup and with the pod's `oom_score_adj`; [`Vm::ready`] waits for the
    /// guest.
    pub async fn spawn(
        config: &ManagerConfig,
        id: &str,
        paths: &PodPaths,
        kind: &GuestKind,
        start: Start,
        cgroup: Option<&Cgroup>,
        oom_score_adj: i16,
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
            kernel: kind.guest.kernel.clone(),
            initramfs: kind.guest.initramfs.clone(),
            cmdline: config.guest_command_line(&kind.guest),
            memory_mib: kind.size.memory_mib,
            vcpus: kind.size.vcpus,
            vsock: paths.vsock(),
            control: paths.control(),
            console: paths.console(),
            start,
        };
        let text = serde_json::to_vec(&machine).map_err(|e| Error::Internal(e.to_string()))?;
        fs::write(paths.vmm_config(), text).map_err(Error::io("write", paths.vmm_config()))?;
        step!("vm.config");
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
        oom::prepare(&mut command, oom_score_adj);
        let program = config.program.clone();
        let spawned = tokio::task::spawn_blocking(move || command.spawn()).await;
        let pid = spawned.map_err(|e| Error::Internal(e.to_string()))?.map_err(Error::io("start", program))?.id();
        step!("vm.spawned");
        // A child that nobody has waited for keeps its number, ended or not.
        let process = ProcessId::of(pid)
            .map_err(Error::io("look at", format!("/proc/{pid}")))?
            .ok_or_else(|| Error::Internal(format!("process {pid} has no stat")))?;
        Self::attach(config, id, paths, cgroup.cloned(), process)?
            .ok_or_else(|| Error::Internal(format!("process {pid} cannot be held")))
            .map(|vm| (vm, sign))
    }

    /// Takes hold of a VMM that was started earlier. None if it has ended for certain.
    ///
    /// # Errors
    /// It cannot be told whether it runs, or be watched (no descriptors). Nothing is wrong with it.
    pub fn attach(
        config: &ManagerConfig,
        id: &str,
        paths: &PodPaths,
        cgroup: Option<Cgroup>,
        process: ProcessId,
    ) -> Result<Option<Self>> {
        let failed = || Error::io("take hold of the VMM by", format!("/proc/{}", process.pid));
        let Some(pidfd) = process.hold().map_err(failed())?.map(Arc::new) else { return Ok(None) };
        let (ended, exit) = watch::channel(None);
        // SAFETY: the descriptor stays open and the same for as long as it is registered: the
        // AsyncFd holds a share of its only owner, which nobody can take it out of.
        let watched = unsafe { AsyncFd::register(pidfd.clone()) }.map_err(|error| failed()(error.into()))?;
        let run = paths.run.clone();
        tokio::spawn(async move {
            let _ = watched.readable().await;
            let told = tokio::task::spawn_blocking(move || {
                End::new(&words::exit_reason(watched.get_ref(), &run), cgroup.as_ref())
            });
            let end = told.await.unwrap_or_else(|_| End::new("its end was not observed", None));
            let _ = ended.send(Some(end));
        });
        let call_deadline = config.call_deadline();
        let features = OnceCell::new();
        Ok(Some(Self { id: id.into(), process, pidfd, paths: paths.clone(), call_deadline, features, exit }))
    }

    /// The VMM's process.
    pub fn process(&self) -> &ProcessId {
        &self.process
    }

    /// Has the host's kernel end it sooner or later than others when memory is short.
    pub fn set_oom_score_adj(&self, value: i16) {
        let runs = || {
            let mut ended = [PollFd::new(&self.pidfd, PollFlags::IN)];
            rustix::event::poll(&mut ended, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(0)
        };
        if let Err(error) = oom::change(self.process.pid, value, runs) {
            tracing::debug!(sandbox = %self.id, value, %error, "oom_score_adj of the VMM not changed");
        }
    }

    /// Becomes `Some` when the VMM has ended.
    pub fn exit(&self) -> watch::Receiver<Option<End>> {
        self.exit.clone()
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
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
                // The first question waits until the machine runs; so it is one whose answer is of use.
                match self.features.get_or_try_init(|| self.ask_features(deadline)).await {
                    Ok(_) => return Ok(()),
                    Err(error @ Error::Vmm { source: ClientError::Answer(_), .. }) => return Err(error),
                    // It has ended, and what is said of its end says more.
                    Err(_) => std::future::pending().await,
                }
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
        words::console(&self.paths.console())
    }

    /// The VMM's process, held.
    pub fn pidfd(&self) -> Arc<OwnedFd> {
        self.pidfd.clone()
    }

    /// How long a call to it may take.
    pub fn call_deadline(&self) -> Duration {
        self.call_deadline
    }

    /// Ends the VMM with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// It does not go, for it waits in the host's kernel: for a disk or a server that does not answer.
    pub async fn kill(&self) -> Result<()> {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        let gone = tokio::time::timeout(self.call_deadline, self.wait_exit()).await;
        gone.map(drop).map_err(|_| Error::Deadline {
            action: format!(
                "the end of VMM process {} after SIGKILL (it waits in the host's kernel)",
                self.process.pid
            ),
            limit: self.call_deadline,
        })
    }

    /// Waits for the end of the guest for as long as `limit`, then kills.
    ///
    /// # Errors
    /// See [`Vm::kill`].
    pub async fn wait_or_kill(&self, limit: Duration) -> Result<()> {
        let begun = Instant::now();
        if tokio::time::timeout(limit, self.wait_exit()).await.is_ok() {
            return Ok(());
        }
        tracing::warn!(sandbox = %self.id, waited = ?begun.elapsed(), "guest did not power off: killing its VMM");
        self.kill().await
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
}
