//! One container: its state and its record.

mod follow;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::clock;
use crate::failpoint::step;
use crate::live::Live;
use crate::log::{Location, LogFile};
use crate::model::{ContainerState, ContainerStatus, ExitInfo, ExitReason};
use crate::record::{ContainerRecord, Stored, Unusable};
use crate::stdin::Stdin;
use crate::vm::End;
use crate::{Error, Result};

pub use follow::Followed;

/// Exit code of a container whose guest went away under it: its processes were killed.
const KILLED: i32 = 137;

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
    record: Arc<Stored<ContainerRecord>>,
    /// Why its record is left as it is, if it cannot be used.
    kept: Option<Unusable>,
    state: watch::Sender<ContainerState>,
    /// Told of every new state.
    watcher: OnceLock<Watcher>,
    /// Its log, while its process runs.
    log: Mutex<Option<Arc<LogFile>>>,
    /// Whether its process is followed.
    followed: AtomicBool,
    /// Since when it has been asked to start and nobody knows whether it did.
    unsettled: Mutex<Option<Instant>>,
    /// Its standard input.
    pub stdin: Arc<Stdin>,
    /// Its standard output, or its terminal's.
    pub stdout: Arc<Live>,
    /// Its standard error.
    pub stderr: Arc<Live>,
}

impl Container {
    /// A container as its record says, which is not on disk yet: see [`Container::save`].
    pub fn create(path: PathBuf, record: ContainerRecord) -> Arc<Self> {
        Self::with(Stored::new(path, record), None)
    }

    /// A container as its record on disk says.
    pub fn restore(path: PathBuf, record: ContainerRecord) -> Arc<Self> {
        Self::with(Stored::read(path, record), None)
    }

    /// What is known of a container whose record cannot be used.
    pub fn kept(path: PathBuf, sketch: ContainerRecord, why: Unusable) -> Arc<Self> {
        Self::with(Stored::kept(path, sketch), Some(why))
    }

    fn with(record: Stored<ContainerRecord>, kept: Option<Unusable>) -> Arc<Self> {
        let known = record.get();
        let (id, state) = (known.id, known.state);
        Arc::new(Self {
            id,
            record: Arc::new(record),
            kept,
            state: watch::Sender::new(state),
            watcher: OnceLock::new(),
            log: Mutex::default(),
            followed: AtomicBool::new(false),
            unsettled: Mutex::default(),
            stdin: Arc::default(),
            stdout: Arc::default(),
            stderr: Arc::default(),
        })
    }

    /// A copy of its record.
    pub fn record(&self) -> ContainerRecord {
        self.record.get()
    }

    /// Where it is in its life.
    pub fn state(&self) -> ContainerState {
        match self.record.lock().state {
            ContainerState::Created if self.is_unsettled() => ContainerState::Unknown,
            state => state,
        }
    }

    /// Why its record is left as it is, if it cannot be used.
    pub fn why_kept(&self) -> Option<&Unusable> {
        self.kept.as_ref()
    }

    /// Refuses what would change a container whose record is another version's.
    pub fn changeable(&self) -> Result<()> {
        match &self.kept {
            None => Ok(()),
            Some(why) => Err(Error::Kept { thing: format!("container {}", self.id), reason: why.to_string() }),
        }
    }

    /// It as it is, for those who ask.
    pub fn status(&self) -> ContainerStatus {
        let state = self.state();
        let record = self.record();
        ContainerStatus {
            id: record.id,
            sandbox_id: record.sandbox_id,
            config: record.config,
            image_id: record.image_id,
            state,
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

    /// Changes the record and shows the new state; [`Container::save`] brings it to the disk.
    pub fn change(&self, change: impl FnOnce(&mut ContainerRecord)) {
        let before = self.state();
        self.record.change(change);
        self.show(before);
    }

    fn show(&self, before: ContainerState) {
        let state = self.state();
        self.state.send_replace(state);
        if let Some(Watcher(watch)) = self.watcher.get().filter(|_| before != state) {
            watch(&self.id, state);
        }
    }

    /// Changes the record, and waits until it is on disk.
    ///
    /// # Errors
    /// The disk does not take it. It is changed all the same, and [`Container::save`] may be tried again.
    pub async fn update(&self, change: impl FnOnce(&mut ContainerRecord)) -> Result<()> {
        self.change(change);
        self.save().await
    }

    /// Writes the record, if it was changed.
    ///
    /// # Errors
    /// The disk does not take it.
    pub async fn save(&self) -> Result<()> {
        let record = self.record.clone();
        tokio::task::spawn_blocking(move || record.save()).await.map_err(|e| Error::Internal(e.to_string()))?
    }

    /// Removes the record.
    ///
    /// # Errors
    /// It cannot be removed.
    pub async fn forget(&self) -> Result<()> {
        let record = self.record.clone();
        tokio::task::spawn_blocking(move || record.remove()).await.map_err(|e| Error::Internal(e.to_string()))?
    }

    /// Refuses unless the container is in `wanted`.
    pub fn require(&self, wanted: ContainerState, action: &'static str) -> Result<()> {
        let state = self.state();
        if state == wanted {
            return Ok(());
        }
        let state = format!("{state:?}").to_lowercase();
        Err(Error::State { thing: format!("container {}", self.id), state, action })
    }

    /// Whether it was asked to start, and nobody knows whether it did.
    pub fn is_unsettled(&self) -> bool {
        self.unsettled_for().is_some()
    }

    /// For how long that has been so.
    pub fn unsettled_for(&self) -> Option<Duration> {
        self.unsettled.lock().unwrap_or_else(PoisonError::into_inner).map(|since| since.elapsed())
    }

    /// Says whether somebody knows if it started.
    pub fn set_unsettled(&self, unsettled: bool) {
        let before = self.state();
        *self.unsettled.lock().unwrap_or_else(PoisonError::into_inner) = unsettled.then(Instant::now);
        self.show(before);
    }

    /// Waits until it has ended (or never started and never will).
    pub async fn wait_exited(&self) {
        let mut state = self.state.subscribe();
        let _ = state.wait_for(|state| *state == ContainerState::Exited).await;
    }

    /// Opens the log, so that it exists before the process does, and has its place on record before its first line.
    /// Blocks.
    ///
    /// # Errors
    /// The log, or the record, cannot be written.
    pub fn open_log(&self) -> Result<Option<Arc<LogFile>>> {
        let record = self.record();
        if record.log_path.is_empty() {
            return Ok(None);
        }
        let location = Location::new(record.log_path.as_ref(), record.config.log_path.as_ref())?;
        let (log, place) = LogFile::open(location, record.log)?;
        if record.log != Some(place) {
            self.change(|record| record.log = Some(place));
            self.record.save()?;
        }
        Ok(Some(Arc::new(log)))
    }

    /// The log of a process that runs, opened unless it is. Blocks.
    ///
    /// # Errors
    /// As [`Container::open_log`].
    fn attach_log(&self) -> Result<Option<Arc<LogFile>>> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if log.is_none() {
            *log = self.open_log()?;
        }
        Ok(log.clone())
    }

    /// Goes on in a new log file, which exists when this returns. Blocks.
    ///
    /// # Errors
    /// The container does not run, or the file cannot be made.
    pub fn reopen_log(&self) -> Result<()> {
        self.require(ContainerState::Running, "reopen its log")?;
        match self.attach_log()? {
            Some(log) => log.reopen(|place| {
                step!("reopen.opened");
                let before = self.record.get().log;
                self.change(|record| record.log = Some(place));
                // The log stays where it is then, and a record that is written later has to say so.
                self.record.save().inspect_err(|_| self.change(|record| record.log = before))?;
                step!("reopen.recorded");
                Ok(())
            }),
            None => Ok(()),
        }
    }

    /// Records the end, unless one is recorded already.
    pub fn exited(&self, exit: ExitInfo) {
        if self.record.lock().state == ContainerState::Exited {
            return;
        }
        *self.unsettled.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.change(|record| {
            record.state = ContainerState::Exited;
            record.exit = Some(exit);
        });
    }

    /// The guest has gone: what had not ended has now.
    pub fn guest_gone(&self, end: &End) {
        self.exited(gone(end));
    }
}

fn gone(end: &End) -> ExitInfo {
    ExitInfo {
        code: KILLED,
        reason: if end.out_of_memory { ExitReason::OomKilled } else { ExitReason::SandboxDied },
        message: format!("the guest of the pod ended: {end}"),
        finished_at: clock::now(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nacelle_proto::stdio::Stream;

    use super::*;
    use crate::record::sketch_container;

    #[test]
    fn a_rotation_that_no_record_tells_of_has_not_happened() {
        let directory = tempfile::tempdir().unwrap();
        let (records, away) = (directory.path().join("records"), directory.path().join("away"));
        fs::create_dir(&records).unwrap();
        let path = records.join("container.json");
        let (log, rotated) = (directory.path().join("0.log"), directory.path().join("0.log.1"));
        let mut record = sketch_container(&path, &"a".repeat(64), &"b".repeat(64));
        record.state = ContainerState::Running;
        record.log_path = log.to_string_lossy().into_owned();
        record.config.log_path = "0.log".into();
        let container = Container::create(path.clone(), record);
        let file = container.attach_log().unwrap().unwrap();
        file.append(Stream::Stdout, 4, b"t stdout F one\n").unwrap();

        // As a kubelet rotates a log, and takes that back when it fails.
        fs::rename(&log, &rotated).unwrap();
        fs::rename(&records, &away).unwrap();
        container.reopen_log().unwrap_err();
        fs::rename(&away, &records).unwrap();
        fs::rename(&rotated, &log).unwrap();
        file.append(Stream::Stdout, 4, b"t stdout F two\n").unwrap();
        container.record.save().unwrap();

        let next = Container::restore(path, container.record()).open_log().unwrap().unwrap();
        assert_eq!(next.offset(Stream::Stdout), 8, "the next daemon repeats nothing");
    }
}
