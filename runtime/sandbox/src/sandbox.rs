//! One sandbox: its guest, its containers, and the operations that change them.
//!
//! The operations here run on the sandbox's queue, one at a time. What is asked often
//! (state, lists) is read from the state behind a lock that is held for a copy only.

mod adopt;
mod attend;
mod containers;
mod end;
mod events;
mod host;
mod network;
mod settle;
mod start;
mod teardown;
mod update;
mod volumes;

pub use network::network_pod;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nacelle_network::Network;

use crate::agent::{Agent, Reach};
use crate::beneath::Directory;
use crate::cgroup::Cgroup;
use crate::container::{Container, Followed};
use crate::events::Events;
use crate::layout::PodPaths;
use crate::model::{ContainerState, ContainerStatus, SandboxState, SandboxStatus};
use crate::queue::Queue;
use crate::record::{SandboxRecord, Stored, Unusable};
use crate::stats::Rates;
use crate::templates::Templates;
use crate::vm::Vm;
use crate::{Error, ManagerConfig, Result};

/// Exit code of a container whose process could not be started.
const NOT_STARTED: i32 = 128;

/// A sandbox.
#[derive(Debug)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// Orders the operations on it.
    pub queue: Queue,
    manager: Arc<ManagerConfig>,
    templates: Templates,
    network: Network,
    paths: PodPaths,
    agent: Agent,
    rates: Rates,
    events: Events,
    /// Whether there is nothing of it on the host any more.
    removed: AtomicBool,
    /// Whether its removal was told.
    gone: AtomicBool,
    me: Weak<Self>,
    record: Arc<Stored<SandboxRecord>>,
    /// Why its record is left as it is, if it cannot be used.
    kept: Option<Unusable>,
    attention: attend::Attention,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    vm: Option<Arc<Vm>>,
    /// Why it is not taken over from the daemon before, while it is not.
    not_adopted: Option<String>,
    containers: BTreeMap<String, Arc<Container>>,
}

/// What sandboxes are made with.
#[derive(Debug, Clone)]
pub struct Means {
    /// Guests to be cloned, and the configuration.
    pub templates: Templates,
    /// The networks of the host.
    pub network: Network,
    /// Where events are told.
    pub events: Events,
}

impl Sandbox {
    /// A new sandbox; nothing is done yet.
    pub fn new(means: Means, paths: PodPaths, record: SandboxRecord) -> Arc<Self> {
        let record = Stored::new(paths.record(), record);
        Self::with(means, paths, record, None, Inner::default(), Vec::new())
    }

    /// A sandbox as its record and those of its containers say. [`Sandbox::adopt`] finds out what is there of it.
    pub fn restored(
        means: Means,
        paths: PodPaths,
        record: SandboxRecord,
        containers: Vec<Arc<Container>>,
    ) -> Arc<Self> {
        let inner = Inner { not_adopted: Some("it was not looked at yet".into()), ..Inner::default() };
        let record = Stored::read(paths.record(), record);
        Self::with(means, paths, record, None, inner, containers)
    }

    /// What is known of a sandbox whose record cannot be used.
    pub fn kept(
        means: Means,
        paths: PodPaths,
        sketch: SandboxRecord,
        why: Unusable,
        containers: Vec<Arc<Container>>,
    ) -> Arc<Self> {
        let inner = Inner { not_adopted: Some(why.to_string()), ..Inner::default() };
        let record = Stored::kept(paths.record(), sketch);
        Self::with(means, paths, record, Some(why), inner, containers)
    }

    fn with(
        means: Means,
        paths: PodPaths,
        record: Stored<SandboxRecord>,
        kept: Option<Unusable>,
        inner: Inner,
        containers: Vec<Arc<Container>>,
    ) -> Arc<Self> {
        let Means { templates, network, events } = means;
        let manager = templates.config().clone();
        let agent = Agent::new(paths.vsock(), manager.call_deadline(), manager.unknown_after());
        let id = record.lock().id.clone();
        let sandbox = Arc::new_cyclic(|me| Self {
            id,
            queue: Queue::new(),
            manager,
            templates,
            network,
            paths,
            agent,
            rates: Rates::default(),
            events,
            removed: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            me: me.clone(),
            record: Arc::new(record),
            kept,
            attention: attend::Attention::default(),
            inner: Mutex::new(inner),
        });
        for container in &containers {
            sandbox.enter(container);
        }
        sandbox.tell_reach();
        sandbox
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its agent's client.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Where it is in its life.
    pub fn state(&self) -> SandboxState {
        self.record.lock().state
    }

    /// A copy of its record.
    fn record(&self) -> SandboxRecord {
        self.record.get()
    }

    /// It as it is, for those who ask.
    pub fn status(&self) -> SandboxStatus {
        let not_adopted = self.lock().not_adopted.clone();
        let record = self.record();
        let running = record.state == SandboxState::Ready;
        SandboxStatus {
            id: self.id.clone(),
            config: record.config,
            state: record.state,
            created_at: record.created_at,
            ips: record.ips,
            vmm_pid: record.vmm.filter(|_| running).map(|process| process.pid),
            message: record.message,
            size: record.size,
            silent_since: self.agent.reach().silent_since(),
            not_adopted,
            versions: record.versions,
        }
    }

    /// One of its containers as it is. When the guest has not answered for long nobody knows
    /// whether it still runs.
    pub fn container_status(&self, container: &Container) -> ContainerStatus {
        let mut status = container.status();
        if status.state == ContainerState::Running && matches!(self.agent.reach(), Reach::Unknown { .. }) {
            status.state = ContainerState::Unknown;
        }
        status
    }

    /// Its containers, those being made included.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.lock().containers.values().cloned().collect()
    }

    /// One container.
    pub fn container(&self, id: &str) -> Option<Arc<Container>> {
        self.lock().containers.get(id).cloned()
    }

    /// Refuses what would change a pod whose record cannot be used.
    pub fn changeable(&self) -> Result<()> {
        match &self.kept {
            None => Ok(()),
            Some(why) => Err(self.is_kept(why)),
        }
    }

    /// Why its record is left as it is, if it cannot be used.
    pub fn why_kept(&self) -> Option<&Unusable> {
        self.kept.as_ref()
    }

    fn is_kept(&self, why: &Unusable) -> Error {
        Error::Kept { thing: format!("sandbox {}", self.id), reason: why.to_string() }
    }

    /// Changes the record and tells a new state; [`Sandbox::save`] brings it to the disk.
    fn change(&self, change: impl FnOnce(&mut SandboxRecord)) {
        let (before, after) = self.record.change(|record| {
            let before = record.state;
            change(record);
            (before, record.state)
        });
        self.tell_change(before, after);
    }

    /// Changes the record, and waits until it is on disk.
    ///
    /// # Errors
    /// The disk does not take it. It is changed all the same, and may be saved later.
    async fn update(&self, change: impl FnOnce(&mut SandboxRecord)) -> Result<()> {
        self.change(change);
        self.save().await
    }

    /// Writes the record, if it was changed.
    async fn save(&self) -> Result<()> {
        let record = self.record.clone();
        blocking(move || record.save()).await
    }

    /// The readings of what it used before.
    pub fn rates(&self) -> &Rates {
        &self.rates
    }

    /// The directory of all pods, whose file system its writable disk is on.
    pub fn pods_directory(&self) -> PathBuf {
        self.paths.root.parent().map(PathBuf::from).unwrap_or_default()
    }

    /// How it and its guest are configured.
    pub fn configuration(&self) -> &ManagerConfig {
        &self.manager
    }

    /// Its cgroup on the host, whether it is there or not.
    pub fn cgroup(&self) -> Result<Cgroup> {
        let parent = self.record.lock().config.cgroup_parent.clone();
        Cgroup::named(&parent, &self.id)
    }

    /// Ends what is in its cgroup, and removes it.
    async fn remove_cgroup(&self) -> Result<()> {
        self.cgroup()?.remove_within(self.manager.call_deadline()).await
    }

    /// What it takes to follow a process of its guest.
    fn followed(&self, vm: &Arc<Vm>) -> Followed {
        let (agent, vm, drain) = (self.agent.clone(), vm.clone(), self.manager.call_deadline());
        Followed { agent, vm, drain, ended: self.attention.call() }
    }

    fn vm(&self) -> Result<Arc<Vm>> {
        let (vm, not_adopted) = {
            let inner = self.lock();
            (inner.vm.clone(), inner.not_adopted.clone())
        };
        let (state, message) = {
            let record = self.record.lock();
            (record.state, record.message.clone())
        };
        let running = matches!(state, SandboxState::Ready | SandboxState::Creating);
        match (vm, not_adopted) {
            (Some(vm), _) if running => Ok(vm),
            (None, Some(reason)) if running => Err(Error::NotAdopted { id: self.id.clone(), reason }),
            _ => {
                let reason = if message.is_empty() { "it was stopped".to_owned() } else { message };
                Err(Error::GuestGone { id: self.id.clone(), reason })
            }
        }
    }
}

/// Runs what may wait for a disk where nobody waits for it but the caller.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::Internal(e.to_string()))?
}

fn make_directory(path: &std::path::Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::io("create directory", path))
}

/// Removes a directory with all that is in it. Nothing happens if there is none. Blocks.
pub fn remove_directory(path: &std::path::Path) -> Result<()> {
    let Some((parent, name)) = path.parent().zip(path.file_name()) else { return Ok(()) };
    if !path.exists() {
        return Ok(());
    }
    // Not what is mounted below it, and nothing that a link in it leads to.
    Directory::open(parent)?.remove_tree(name).map(drop)
}

fn remove_file(path: &std::path::Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}
