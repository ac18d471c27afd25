//! Collects the exit status of every child, which is PID 1's oldest duty.
//!
//! A process that someone waits for is registered while its parent is still the helper
//! that made it: the agent cannot have reaped it before it is the agent's child, so no
//! status is lost and no process id is mistaken for a later one.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + signal for a process that a signal ended.
    pub code: i32,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// Nanoseconds since the Unix epoch.
    pub finished_at: i64,
}

impl Exit {
    fn new(status: WaitStatus) -> Self {
        let code = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => code,
            (None, Some(signal)) => 128 + signal,
            (None, None) => 255,
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            code,
            signal: status.terminating_signal(),
            finished_at: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        }
    }
}

/// The exit of one process, once it is known.
pub type ExitWatch = watch::Receiver<Option<Exit>>;

/// The table of processes someone waits for.
#[derive(Debug, Default)]
pub struct Reaper {
    watched: Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>,
}

impl Reaper {
    /// Follows `pid` to its end. It must not be a child of this process yet, or have been
    /// started by this thread without a pause since.
    pub fn register(&self, pid: i32) -> ExitWatch {
        let (sender, receiver) = watch::channel(None);
        self.lock().insert(pid, sender);
        receiver
    }

    /// Subscribes to the end of children. Separate from [`Reaper::run`] so that no child
    /// can end unheard before the task first runs.
    pub fn listen() -> io::Result<Signal> {
        signal(SignalKind::child())
    }

    /// Reaps for ever.
    pub async fn run(self: Arc<Self>, mut children: Signal) {
        loop {
            self.reap();
            if children.recv().await.is_none() {
                return;
            }
        }
    }

    fn reap(&self) {
        // One SIGCHLD may stand for several children.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(sender) = self.lock().remove(&pid.as_raw_nonzero().get()) {
                // Nobody listening any more is fine.
                let _ = sender.send(Some(Exit::new(status)));
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i32, watch::Sender<Option<Exit>>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const UNKNOWN: Exit = Exit { code: 255, signal: None, finished_at: 0 };

/// Waits until the process behind `watch` has ended.
pub async fn ended(watch: &mut ExitWatch) -> Exit {
    match watch.wait_for(Option::is_some).await {
        Ok(exit) => (*exit).unwrap_or(UNKNOWN),
        // The reaper lives as long as the agent.
        Err(_) => UNKNOWN,
    }
}
