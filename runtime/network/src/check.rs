//! Whether a pod's network is as it was made.
//!
//! Plugins are asked (CHECK), and some always find something amiss: portmap 1.1.1 looks for the rules of a pod that has
//! an IPv4 address among those for IPv6, too. What such a plugin says of a pod tells nothing. Which plugins these are
//! comes out by asking all of them when the network has just been made and is in order: what one finds amiss then, it
//! will go on finding. That is asked in the background, when no pod is being started, one pod after the other, and kept
//! on record. If a daemon ends before, or a pod is of an older one, a plugin that finds something amiss may be right or
//! not, and that is what is said; one that finds nothing amiss is believed from then on.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nacelle_netlink::Netlink;
use tokio::sync::Semaphore;

use crate::cancel::Cancel;
use crate::cni::{Chain, Check, NetworkList, Plugins};
use crate::netns::Netns;
use crate::network::Network;
use crate::record::{Durable, Found, Record};
use crate::{Error, Result};

/// How long after a network has been made its plugins are asked: not while its pod is being started. A pod that is gone
/// by then costs nothing.
const DELAY: Duration = Duration::from_secs(5);
/// How long they wait for a moment in which no pod is being started, and how often they look for it.
const QUIET: (Duration, Duration) = (Duration::from_secs(60), Duration::from_millis(100));
/// How many pods' plugins are asked at once when a daemon asks for all of its pods.
const AT_ONCE: usize = 4;
/// The most pods that wait for it: beyond, a host has more urgent things to do.
const WAITING_LIMIT: usize = 4096;

/// Something that is not as it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The network.
    pub network: String,
    /// The plugin that says so; empty if it is seen without one.
    pub plugin: String,
    /// What is amiss, in its words.
    pub what: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "network {:?}: {}", self.network, self.what)
    }
}

/// What is known of a pod's network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// What is amiss.
    pub amiss: Vec<Finding>,
    /// What plugins find amiss of which it is not known whether they would not have found the same in what they had
    /// just made; and what plugins could not be asked.
    pub unsure: Vec<Finding>,
}

/// The pods whose plugins will be asked for the first time.
#[derive(Debug)]
pub struct Checks {
    waiting: Mutex<Waiting>,
    /// How many pods are being started.
    starting: AtomicUsize,
    delay: Duration,
    at_once: Semaphore,
}

#[derive(Debug, Default)]
struct Waiting {
    /// When, the pod, its record.
    pods: VecDeque<(Instant, String, PathBuf)>,
    /// Whether there is a thread for them.
    attended: bool,
}

/// A pod is being started until this is dropped.
pub struct Starting<'a>(&'a Checks);

impl Default for Checks {
    fn default() -> Self {
        let (waiting, starting, at_once) = (Mutex::default(), AtomicUsize::new(0), Semaphore::new(AT_ONCE));
        Self { waiting, starting, delay: DELAY, at_once }
    }
}

impl Checks {
    /// Tells that a pod is being started.
    pub fn starting(&self) -> Starting<'_> {
        self.starting.fetch_add(1, Ordering::Relaxed);
        Starting(self)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub fn at_once() -> Self {
        Self { delay: Duration::ZERO, ..Self::default() }
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.starting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Network {
    /// Looks whether the network of the sandbox `id` is as it was made, and asks all plugins. Nothing is known of a pod
    /// without a record, or one for whose network something else is being done.
    ///
    /// # Errors
    /// The record cannot be used.
    pub async fn check(&self, id: String, record: PathBuf) -> Result<Checked> {
        // Nobody closes it.
        let _turn = self.shared.checks.at_once.acquire().await;
        self.on_thread(move |network| network.check_now(&id, &record, false)).await
    }

    /// Looks in a while, for the first time.
    pub(crate) fn check_later(&self, id: &str, record: &Path) {
        let checks = &self.shared.checks;
        let mut waiting = checks.waiting();
        if waiting.pods.len() >= WAITING_LIMIT {
            return;
        }
        waiting.pods.push_back((Instant::now() + checks.delay, id.into(), record.into()));
        if waiting.attended {
            return;
        }
        let network = self.clone();
        let attend = move || network.attend();
        // Without a thread, plugins that find something amiss later are not believed.
        waiting.attended = thread::Builder::new().name("network-check".into()).spawn(attend).is_ok();
    }

    fn attend(&self) {
        let checks = &self.shared.checks;
        loop {
            let (due, id, record) = {
                let mut waiting = checks.waiting();
                let Some(next) = waiting.pods.pop_front() else {
                    waiting.attended = false;
                    return;
                };
                next
            };
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let patience = Instant::now() + QUIET.0;
            while checks.starting.load(Ordering::Relaxed) > 0 && Instant::now() < patience {
                thread::sleep(QUIET.1);
            }
            match self.check_now(&id, &record, true) {
                Err(error) => tracing::debug!(sandbox = id, %error, "plugins not asked"),
                Ok(checked) => {
                    for finding in checked.amiss.iter().chain(&checked.unsure) {
                        tracing::debug!(sandbox = id, %finding, "amiss in what has just been made");
                    }
                }
            }
        }
    }

    /// `first` says that all is in order, so that plugins can be judged by what they say.
    pub(crate) fn check_now(&self, id: &str, path: &Path, first: bool) -> Result<Checked> {
        let mut checked = Checked::default();
        let cancel = Arc::new(Cancel::new()?);
        // What is being done for the pod changes its network.
        let Some(_turn) = self.shared.turns.try_take(path, cancel.clone()) else { return Ok(checked) };
        let Found::Whole(mut record) = Record::read(path, id, &self.config.netns_directory)? else {
            return Ok(checked);
        };
        let netns = Netns::at(record.netns.clone());
        let seen = |network: &str, what: String| Finding { network: network.into(), plugin: String::new(), what };
        if !netns.exists() {
            checked.amiss.push(seen("", format!("the network namespace {} is gone", netns.path().display())));
            return Ok(checked);
        }
        let links = netns.enter(|| Ok(Netlink::open()?.links()?))?;
        let plugins = Plugins { cancel: Some(cancel), ..(*self.plugins).clone() };
        let mut learnt = false;
        for attachment in &mut record.attachments {
            let network = attachment.list.name.clone();
            if attachment.result.is_some() && !links.iter().any(|link| link.name == attachment.interface) {
                checked.amiss.push(seen(&network, format!("the interface {} is gone", attachment.interface)));
            }
            for (index, said) in Chain::new(&plugins).check(attachment, &netns.path().to_string_lossy()) {
                let known = attachment.checks.get(&index).copied();
                let learns = match (&said, known) {
                    (Ok(()), _) => Some(Check::Passed),
                    (Err(Error::Plugin { .. }), None) if first => Some(Check::Wrong),
                    _ => known,
                };
                if let Some(check) = learns.filter(|_| learns != known) {
                    attachment.checks.insert(index, check);
                    learnt = true;
                }
                let Err(error) = said else { continue };
                let plugin = attachment.list.plugins.get(index).map(NetworkList::kind).unwrap_or_default().into();
                let finding = Finding { network: network.clone(), plugin, what: error.to_string() };
                match (error, learns) {
                    (Error::Cancelled, _) => return Ok(Checked::default()),
                    (Error::Plugin { .. }, Some(Check::Passed)) => checked.amiss.push(finding),
                    (Error::Plugin { .. }, Some(Check::Wrong)) => {
                        tracing::debug!(sandbox = id, %finding, "it found something amiss in what it had just made, too");
                    }
                    _ => checked.unsure.push(finding),
                }
            }
        }
        // The record of the result goes to the disk with it.
        if learnt || first {
            record.write(path, Durable::Yes)?;
        }
        Ok(checked)
    }
}
