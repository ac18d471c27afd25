//! One container: its state, and the tasks that follow its process.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nacelle_proto::agent::v1 as api;
use nacelle_proto::stdio::Stream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::agent::{self, Agent};
use crate::clock;
use crate::log::{LogFile, format::Measure, pump};
use crate::model::{ContainerState, ContainerStatus, ExitInfo};
use crate::record::{self, ContainerRecord};
use crate::vm::Vm;
use crate::{Error, Result};

/// Exit code of a container whose guest went away under it: its processes were killed.
const KILLED: i32 = 137;
/// Pause before the agent is asked again after a broken connection.
const RETRY: Duration = Duration::from_millis(200);

/// A container of a sandbox.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Where its record is.
    path: PathBuf,
    record: Mutex<ContainerRecord>,
    state: watch::Sender<ContainerState>,
}

impl Container {
    /// A container as its record says, which is written now.
    pub fn create(path: PathBuf, record: ContainerRecord) -> Result<Arc<Self>> {
        record::write(&path, &record)?;
        Ok(Self::restore(path, record))
    }

    /// A container as its record on disk says.
    pub fn restore(path: PathBuf, record: ContainerRecord) -> Arc<Self> {
        let state = watch::Sender::new(record.state);
        Arc::new(Self { id: record.id.clone(), path, record: Mutex::new(record), state })
    }

    fn lock(&self) -> MutexGuard<'_, ContainerRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of its record.
    pub fn record(&self) -> ContainerRecord {
        self.lock().clone()
    }

    /// Where it is in its life.
    pub fn state(&self) -> ContainerState {
        self.lock().state
    }

    /// It as it is, for those who ask.
    pub fn status(&self) -> ContainerStatus {
        let record = self.record();
        ContainerStatus {
            id: record.id,
            sandbox_id: record.sandbox_id,
            config: record.config,
            image_id: record.image_id,
            state: record.state,
            created_at: record.created_at,
            started_at: record.started_at,
            exit: record.exit,
            log_path: record.log_path,
        }
    }

    /// Changes the record, writes it, then shows the new state.
    pub fn update(&self, change: impl FnOnce(&mut ContainerRecord)) -> Result<()> {
        let (state, result) = {
            let mut record = self.lock();
            change(&mut record);
            (record.state, record::write(&self.path, &*record))
        };
        self.state.send_replace(state);
        result
    }

    /// Removes the record.
    pub fn forget(&self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", &self.path)(error)),
            _ => Ok(()),
        }
    }

    /// Refuses unless the container is in `wanted`.
    pub fn expect(&self, wanted: ContainerState, action: &'static str) -> Result<()> {
        let state = self.state();
        if state == wanted {
            return Ok(());
        }
        let state = format!("{state:?}").to_lowercase();
        Err(Error::State { thing: format!("container {}", self.id), state, action })
    }

    /// Waits until it has ended (or never started and never will).
    pub async fn wait_exited(&self) {
        let mut state = self.state.subscribe();
        let _ = state.wait_for(|state| *state == ContainerState::Exited).await;
    }

    /// Opens the log, so that it exists before the process does.
    pub fn open_log(&self) -> Result<(Option<Arc<LogFile>>, Measure)> {
        let path = self.lock().log_path.clone();
        if path.is_empty() {
            return Ok((None, Measure::default()));
        }
        let (log, held) = LogFile::open(path.as_ref())?;
        Ok((Some(Arc::new(log)), held))
    }

    /// Follows the running process: carries its output into the log and records its end.
    /// The end becomes visible only after the output is complete.
    pub fn follow(
        self: &Arc<Self>,
        agent: Agent,
        vm: Arc<Vm>,
        log: Option<Arc<LogFile>>,
        held: Measure,
        drain: Duration,
    ) {
        let container = self.clone();
        let tty = self.lock().config.tty;
        let mut pumps = JoinSet::new();
        let streams: &[Stream] = if tty { &[Stream::Stdout] } else { &[Stream::Stdout, Stream::Stderr] };
        for stream in streams {
            // Without a log nothing tells where the last daemon stopped, and nobody minds.
            pumps.spawn(pump(agent.clone(), vm.clone(), self.id.clone(), *stream, log.clone(), held.of(*stream)));
        }
        tokio::spawn(async move {
            let exit = wait(&container.id, &agent, &vm).await;
            let drained = async { while pumps.join_next().await.is_some() {} };
            if tokio::time::timeout(drain, drained).await.is_err() {
                tracing::warn!(
                    container = container.id,
                    "output still open after the process ended: no longer waited for"
                );
            }
            container.exited(exit);
        });
    }

    /// Records the end, unless one is recorded already.
    pub fn exited(&self, exit: ExitInfo) {
        if self.state() == ContainerState::Exited {
            return;
        }
        let result = self.update(|record| {
            // The guest's clock may be a little behind the host's.
            let finished_at = exit.finished_at.max(record.started_at);
            record.state = ContainerState::Exited;
            record.exit = Some(ExitInfo { finished_at, ..exit });
        });
        if let Err(error) = result {
            tracing::error!(container = self.id, %error, "end of container not recorded on disk");
        }
    }

    /// The guest has gone: what had not ended has now.
    pub fn guest_gone(&self, reason: &str) {
        self.exited(gone(reason));
    }
}

fn gone(reason: &str) -> ExitInfo {
    ExitInfo {
        code: KILLED,
        reason: "SandboxDied".into(),
        message: format!("the guest of the pod ended: {reason}"),
        finished_at: clock::now(),
    }
}

/// Asks the agent until it knows the end, or the guest is gone.
async fn wait(id: &str, agent: &Agent, vm: &Vm) -> ExitInfo {
    loop {
        let mut client = agent.client();
        let request = api::WaitRequest { container_id: id.into(), exec_id: String::new() };
        tokio::select! {
            answer = client.wait(request) => match answer {
                Ok(answer) => return exit_info(&answer.into_inner()),
                Err(status) => {
                    if vm.exit().borrow().is_none() {
                        tracing::warn!(container = id, error = %agent::error("wait", &status), "asking the agent again");
                    }
                }
            },
            reason = vm.wait_exit() => return gone(&reason),
        }
        tokio::select! {
            reason = vm.wait_exit() => return gone(&reason),
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// The agent's answer in our words.
fn exit_info(answer: &api::WaitResponse) -> ExitInfo {
    let reason = match (answer.oom_killed, answer.exit_code) {
        (true, _) => "OOMKilled",
        (false, 0) => "Completed",
        (false, _) => "Error",
    };
    let finished_at = if answer.finished_at > 0 { answer.finished_at } else { clock::now() };
    ExitInfo { code: answer.exit_code, reason: reason.into(), message: String::new(), finished_at }
}
