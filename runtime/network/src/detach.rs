//! Taking pods off their networks, and what becomes of a pod whose plugins do not.
//!
//! Every plugin of every network is asked, last first, whatever the others say. As long as one fails, the pod stays, as
//! its namespace does, which some plugins need: stopping it asks those again. Some fail for ever, such as macvlan's once
//! its master is gone. A pod must not stay for ever because of that, and an address must not be lost without a word. So
//! after a time the namespace goes, and what is in it; the record moves to those of pods that are gone; and the plugins
//! are asked again at times, until they do, or an administrator removes the record.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::cancel::Cancel;
use crate::cni::{Attachment, Chain};
use crate::lock::How;
use crate::netns::Netns;
use crate::network::{NETNS, Network, PREFIX};
use crate::record::{Durable, Failing, Found, Record, id_of, is_id};
use crate::{Error, Mode, Pod, Result};

/// How often plugins are asked at least before a pod goes without them: a daemon that was not there for long has
/// asked once.
const ROUNDS: u32 = 3;
/// Between two times that plugins are asked for pods that are gone: at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));
/// The most characters of what plugins have said that are on record.
const SAID_LIMIT: usize = 2000;

impl Network {
    /// Takes a pod off its networks and removes its network namespace, by what its record says. Nothing happens if
    /// there is none. If something else is being done for the pod's network, that is asked to end first.
    ///
    /// If the host lost its power while the record was written, `pod` and the networks that are configured now say what
    /// there is to undo; a pod of which nothing but the id is known will do.
    ///
    /// # Errors
    /// Something is left ([`Error::is_left`]), or the record cannot be used. All that can be undone is. It may be done
    /// again at any time. A pod whose plugins go on failing for `network.del_seconds` is let go without them.
    pub async fn detach(&self, pod: Pod, record: PathBuf) -> Result<()> {
        let done = self.on_thread(move |network| network.detach_by(&pod, &record)).await;
        if self.shared.left_behind.load(Ordering::Relaxed) {
            self.settle_later(PAUSES.0);
        }
        done
    }

    pub(crate) fn detach_by(&self, pod: &Pod, path: &Path) -> Result<()> {
        if fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
            && !self.shared.turns.is_taken(path)
        {
            return Ok(());
        }
        let _turn = self.shared.turns.take(path, Arc::new(Cancel::new()?), self.plugins.limit)?;
        let mut record = match Record::read(path, &pod.id, &self.config.netns_directory)? {
            Found::None => return Ok(()),
            Found::Whole(record) => record,
            Found::Torn => self.by_configuration(pod)?,
        };
        let _with_others = self.lock(How::Shared, None)?;
        match self.undo(&mut record, path) {
            Err(Error::NotUndone(_)) if self.is_overdue(&record) => self.let_go(&pod.id, record, path),
            done => done,
        }
    }

    /// What a pod has joined, as far as it can be told without a record.
    fn by_configuration(&self, pod: &Pod) -> Result<Record> {
        if !is_id(&pod.id) {
            return Err(Error::Invalid(format!("{:?} is no sandbox id, 64 hexadecimal digits", pod.id)));
        }
        let mut record = Record::new(self.config.netns_directory.join(format!("{NETNS}{}", pod.id)));
        let lists = match self.lists() {
            _ if self.config.cni == Mode::Off => Vec::new(),
            Err(Error::NotConfigured(_)) => Vec::new(),
            lists => lists?,
        };
        let networks: Vec<_> = lists.iter().map(|list| list.name.clone()).collect();
        tracing::warn!(
            sandbox = pod.id,
            ?networks,
            "the record of the pod's network was lost with the host's power: the pod is taken off the networks that are configured now"
        );
        let (args, capabilities) = (pod.args().unwrap_or_default(), pod.capabilities().unwrap_or_default());
        record.attachments = lists
            .into_iter()
            .enumerate()
            .map(|(number, list)| {
                let (args, capabilities) = (args.clone(), capabilities.clone());
                Attachment::new(list, format!("{PREFIX}{number}"), pod.id.clone(), args, capabilities)
            })
            .collect();
        Ok(record)
    }

    /// Undoes everything on record, last first, and removes the record if that worked.
    pub(crate) fn undo(&self, record: &mut Record, path: &Path) -> Result<()> {
        let netns = Netns::at(record.netns.clone());
        let name = if netns.exists() { record.netns.to_string_lossy().into_owned() } else { String::new() };
        let failures = self.del(record, &name);
        if failures.is_empty() {
            netns.remove()?;
            return Record::remove(path);
        }
        let left = Error::NotUndone(failures);
        let now = now();
        let before = record.failing.take().filter(|failing| failing.since <= now);
        let (since, rounds) = before.map_or((now, 0), |failing| (failing.since, failing.rounds));
        let said = left.to_string().chars().take(SAID_LIMIT).collect();
        record.failing = Some(Failing { since, rounds: rounds.saturating_add(1), said });
        if let Err(error) = record.write(path, Durable::No) {
            // What is there says enough; plugins may be asked once more than need be.
            tracing::warn!(%error, "not on record which plugins have failed");
        }
        Err(left)
    }

    fn del(&self, record: &mut Record, netns: &str) -> Vec<Error> {
        let chain = Chain::new(&self.plugins);
        record.attachments.iter_mut().rev().flat_map(|attachment| chain.del(attachment, netns)).collect()
    }

    fn is_overdue(&self, record: &Record) -> bool {
        let over = |failing: &Failing| {
            failing.rounds >= ROUNDS && now().saturating_sub(failing.since) >= self.shared.del_limit.as_secs()
        };
        record.failing.as_ref().is_some_and(over)
    }

    /// Lets a pod go without the plugins that fail. They are asked once more when its namespace is gone.
    fn let_go(&self, id: &str, mut record: Record, path: &Path) -> Result<()> {
        Netns::at(record.netns.clone()).remove()?;
        let failures = self.del(&mut record, "");
        if failures.is_empty() {
            return Record::remove(path);
        }
        let directory = &self.shared.left;
        fs::create_dir_all(directory).map_err(Error::path("create the directory", directory))?;
        let kept = directory.join(format!("{id}.json"));
        record.write(&kept, Durable::Yes)?;
        tracing::error!(
            sandbox = id,
            error = %joined(&failures),
            result = %json!(record.attachments.iter().map(|attachment| &attachment.result).collect::<Vec<_>>()),
            "the pod goes although plugins do not take it off its networks: they may keep its addresses, and are asked again at times; if what they have made is gone, remove {}",
            kept.display()
        );
        self.shared.left_behind.store(true, Ordering::Relaxed);
        Record::remove(path)
    }

    /// Asks the plugins again that have failed for pods that are gone. Returns how many pods they still fail for.
    ///
    /// # Errors
    /// The records of those pods cannot be listed.
    pub async fn settle(&self) -> Result<usize> {
        self.on_thread(|network| network.settle_now()).await
    }

    fn settle_now(&self) -> Result<usize> {
        let mut left = 0;
        for path in self.left()? {
            let Some(id) = id_of(&path) else { continue };
            if let Err(error) = self.settle_one(id, &path) {
                left += 1;
                tracing::warn!(sandbox = id, %error, record = %path.display(), "what a pod that is gone had on its networks is left");
            }
        }
        self.shared.left_behind.store(left > 0, Ordering::Relaxed);
        Ok(left)
    }

    fn settle_one(&self, id: &str, path: &Path) -> Result<()> {
        let Some(_turn) = self.shared.turns.try_take(path, Arc::new(Cancel::new()?)) else { return Ok(()) };
        match Record::read(path, id, &self.config.netns_directory)? {
            Found::None => Ok(()),
            Found::Torn => Err(Error::Record { path: path.into(), reason: "is torn".into() }),
            Found::Whole(mut record) => {
                let _with_others = self.lock(How::Shared, None)?;
                self.undo(&mut record, path)
            }
        }
    }

    /// Asks them in the background, `first` after that long, and then more and more rarely, until none fails.
    pub(crate) fn settle_later(&self, first: Duration) {
        if self.shared.settling.swap(true, Ordering::AcqRel) {
            return;
        }
        let network = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(first).await;
            let mut pause = PAUSES.0;
            while !matches!(network.settle().await, Ok(0)) {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
            }
            network.shared.settling.store(false, Ordering::Release);
        });
    }

    /// Records of pods that are gone.
    fn left(&self) -> Result<Vec<PathBuf>> {
        let directory = &self.shared.left;
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::path("list", directory)(error)),
        };
        let paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
        let paths = paths.map_err(Error::path("list", directory))?;
        Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|end| end == "json")).collect())
    }

    /// What pods that are gone have left, in the form that CRI clients show.
    pub(crate) fn describe_left(&self) -> Vec<Value> {
        let left = self.left().unwrap_or_default();
        let described = left.iter().map(|path| {
            let mut described = Map::new();
            described.insert("Record".into(), json!(path));
            if let Some(Ok(Found::Whole(record))) =
                id_of(path).map(|id| Record::read(path, id, &self.config.netns_directory))
            {
                described.insert("Failing".into(), json!(record.failing));
            }
            Value::Object(described)
        });
        described.collect()
    }
}

fn joined(errors: &[Error]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
