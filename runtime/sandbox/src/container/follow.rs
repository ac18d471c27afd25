//! Following a container's process: its output into the log, its end onto the record.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nacelle_proto::agent::v1 as api;
use nacelle_proto::stdio::Stream;
use tokio::task::JoinSet;

use super::{Container, gone};
use crate::agent::{self, Agent};
use crate::log::{LogFile, Sink, pump};
use crate::model::ExitInfo;
use crate::replies;
use crate::vm::Vm;

/// Pause before the agent is asked again after a broken connection, or a log is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// The longest such pause for a log.
const LONGEST_RETRY: Duration = Duration::from_secs(10);

/// What it takes to follow a process.
#[derive(Debug, Clone)]
pub struct Followed {
    /// The agent that has it.
    pub agent: Agent,
    /// Its guest.
    pub vm: Arc<Vm>,
    /// How long output may take to be complete once the process has ended.
    pub drain: Duration,
    /// Told when the end is on record, in memory.
    pub ended: Arc<tokio::sync::Notify>,
}

impl Container {
    /// Follows the running process: carries its output into the log and records its end.
    /// The end becomes visible only after the output is complete. Nothing happens if it is followed already.
    ///
    /// A log that is not given is opened here, as often as it takes: until then the process's output stays in its guest.
    pub fn follow(self: &Arc<Self>, by: Followed, log: Option<Arc<LogFile>>) {
        if self.followed.swap(true, Ordering::Relaxed) {
            return;
        }
        let container = self.clone();
        tokio::spawn(async move {
            let carried = tokio::spawn({
                let (container, by) = (container.clone(), by.clone());
                async move { container.carry(&by, log).await }
            });
            let started_at = container.record.lock().started_at;
            let exit = wait(&container.id, &by, started_at).await;
            let stop = carried.abort_handle();
            if tokio::time::timeout(by.drain, carried).await.is_err() {
                tracing::warn!(
                    container = container.id,
                    "output not complete after the process ended: no longer waited for"
                );
                stop.abort();
            }
            container.stdout.end();
            container.stderr.end();
            container.exited(exit);
            by.ended.notify_one();
        });
    }

    /// Carries all output into the log.
    async fn carry(self: &Arc<Self>, by: &Followed, log: Option<Arc<LogFile>>) {
        let log = match log {
            Some(log) => {
                *self.log.lock().unwrap_or_else(PoisonError::into_inner) = Some(log.clone());
                Some(log)
            }
            None => self.open_log_at_last(&by.vm).await,
        };
        let mut streams = vec![(Stream::Stdout, self.stdout.clone())];
        match self.record.lock().config.tty {
            true => self.stderr.end(),
            false => streams.push((Stream::Stderr, self.stderr.clone())),
        }
        let mut pumps = JoinSet::new();
        for (stream, live) in streams {
            let sink = Sink { log: log.clone(), live };
            pumps.spawn(pump(by.agent.clone(), by.vm.clone(), self.id.clone(), stream, sink));
        }
        while pumps.join_next().await.is_some() {}
    }

    /// Opens the log of a process that runs already: when the disk, or whatever is amiss with it, lets it.
    async fn open_log_at_last(self: &Arc<Self>, vm: &Vm) -> Option<Arc<LogFile>> {
        let mut pause = RETRY;
        loop {
            let container = self.clone();
            let opened = tokio::task::spawn_blocking(move || container.attach_log()).await;
            let error = match opened {
                Ok(Ok(log)) => return log,
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            if pause == RETRY {
                tracing::error!(
                    container = self.id,
                    error,
                    "log cannot be opened: its output stays in the guest until it can"
                );
            }
            tokio::select! {
                _ = vm.wait_exit() => return None,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_RETRY),
            }
        }
    }
}

/// Asks the agent until it knows the end, or the guest is gone.
async fn wait(id: &str, by: &Followed, started_at: i64) -> ExitInfo {
    let mut complained = false;
    loop {
        let mut client = by.agent.client();
        let request = api::WaitRequest { container_id: id.into(), exec_id: String::new() };
        tokio::select! {
            answer = client.wait(request) => match answer {
                Ok(answer) => return replies::exit(&answer.into_inner(), started_at),
                Err(status) => {
                    if !by.vm.has_ended() && !complained {
                        complained = true;
                        tracing::warn!(container = id, error = %agent::error("wait", &status), "asking the agent again");
                    }
                }
            },
            end = by.vm.wait_exit() => return gone(&end),
        }
        tokio::select! {
            end = by.vm.wait_exit() => return gone(&end),
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}
