//! One container: its state, and the tasks that follow its process.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nacelle_proto::agent::v1 as api;
use nacelle_proto::stdio::Stream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::agent::{self, Agent};
use crate::clock;
use crate::live::Live;
use crate::log::{Location, LogFile, Sink, pump};
use crate::model::{ContainerState, ContainerStatus, ExitInfo, ExitReason};
use crate::record::{self, ContainerRecord};
use crate::stdin::Stdin;
use crate::vm::{End, Vm};
use crate::{Error, Result};

/// Exit code of a container whose guest went away under it: its processes were killed.
const KILLED: i32 = 137;
/// Pause before the agent is asked again after a broken connection.
const RETRY: Duration = Duration::from_millis(200);

/// Told of every new state of a container, by its id.
pub struct Watcher(Box<Watch>);

type Watch = dyn Fn(&str, ContainerState) + Send + Sync;

impl Watcher {
    /// Calls `watch`, which must not change the container.
    pub fn new(watch: impl Fn(&str, ContainerState) + Send + Sync + 'static) -> Self {
        Self(Box::new(watch))
    }
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watcher")
    }
}

/// A container of a sandbox.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Where its record is.
    path: PathBuf,
    record: Mutex<ContainerRecord>,
    state: watch::Sender<ContainerState>,
    /// Told of every new state.
    watcher: OnceLock<Watcher>,
    /// Its log, while its process runs.
    log: Mutex<Option<Arc<LogFile>>>,
    /// Its standard input.
    pub stdin: Arc<Stdin>,
    /// Its standard output, or its terminal's.
    pub stdout: Arc<Live>,
    /// Its standard error.
    pub stderr: Arc<Live>,
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
        Arc::new(Self {
            id: record.id.clone(),
            path,
            record: Mutex::new(record),
            state,
            watcher: OnceLock::new(),
            log: Mutex::default(),
            stdin: Arc::default(),
            stdout: Arc::default(),
            stderr: Arc::default(),
        })
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
            user: record.user,
            stop_signal: record.stop_signal,
        }
    }

    /// Has every new state told to `watcher`; the first one stays.
    pub fn watch(&self, watcher: Watcher) {
        let _ = self.watcher.set(watcher);
    }

    /// Changes the record, writes it, then shows the new state.
    pub fn update(&self, change: impl FnOnce(&mut ContainerRecord)) -> Result<()> {
        let (before, state, result) = {
            let mut record = self.lock();
            let before = record.state;
            change(&mut record);
            (before, record.state, record::write(&self.path, &*record))
        };
        self.state.send_replace(state);
        if let Some(Watcher(watch)) = self.watcher.get().filter(|_| before != state) {
            watch(&self.id, state);
        }
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

    /// Opens the log, so that it exists before the process does. Blocks. After a failure it can be tried again.
    pub fn open_log(&self) -> Result<Option<Arc<LogFile>>> {
        let record = self.record();
        if record.log_path.is_empty() {
            return Ok(None);
        }
        let location = Location::new(record.log_path.as_ref(), record.config.log_path.as_ref())?;
        let (log, place) = LogFile::open(location, record.log)?;
        if record.log != Some(place) {
            self.update(|record| record.log = Some(place))?;
        }
        Ok(Some(Arc::new(log)))
    }

    /// Goes on in a new log file, which exists when this returns. Blocks.
    pub fn reopen_log(&self) -> Result<()> {
        self.expect(ContainerState::Running, "reopen its log")?;
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match log {
            Some(log) => log.reopen(|place| self.update(|record| record.log = Some(place))),
            None => Ok(()),
        }
    }

    /// Follows the running process: carries its output into the log and records its end.
    /// The end becomes visible only after the output is complete.
    pub fn follow(self: &Arc<Self>, agent: Agent, vm: Arc<Vm>, log: Option<Arc<LogFile>>, drain: Duration) {
        *self.log.lock().unwrap_or_else(PoisonError::into_inner) = log.clone();
        let container = self.clone();
        let mut streams = vec![(Stream::Stdout, self.stdout.clone())];
        match self.lock().config.tty {
            true => self.stderr.end(),
            false => streams.push((Stream::Stderr, self.stderr.clone())),
        }
        let mut pumps = JoinSet::new();
        for (stream, live) in streams {
            let sink = Sink { log: log.clone(), live };
            pumps.spawn(pump(agent.clone(), vm.clone(), self.id.clone(), stream, sink));
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
            container.stdout.end();
            container.stderr.end();
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
    pub fn guest_gone(&self, end: &End) {
        self.exited(gone(end));
    }
}

fn gone(end: &End) -> ExitInfo {
    ExitInfo {
        code: KILLED,
        reason: if end.out_of_memory { "OOMKilled" } else { "SandboxDied" }.into(),
        message: format!("the guest of the pod ended: {end}"),
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
            end = vm.wait_exit() => return gone(&end),
        }
        tokio::select! {
            end = vm.wait_exit() => return gone(&end),
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// The agent's answer in our words.
fn exit_info(answer: &api::WaitResponse) -> ExitInfo {
    // The agent tells whether the kernel killed any process of the container for want of memory.
    // Its first one was that process only if it was killed at all.
    let reason = match (answer.exit_code, answer.oom_killed) {
        (0, _) => ExitReason::Completed,
        (KILLED, true) => ExitReason::OomKilled,
        _ => ExitReason::Error,
    };
    let finished_at = if answer.finished_at > 0 { answer.finished_at } else { clock::now() };
    ExitInfo { code: answer.exit_code, reason, message: String::new(), finished_at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_out_of_memory_only_if_its_first_process_was_killed() {
        let reason = |exit_code, oom_killed| {
            exit_info(&api::WaitResponse { exit_code, oom_killed, ..api::WaitResponse::default() }).reason
        };
        assert_eq!(reason(0, false), ExitReason::Completed);
        assert_eq!(reason(0, true), ExitReason::Completed, "it got over the end of one of its children");
        assert_eq!(reason(137, true), ExitReason::OomKilled);
        assert_eq!(reason(137, false), ExitReason::Error, "somebody killed it");
        assert_eq!(reason(1, true), ExitReason::Error, "it ended by itself, if because of a child");
        assert_eq!(reason(143, true), ExitReason::Error);
    }
}
