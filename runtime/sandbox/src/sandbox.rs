//! One sandbox: its guest, its containers, and the operations that change them.
//!
//! The operations here run on the sandbox's queue, one at a time. What is asked often
//! (state, lists) is read from the state behind a lock that is held for a copy only.

mod adopt;
mod containers;
mod end;
mod events;
mod network;
mod start;
mod update;
mod volumes;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nacelle_network::Network;

use crate::agent::{Agent, Reach};
use crate::cgroup::Cgroup;
use crate::container::Container;
use crate::events::Events;
use crate::layout::PodPaths;
use crate::model::{ContainerState, ContainerStatus, SandboxState, SandboxStatus};
use crate::queue::Queue;
use crate::record::{self, SandboxRecord};
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
    /// Whether its removal was told.
    gone: AtomicBool,
    me: Weak<Self>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    record: SandboxRecord,
    vm: Option<Arc<Vm>>,
    containers: BTreeMap<String, Arc<Container>>,
}

impl Sandbox {
    /// A sandbox as its record says; nothing is done yet.
    pub fn new(
        templates: Templates,
        network: Network,
        events: Events,
        paths: PodPaths,
        record: SandboxRecord,
    ) -> Arc<Self> {
        let manager = templates.config().clone();
        let agent = Agent::new(paths.vsock(), manager.call_deadline(), manager.unknown_after());
        let sandbox = Arc::new_cyclic(|me| Self {
            id: record.id.clone(),
            queue: Queue::new(),
            manager,
            templates,
            network,
            paths,
            agent,
            rates: Rates::default(),
            events,
            gone: AtomicBool::new(false),
            me: me.clone(),
            inner: Mutex::new(Inner { record, vm: None, containers: BTreeMap::new() }),
        });
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
        self.lock().record.state
    }

    /// It as it is, for those who ask.
    pub fn status(&self) -> SandboxStatus {
        let inner = self.lock();
        let running = inner.record.state == SandboxState::Ready;
        SandboxStatus {
            id: self.id.clone(),
            config: inner.record.config.clone(),
            state: inner.record.state,
            created_at: inner.record.created_at,
            ips: inner.record.ips.clone(),
            vmm_pid: inner.record.vmm.filter(|_| running).map(|process| process.pid),
            message: inner.record.message.clone(),
            size: inner.record.size,
            silent_since: self.agent.reach().silent_since(),
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

    /// Changes the record and writes it.
    fn update(&self, change: impl FnOnce(&mut SandboxRecord)) -> Result<()> {
        let (before, state, result) = {
            let mut inner = self.lock();
            let before = inner.record.state;
            change(&mut inner.record);
            (before, inner.record.state, record::write(&self.paths.record(), &inner.record))
        };
        self.tell_change(before, state);
        result
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
        let parent = self.lock().record.config.cgroup_parent.clone();
        Cgroup::named(&parent, &self.id)
    }

    fn vm(&self) -> Result<Arc<Vm>> {
        let inner = self.lock();
        match (&inner.vm, inner.record.state) {
            (Some(vm), SandboxState::Ready | SandboxState::Creating) => Ok(vm.clone()),
            _ => {
                let reason = match inner.record.message.as_str() {
                    "" => "it was stopped".to_owned(),
                    message => message.to_owned(),
                };
                Err(Error::GuestGone { id: self.id.clone(), reason })
            }
        }
    }
}

fn make_directory(path: &std::path::Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::io("create directory", path))
}

fn remove_directory(path: &std::path::Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

fn remove_file(path: &std::path::Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}
