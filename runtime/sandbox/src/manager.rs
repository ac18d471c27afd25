//! All pods of the host: finds them by id, keeps names unique, passes operations on.

mod recover;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::future::Future;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nacelle_network::Network;
use tokio::sync::oneshot;

use crate::clock;
use crate::container::Container;
use crate::events::{EventStream, Events};
use crate::exec::{self, ExecOutput};
use crate::handlers::GuestKind;
use crate::layout::Layout;
use crate::model::{
    ContainerConfig, ContainerImages, ContainerState, ContainerStatus, Resources, SandboxConfig, SandboxState,
    SandboxStatus,
};
use crate::record::{SandboxRecord, Versions};
use crate::sandbox::{Means, Sandbox};
use crate::templates::Templates;
use crate::{Error, ManagerConfig, Result, id, recovery, signal, user_namespace};

/// The way in. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Manager {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Arc<ManagerConfig>,
    means: Means,
    layout: Layout,
    index: Mutex<Index>,
    /// Ids of pods that nobody owns, and templates that were being made, until they are removed.
    unowned: Mutex<(Vec<String>, Vec<String>)>,
    /// Whether the records were read.
    known: AtomicBool,
    // Held for the life of the daemon.
    _lock: File,
}

#[derive(Debug, Default)]
struct Index {
    sandboxes: BTreeMap<String, Arc<Sandbox>>,
    /// Container id to sandbox id.
    containers: BTreeMap<String, String>,
    /// Reserved name to the id that owns it.
    names: HashMap<String, String>,
}

impl Manager {
    /// Takes the directories over. What is on record there is not known yet: [`Manager::read_records`].
    ///
    /// # Errors
    /// Another daemon owns them, or they cannot be used.
    pub async fn open(config: ManagerConfig) -> Result<Self> {
        let layout = Layout::new(&config.root, &config.run)?;
        for directory in [layout.pods_root(), layout.pods_run()] {
            std::fs::create_dir_all(&directory).map_err(Error::io("create directory", &directory))?;
        }
        let lock = lock(&layout.lock())?;
        let config = Arc::new(config);
        let templates = Templates::open(config.clone(), layout.clone());
        let network = Network::new(config.network.clone(), config.root.join("networks"), config.timeout_scale);
        let events = Events::default();
        let means = Means { templates, network, events };
        let shared = Shared {
            config,
            means,
            layout,
            index: Mutex::default(),
            unowned: Mutex::default(),
            known: AtomicBool::new(false),
            _lock: lock,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Knows from then on what is on record. Nothing is done about it yet: [`Manager::recover`]. Before that nobody is to be
    /// told of pods, or to make any: their names may be taken.
    ///
    /// # Errors
    /// The directories of pods cannot be listed: then nothing can be said of any.
    pub async fn read_records(&self) -> Result<()> {
        let (looking, places) = (self.shared.means.clone(), self.shared.layout.clone());
        let found = tokio::task::spawn_blocking(move || {
            // Sandboxes have tasks of their own.
            recovery::look(&looking, &places)
        });
        let found = found.await.map_err(|e| Error::Internal(e.to_string()))??;
        for sandbox in found.sandboxes {
            self.enter(sandbox);
        }
        *self.shared.unowned.lock().unwrap_or_else(PoisonError::into_inner) = (found.unowned, found.templates);
        self.shared.known.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether what is on record is known.
    #[must_use]
    pub fn knows_records(&self) -> bool {
        self.shared.known.load(Ordering::Acquire)
    }

    /// Enters a pod that is on record, with its containers and their names.
    pub(crate) fn enter(&self, sandbox: Arc<Sandbox>) {
        let mut index = self.index();
        let status = sandbox.status();
        index.names.entry(sandbox_name(&status.config)).or_insert_with(|| sandbox.id.clone());
        // Nobody was told of those that are half made, and their names are free.
        for container in sandbox.containers().into_iter().filter(|c| c.state() != ContainerState::Creating) {
            let status = container.status();
            let name = container_name(&sandbox.id, &status.config);
            index.names.entry(name).or_insert_with(|| container.id.clone());
            index.containers.insert(container.id.clone(), sandbox.id.clone());
        }
        index.sandboxes.insert(sandbox.id.clone(), sandbox);
    }

    /// Makes sure that pods without limits have a guest to be cloned from, those of each handler. Returns at once: until
    /// there is one, they wait for it.
    pub fn prepare_template(&self) {
        let kinds = self.shared.config.guests().map(GuestKind::without_limits);
        self.shared.means.templates.prepare(kinds.collect());
    }

    /// Lets network plugins give back what they keep for pods that are gone. Returns at once:
    /// pods that join a network meanwhile wait for it.
    pub fn collect_network_garbage(&self) {
        let (network, layout) = (self.shared.means.network.clone(), self.shared.layout.clone());
        tokio::spawn(async move {
            if let Err(error) = network.collect_garbage(move || layout.networks()).await {
                tracing::warn!(%error, "network plugins may keep what no pod has");
            }
        });
    }

    /// The networks that pods join.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.shared.means.network
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.shared.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a pod and returns its id. If the caller goes away meanwhile, so does the pod.
    ///
    /// # Errors
    /// The name is taken, its annotations say what its handler does not let it, the guest does not come up.
    pub async fn run_sandbox(&self, config: SandboxConfig) -> Result<String> {
        self.shared.config.guest_of(&config)?;
        let id = id::new()?;
        let name = sandbox_name(&config);
        let record = SandboxRecord {
            id: id.clone(),
            config,
            state: SandboxState::Creating,
            created_at: clock::now(),
            vmm: None,
            message: String::new(),
            ips: Vec::new(),
            size: None,
            stopping: false,
            versions: Versions::default(),
        };
        let sandbox = {
            let mut index = self.index();
            index.reserve(&name, &id)?;
            let paths = self.shared.layout.pod(&id);
            let sandbox = Sandbox::new(self.shared.means.clone(), paths, record);
            index.sandboxes.insert(id.clone(), sandbox.clone());
            sandbox
        };
        let manager = self.clone();
        self.to_the_end(
            async move {
                let queue = sandbox.queue.clone();
                let starting = sandbox.clone();
                let made = queue.run_to_end(async move { starting.start().await }).await;
                // One that is left behind is listed, to be stopped.
                if made.is_err() && sandbox.state() == SandboxState::Creating {
                    manager.forget_sandbox(&id);
                }
                made.map(|()| id)
            },
            |manager, id| async move { manager.remove_sandbox(&id).await },
        )
        .await
    }

    /// Runs `make` to its end whatever becomes of the caller; if nobody is left to take
    /// what it made, `undo` removes it.
    async fn to_the_end<M, U, F>(&self, make: M, undo: U) -> Result<String>
    where
        M: Future<Output = Result<String>> + Send + 'static,
        U: FnOnce(Self, String) -> F + Send + 'static,
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let (answer, made) = oneshot::channel();
        let manager = self.clone();
        tokio::spawn(async move {
            if let Err(Ok(id)) = answer.send(make.await) {
                tracing::info!(id, "caller went away: removing what was made for it");
                if let Err(error) = undo(manager, id).await {
                    tracing::error!(%error, "not removed");
                }
            }
        });
        made.await.map_err(|_| Error::Internal("the operation ended abnormally".into()))?
    }

    /// Ends a pod's containers and its guest. Idempotent, also for ids that do not exist.
    ///
    /// # Errors
    /// Resources of the pod cannot be given back.
    pub async fn stop_sandbox(&self, id: &str) -> Result<()> {
        let Some(sandbox) = self.find_sandbox(id)? else { return Ok(()) };
        let queue = sandbox.queue.clone();
        queue.overtake(async move { sandbox.stop().await }).await
    }

    /// Removes a pod, stopping it if need be. Idempotent, also for ids that do not exist.
    ///
    /// # Errors
    /// Resources of the pod cannot be given back.
    pub async fn remove_sandbox(&self, id: &str) -> Result<()> {
        let Some(sandbox) = self.find_sandbox(id)? else { return Ok(()) };
        let queue = sandbox.queue.clone();
        let manager = self.clone();
        queue
            .overtake(async move {
                sandbox.remove().await?;
                manager.forget_sandbox(&sandbox.id);
                sandbox.tell_gone();
                Ok(())
            })
            .await
    }

    fn forget_sandbox(&self, id: &str) {
        let mut index = self.index();
        index.sandboxes.remove(id);
        let gone: Vec<_> =
            index.containers.iter().filter(|(_, owner)| *owner == id).map(|(container, _)| container.clone()).collect();
        for container in &gone {
            index.containers.remove(container);
        }
        index.names.retain(|_, owner| owner != id && !gone.contains(owner));
    }

    /// All pods.
    #[must_use]
    pub fn sandboxes(&self) -> Vec<SandboxStatus> {
        let sandboxes = self.all_sandboxes();
        sandboxes.iter().map(|s| s.status()).filter(|s| s.state != SandboxState::Creating).collect()
    }

    /// One pod, by its id or the beginning of it.
    ///
    /// # Errors
    /// There is none, or several fit.
    pub fn sandbox(&self, id: &str) -> Result<SandboxStatus> {
        self.require_sandbox(id).map(|sandbox| sandbox.status())
    }

    /// One pod with its containers, by its id or the beginning of it.
    ///
    /// # Errors
    /// There is none, or several fit.
    pub fn sandbox_with_containers(&self, id: &str) -> Result<(SandboxStatus, Vec<ContainerStatus>)> {
        self.require_sandbox(id).map(|sandbox| sandbox.snapshot())
    }

    /// What happens to pods and containers from now on.
    #[must_use]
    pub fn events(&self) -> EventStream {
        self.shared.means.events.listen()
    }

    /// Ends the streams of events, and those to come.
    pub fn end_events(&self) {
        self.shared.means.events.end();
    }

    /// Makes a container and returns its id. If the caller goes away meanwhile, so does
    /// the container.
    ///
    /// # Errors
    /// The pod is not ready, the name is taken, the configuration cannot be met.
    pub async fn create_container(
        &self,
        sandbox_id: &str,
        config: ContainerConfig,
        images: impl Into<ContainerImages>,
    ) -> Result<String> {
        let images = images.into();
        let sandbox = self.changeable_sandbox(sandbox_id)?;
        if config.security.privileged && !sandbox.status().config.privileged {
            return Err(Error::Invalid(
                "config.linux.security_context.privileged: the pod was not made for privileged containers: set \
                 linux.security_context.privileged in RunPodSandbox too"
                    .into(),
            ));
        }
        user_namespace::check(sandbox.status().config.user_namespace, &config)?;
        let stop_signal = match (config.stop_signal, images.root.config.stop_signal.as_str()) {
            (0, "") => signal::TERM,
            (0, name) => signal::parse(name)?,
            (number, _) => number,
        };
        let id = id::new()?;
        let name = container_name(&sandbox.id, &config);
        {
            let mut index = self.index();
            index.reserve(&name, &id)?;
            index.containers.insert(id.clone(), sandbox.id.clone());
        }
        let manager = self.clone();
        self.to_the_end(
            async move {
                let queue = sandbox.queue.clone();
                let new = id.clone();
                let making = sandbox.clone();
                let made =
                    queue.run(async move { making.create_container(new, config, images, stop_signal).await }).await;
                if made.is_err() {
                    manager.forget_container(&id);
                }
                made.map(|()| id)
            },
            |manager, id| async move { manager.remove_container(&id).await },
        )
        .await
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// It is not in that state, or its command cannot be executed.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let (sandbox, container) = self.require_container(id)?;
        let queue = sandbox.queue.clone();
        queue.run(async move { sandbox.start_container(&container.id).await }).await
    }

    /// Asks a container to end, and kills it if it has not after `grace`. Idempotent, also
    /// for ids that do not exist. If the caller goes away, nothing is killed early.
    ///
    /// # Errors
    /// The guest cannot deliver the signal.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let Some((sandbox, container)) = self.find_container(id)? else { return Ok(()) };
        if container.is_unsettled() {
            let (queue, settled) = (sandbox.queue.clone(), container.clone());
            queue.run(async move { sandbox.kill_unsettled(&settled).await }).await?;
            return self.wait_killed(&container).await;
        }
        if container.state() != ContainerState::Running {
            return Ok(());
        }
        sandbox.changeable()?;
        if !grace.is_zero() {
            match sandbox.signal(&container.id, container.record().stop_signal, false).await {
                Ok(()) => {
                    if tokio::time::timeout(grace, container.wait_exited()).await.is_ok() {
                        return Ok(());
                    }
                }
                // Its AppArmor profile may refuse signals. It would wait in vain for one.
                Err(error @ Error::Agent { .. }) => {
                    tracing::warn!(container = container.id, %error, "stop signal not sent: killing the container");
                }
                Err(error) => return Err(error),
            }
        }
        sandbox.signal(&container.id, signal::KILL, true).await?;
        self.wait_killed(&container).await
    }

    async fn wait_killed(&self, container: &Container) -> Result<()> {
        let limit = self.shared.config.call_deadline();
        let action = || format!("the end of container {} after SIGKILL", container.id);
        tokio::time::timeout(limit, container.wait_exited())
            .await
            .map_err(|_| Error::Deadline { action: action(), limit })
    }

    /// Removes a container, killing it if it runs. Idempotent, also for ids that do not exist.
    ///
    /// # Errors
    /// The guest does not let go of it.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let Some((sandbox, container)) = self.find_container(id)? else { return Ok(()) };
        let queue = sandbox.queue.clone();
        let manager = self.clone();
        queue
            .run(async move {
                let was_there = sandbox.remove_container(&container.id).await?;
                manager.forget_container(&container.id);
                if was_there {
                    sandbox.tell_removed(&container.id);
                }
                Ok(())
            })
            .await
    }

    fn forget_container(&self, id: &str) {
        let mut index = self.index();
        index.containers.remove(id);
        index.names.retain(|_, owner| owner != id);
    }

    /// All containers.
    #[must_use]
    pub fn containers(&self) -> Vec<ContainerStatus> {
        let sandboxes = self.all_sandboxes();
        sandboxes
            .iter()
            .flat_map(|sandbox| {
                sandbox.containers().into_iter().map(|c| sandbox.container_status(&c)).collect::<Vec<_>>()
            })
            .filter(|status| status.state != ContainerState::Creating)
            .collect()
    }

    /// One container, by its id or the beginning of it.
    ///
    /// # Errors
    /// There is none, or several fit.
    pub fn container(&self, id: &str) -> Result<ContainerStatus> {
        self.require_container(id).map(|(sandbox, container)| sandbox.container_status(&container))
    }

    /// Runs a command in a running container and waits for its end.
    ///
    /// # Errors
    /// The container does not run, the command cannot be executed, or it took longer than
    /// `limit`; then it is killed.
    pub async fn exec_sync(&self, id: &str, command: Vec<String>, limit: Option<Duration>) -> Result<ExecOutput> {
        let (sandbox, container) = self.require_container(id)?;
        container.require(ContainerState::Running, "run a command in it")?;
        if command.is_empty() {
            return Err(Error::Invalid("the command is empty".into()));
        }
        exec::exec_sync(sandbox.agent(), &container.id, exec::new_id()?, command, limit).await
    }

    /// Waits until a container has ended.
    ///
    /// # Errors
    /// There is no such container.
    pub async fn wait_container(&self, id: &str) -> Result<()> {
        let (_, container) = self.require_container(id)?;
        container.wait_exited().await;
        Ok(())
    }

    /// Changes a container's limits; what is zero or empty stays as it is.
    ///
    /// # Errors
    /// It has ended, or its guest is not large enough.
    pub async fn update_container(&self, id: &str, change: Resources) -> Result<()> {
        let (sandbox, container) = self.require_container(id)?;
        let queue = sandbox.queue.clone();
        queue.run(async move { sandbox.update_container(&container.id, change).await }).await
    }

    /// Changes a pod's own limits; what is zero or empty stays as it is.
    ///
    /// # Errors
    /// It is not ready, or its guest is not large enough.
    pub async fn update_sandbox(&self, id: &str, overhead: Resources, resources: Resources) -> Result<()> {
        let sandbox = self.changeable_sandbox(id)?;
        let queue = sandbox.queue.clone();
        queue.run(async move { sandbox.update_resources(overhead, resources).await }).await
    }

    /// Whether the kubelet names cgroups by systemd's slices.
    #[must_use]
    pub fn cgroups_are_slices(&self) -> bool {
        self.shared.config.cgroup_driver.is_systemd()
    }

    /// All sandboxes, those being made included.
    pub(crate) fn all_sandboxes(&self) -> Vec<Arc<Sandbox>> {
        self.index().sandboxes.values().cloned().collect()
    }

    /// Where the pods' records and writable disks are.
    pub(crate) fn pods_directory(&self) -> PathBuf {
        self.shared.layout.pods_root()
    }

    fn find_sandbox(&self, id: &str) -> Result<Option<Arc<Sandbox>>> {
        let index = self.index();
        Ok(resolve(&index.sandboxes, id)?.and_then(|id| index.sandboxes.get(id)).cloned())
    }

    pub(crate) fn require_sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        self.find_sandbox(id)?
            .filter(|sandbox| sandbox.state() != SandboxState::Creating)
            .ok_or_else(|| Error::SandboxNotFound(id.into()))
    }

    /// A pod that may be changed.
    fn changeable_sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        let sandbox = self.require_sandbox(id)?;
        sandbox.changeable()?;
        Ok(sandbox)
    }

    fn find_container(&self, id: &str) -> Result<Option<(Arc<Sandbox>, Arc<Container>)>> {
        let (sandbox, id) = {
            let index = self.index();
            let Some(id) = resolve(&index.containers, id)? else { return Ok(None) };
            let owner = index.containers.get(id).and_then(|owner| index.sandboxes.get(owner));
            (owner.cloned(), id.clone())
        };
        Ok(sandbox.and_then(|sandbox| sandbox.container(&id).map(|container| (sandbox, container))))
    }

    pub(crate) fn require_container(&self, id: &str) -> Result<(Arc<Sandbox>, Arc<Container>)> {
        self.find_container(id)?
            .filter(|(_, container)| container.state() != ContainerState::Creating)
            .ok_or_else(|| Error::ContainerNotFound(id.into()))
    }
}

impl Index {
    fn reserve(&mut self, name: &str, id: &str) -> Result<()> {
        match self.names.get(name) {
            Some(owner) => Err(Error::NameTaken { name: name.into(), owner: owner.clone() }),
            None => {
                self.names.insert(name.into(), id.into());
                Ok(())
            }
        }
    }
}

/// The one id that begins with `id`.
fn resolve<'a, T>(known: &'a BTreeMap<String, T>, id: &str) -> Result<Option<&'a String>> {
    if id.is_empty() {
        return Ok(None);
    }
    let mut fitting = known.range(id.to_owned()..).map(|(key, _)| key).take_while(|key| key.starts_with(id));
    match (fitting.next(), fitting.next()) {
        (Some(exact), Some(_)) if exact == id => Ok(Some(exact)),
        (Some(_), Some(_)) => Err(Error::AmbiguousId(id.into())),
        (only, _) => Ok(only),
    }
}

fn sandbox_name(config: &SandboxConfig) -> String {
    format!("{}_{}_{}_{}", config.name, config.namespace, config.uid, config.attempt)
}

fn container_name(sandbox_id: &str, config: &ContainerConfig) -> String {
    format!("{}_{sandbox_id}_{}", config.name, config.attempt)
}

/// Takes the lock that keeps a second daemon out.
fn lock(path: &Path) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("open", path))?;
    if rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        let holder = std::fs::read_to_string(path).unwrap_or_default();
        let holder = holder.trim().parse::<u32>().map(|pid| format!(" (process {pid})")).unwrap_or_default();
        return Err(Error::Locked { path: path.into(), holder });
    }
    // Only for messages: a full disk keeps no daemon from starting.
    if let Err(error) = std::fs::write(path, format!("{}\n", std::process::id())) {
        tracing::warn!(path = %path.display(), %error, "not written whose lock it is");
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_ids_find_the_one_they_fit() {
        let known: BTreeMap<String, ()> = ["ab12", "ab34", "c"].map(|id| (id.to_owned(), ())).into();
        assert_eq!(resolve(&known, "ab1").unwrap().unwrap(), "ab12");
        assert_eq!(resolve(&known, "c").unwrap().unwrap(), "c");
        assert!(resolve(&known, "x").unwrap().is_none());
        assert!(resolve(&known, "").unwrap().is_none());
        assert!(matches!(resolve(&known, "ab"), Err(Error::AmbiguousId(_))));
    }

    #[test]
    fn a_second_daemon_is_told_who_holds_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("daemon.lock");
        let first = lock(&path).unwrap();
        let error = lock(&path).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(first);
        lock(&path).unwrap();
    }
}
