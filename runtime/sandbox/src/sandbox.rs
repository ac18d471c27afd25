//! One sandbox: its guest, its containers, and the operations that change them.
//!
//! The operations here run on the sandbox's queue, one at a time. What is asked often
//! (state, lists) is read from the state behind a lock that is held for a copy only.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nacelle_image::Image;
use nacelle_proto::agent::v1 as api;
use tokio::net::UnixListener;

use crate::agent::Agent;
use crate::cgroup::Cgroup;
use crate::clock;
use crate::container::Container;
use crate::layout::PodPaths;
use crate::model::{ContainerConfig, ContainerState, ExitInfo, SandboxState, SandboxStatus};
use crate::queue::Queue;
use crate::record::{self, ContainerRecord, SandboxRecord};
use crate::vm::Vm;
use crate::{Error, ManagerConfig, Result, scratch, signal, spec};

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
    paths: PodPaths,
    agent: Agent,
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
    pub fn new(manager: Arc<ManagerConfig>, paths: PodPaths, record: SandboxRecord) -> Arc<Self> {
        let agent = Agent::new(paths.vsock(), manager.call_deadline());
        Arc::new(Self {
            id: record.id.clone(),
            queue: Queue::new(),
            manager,
            paths,
            agent,
            inner: Mutex::new(Inner { record, vm: None, containers: BTreeMap::new() }),
        })
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
            vmm_pid: inner.record.vmm.filter(|_| running).map(|process| process.pid),
            message: inner.record.message.clone(),
        }
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
        let mut inner = self.lock();
        change(&mut inner.record);
        record::write(&self.paths.record(), &inner.record)
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

    /// Makes the guest. On failure nothing of it is left.
    pub async fn start(self: &Arc<Self>) -> Result<()> {
        match self.try_start().await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.discard().await;
                Err(error)
            }
        }
    }

    async fn try_start(self: &Arc<Self>) -> Result<()> {
        // The record comes first: whatever exists under this id has an owner.
        make_directory(&self.paths.root)?;
        make_directory(&self.paths.run)?;
        self.update(|_| {})?;
        let config = self.lock().record.config.clone();
        let manager = self.manager.clone();
        let cgroup = Cgroup::create(&config.cgroup_parent, &self.id)?;
        let socket = self.paths.ready_socket();
        let listener = UnixListener::bind(&socket).map_err(Error::io("listen on", &socket))?;
        let vm = Arc::new(Vm::spawn(&self.manager, &self.id, &self.paths, cgroup.as_ref())?);
        self.lock().vm = Some(vm.clone());
        self.update(|record| record.vmm = Some(vm.process()))?;
        // While the guest boots, its disk is made.
        let disk = self.paths.scratch();
        let copy = tokio::task::spawn_blocking(move || {
            let template = scratch::template(&manager.root.join("templates"), manager.guest.scratch_mib)?;
            scratch::create(&template, &disk)
        });
        vm.ready(listener, self.manager.boot_deadline()).await?;
        let _ = fs::remove_file(&socket);
        copy.await.map_err(|e| Error::Internal(e.to_string()))??;
        let path = self.paths.scratch();
        let disk = fs::File::options().read(true).write(true).open(&path).map_err(Error::io("open", &path))?;
        let slot = vm.add_disk(false, vec![disk]).await?;
        let now = clock::now();
        let request = api::ConfigureSandboxRequest {
            hostname: if config.hostname.is_empty() { config.name.clone() } else { config.hostname.clone() },
            resolv_conf: config.dns.resolv_conf().into_bytes(),
            hosts: Vec::new(),
            sysctls: config.sysctls.clone().into_iter().collect(),
            scratch: Some(api::Device { slot: slot.into() }),
            clock_seconds: now.div_euclid(1_000_000_000),
            clock_nanoseconds: i32::try_from(now.rem_euclid(1_000_000_000)).unwrap_or(0),
        };
        let mut client = self.agent.client();
        let configured = self.agent.call("configure the sandbox", client.configure_sandbox(request));
        tokio::select! {
            result = configured => result.map(drop)?,
            reason = vm.wait_exit() => {
                return Err(Error::Boot { id: self.id.clone(), reason, console: vm.console() });
            }
        }
        self.update(|record| record.state = SandboxState::Ready)?;
        self.watch(vm);
        Ok(())
    }

    /// Takes hold of a guest that an earlier daemon started. Fails if it does not answer.
    pub async fn adopt(self: &Arc<Self>, containers: Vec<Arc<Container>>) -> Result<()> {
        let gone = |reason: &str| Error::GuestGone { id: self.id.clone(), reason: reason.into() };
        let process = self.lock().record.vmm.ok_or_else(|| gone("it was never started"))?;
        let vm = Vm::attach(&self.manager, &self.id, &self.paths, process)
            .map(Arc::new)
            .ok_or_else(|| gone("its VMM ended while no daemon was there"))?;
        {
            let mut inner = self.lock();
            inner.vm = Some(vm.clone());
            inner.containers = containers.iter().map(|c| (c.id.clone(), c.clone())).collect();
        }
        let mut client = self.agent.client();
        let list = client.list_containers(api::ListContainersRequest {});
        let known = match self.agent.call("list the guest's containers", list).await {
            Ok(list) => Some(list.containers),
            Err(error) => {
                // A guest that does not answer now may answer later: it is not lost yet.
                tracing::warn!(sandbox = %self.id, %error, "guest adopted as recorded");
                None
            }
        };
        for container in containers {
            match &known {
                Some(known) => {
                    let there = known.iter().find(|info| info.container_id == container.id);
                    self.adopt_container(&vm, &container, there).await?;
                }
                None if container.state() == ContainerState::Running => self.follow(&vm, &container)?,
                None => {}
            }
        }
        self.watch(vm);
        Ok(())
    }

    /// Brings a container's record and the guest's view together.
    async fn adopt_container(
        &self,
        vm: &Arc<Vm>,
        container: &Arc<Container>,
        there: Option<&api::ContainerInfo>,
    ) -> Result<()> {
        use api::container_info::State;
        match (container.state(), there.map(api::ContainerInfo::state)) {
            (ContainerState::Exited, _) | (ContainerState::Created, Some(State::Created)) => {}
            // Half made: nobody was told its id.
            (ContainerState::Creating, _) => {
                self.tear_down_container(container).await?;
                container.forget()?;
                self.lock().containers.remove(&container.id);
            }
            (_, None | Some(State::Unspecified)) => container.exited(ExitInfo {
                code: NOT_STARTED,
                reason: "Error".into(),
                message: "the guest no longer knows the container".into(),
                finished_at: clock::now(),
            }),
            // Running as recorded, or started by a daemon that ended before it could say so.
            (_, Some(_)) => self.follow(vm, container)?,
        }
        Ok(())
    }

    /// Goes on following a container whose process was started earlier.
    fn follow(&self, vm: &Arc<Vm>, container: &Arc<Container>) -> Result<()> {
        let (log, held) = container.open_log()?;
        container.update(|record| {
            record.state = ContainerState::Running;
            if record.started_at == 0 {
                record.started_at = clock::now();
            }
        })?;
        container.follow(self.agent.clone(), vm.clone(), log, held, self.manager.call_deadline());
        Ok(())
    }

    /// A sandbox whose guest is gone for good, with what is known of its containers.
    pub fn restore_ended(&self, containers: Vec<Arc<Container>>, reason: &str) -> Result<()> {
        for container in &containers {
            if container.state() != ContainerState::Exited {
                container.guest_gone(reason);
            }
        }
        self.lock().containers = containers.into_iter().map(|c| (c.id.clone(), c)).collect();
        self.release()?;
        self.update(|record| {
            if record.state != SandboxState::NotReady {
                record.state = SandboxState::NotReady;
                record.message = reason.into();
            }
        })
    }

    /// Follows the guest: when it ends by itself, so do its containers.
    fn watch(self: &Arc<Self>, vm: Arc<Vm>) {
        let sandbox = Arc::downgrade(self);
        tokio::spawn(async move {
            let reason = vm.wait_exit().await;
            if let Some(sandbox) = Weak::upgrade(&sandbox) {
                let queue = sandbox.queue.clone();
                let result = queue.run(async move { sandbox.guest_ended(&reason, &vm.console()) }).await;
                if let Err(error) = result {
                    tracing::error!(%error, "end of a guest not recorded");
                }
            }
        });
    }

    fn guest_ended(&self, reason: &str, console: &str) -> Result<()> {
        if self.state() != SandboxState::Ready {
            return Ok(());
        }
        tracing::warn!(sandbox = %self.id, "guest ended by itself: {reason}{console}");
        for container in self.containers() {
            container.guest_gone(reason);
        }
        self.release()?;
        self.update(|record| {
            record.state = SandboxState::NotReady;
            record.message = format!("{reason}{console}");
        })
    }

    /// Ends the containers and the guest. Idempotent.
    pub async fn stop(&self) -> Result<()> {
        let vm = match self.state() {
            SandboxState::NotReady => return self.release(),
            _ => self.lock().vm.clone(),
        };
        if let Some(vm) = vm {
            let limit = self.manager.call_deadline();
            let running: Vec<_> =
                self.containers().into_iter().filter(|c| c.state() == ContainerState::Running).collect();
            for container in &running {
                if let Err(error) = self.signal(&container.id, signal::KILL, true).await {
                    tracing::warn!(container = container.id, %error, "container not killed: the guest's end will do");
                }
            }
            // Their last output is in the logs when they are seen to have ended.
            let ended = async {
                for container in &running {
                    container.wait_exited().await;
                }
            };
            let _ = tokio::time::timeout(limit, ended).await;
            if let Err(error) = self.agent.shutdown().await {
                tracing::warn!(sandbox = %self.id, %error, "guest does not shut down: killing its VMM");
                vm.kill().await;
            }
            vm.wait_or_kill(limit).await;
        }
        for container in self.containers() {
            container.guest_gone("the sandbox was stopped");
        }
        self.release()?;
        self.update(|record| record.state = SandboxState::NotReady)
    }

    /// Stops it if need be and removes all there is of it.
    pub async fn remove(&self) -> Result<()> {
        self.stop().await?;
        remove_directory(&self.paths.run)?;
        remove_directory(&self.paths.root)
    }

    /// Removes what a start that failed has made.
    async fn discard(&self) {
        let vm = self.lock().vm.take();
        if let Some(vm) = vm {
            vm.kill().await;
        }
        let parent = self.lock().record.config.cgroup_parent.clone();
        let results = [
            Cgroup::named(&parent, &self.id).and_then(|cgroup| cgroup.remove()),
            remove_directory(&self.paths.run),
            remove_directory(&self.paths.root),
        ];
        for error in results.into_iter().filter_map(Result::err) {
            tracing::error!(sandbox = %self.id, %error, "left for the sweep at the next start");
        }
    }

    /// Gives back what only a running guest needs.
    fn release(&self) -> Result<()> {
        let parent = self.lock().record.config.cgroup_parent.clone();
        Cgroup::named(&parent, &self.id)?.remove()?;
        self.lock().vm = None;
        remove_directory(&self.paths.run)?;
        remove_file(&self.paths.scratch())
    }

    /// Makes a container.
    pub async fn create_container(
        &self,
        id: String,
        config: ContainerConfig,
        image: Image,
        defaults: spec::ImageDefaults,
        stop_signal: u32,
    ) -> Result<()> {
        let vm = self.vm()?;
        if self.state() != SandboxState::Ready {
            return Err(Error::GuestGone { id: self.id.clone(), reason: "it is not ready".into() });
        }
        let status = self.status();
        let hostname = if status.config.hostname.is_empty() { &status.config.name } else { &status.config.hostname };
        let spec = spec::build(&config, &defaults, hostname, &format!("/pod/{id}"))?;
        let spec_json = serde_json::to_vec(&spec).map_err(|e| Error::Internal(e.to_string()))?;
        let log_path = match (status.config.log_directory.as_str(), config.log_path.as_str()) {
            ("", _) | (_, "") => String::new(),
            (directory, path) => std::path::Path::new(directory).join(path).to_string_lossy().into_owned(),
        };
        let request = api::CreateContainerRequest {
            container_id: id.clone(),
            spec_json,
            rootfs: None,
            user: spec::user(&config.security.user, &defaults),
            stdin: config.stdin,
            terminal: config.tty,
            readonly_rootfs: config.security.readonly_rootfs,
            ..api::CreateContainerRequest::default()
        };
        let record = ContainerRecord {
            id: id.clone(),
            sandbox_id: self.id.clone(),
            config,
            image_id: image.id.clone(),
            log_path,
            stop_signal,
            state: ContainerState::Creating,
            created_at: clock::now(),
            started_at: 0,
            exit: None,
            slot: None,
        };
        make_directory(&self.paths.containers())?;
        let container = Container::create(self.paths.container(&id), record)?;
        self.lock().containers.insert(id.clone(), container.clone());
        let made = self.build_container(&vm, &container, &image, request).await;
        if made.is_err() {
            if let Err(error) = self.tear_down_container(&container).await {
                tracing::error!(container = id, %error, "left in the guest until the pod ends");
            }
            self.lock().containers.remove(&id);
            container.forget()?;
        }
        made
    }

    async fn build_container(
        &self,
        vm: &Arc<Vm>,
        container: &Arc<Container>,
        image: &Image,
        mut request: api::CreateContainerRequest,
    ) -> Result<()> {
        let files = image.open_rootfs()?;
        let slot = vm.add_disk(true, files).await?;
        container.update(|record| record.slot = Some(slot))?;
        request.rootfs = Some(api::Device { slot: slot.into() });
        let mut client = self.agent.client();
        self.agent.call("create the container", client.create_container(request)).await?;
        container.update(|record| record.state = ContainerState::Created)
    }

    /// Starts a created container.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let container = self.container(id).ok_or_else(|| Error::ContainerNotFound(id.into()))?;
        container.expect(ContainerState::Created, "start it")?;
        let vm = self.vm()?;
        let (log, held) = container.open_log()?;
        let mut client = self.agent.client();
        let request = api::StartContainerRequest { container_id: id.into() };
        let started_at = clock::now();
        match self.agent.call("start the container", client.start_container(request)).await {
            Ok(_) => {
                container.update(|record| {
                    record.state = ContainerState::Running;
                    record.started_at = started_at;
                })?;
                container.follow(self.agent.clone(), vm, log, held, self.manager.call_deadline());
                Ok(())
            }
            Err(error) => {
                container.exited(ExitInfo {
                    code: NOT_STARTED,
                    reason: "StartError".into(),
                    message: error.to_string(),
                    finished_at: clock::now(),
                });
                Err(error)
            }
        }
    }

    /// Removes a container, killing it first if it runs. Idempotent.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let Some(container) = self.container(id) else { return Ok(()) };
        if container.state() == ContainerState::Running {
            self.signal(id, signal::KILL, true).await?;
            let ended = tokio::time::timeout(self.manager.call_deadline(), container.wait_exited());
            ended.await.map_err(|_| Error::Deadline {
                action: format!("the end of container {id} after SIGKILL"),
                limit: self.manager.call_deadline(),
            })?;
        }
        if self.state() == SandboxState::Ready {
            self.tear_down_container(&container).await?;
        }
        container.forget()?;
        self.lock().containers.remove(id);
        Ok(())
    }

    /// Takes a container out of the guest and its disk off the bus.
    async fn tear_down_container(&self, container: &Container) -> Result<()> {
        let vm = self.vm()?;
        let mut client = self.agent.client();
        let request = api::RemoveContainerRequest { container_id: container.id.clone() };
        self.agent.call("remove the container", client.remove_container(request)).await?;
        match container.record().slot {
            Some(slot) => vm.remove_device(slot).await,
            None => Ok(()),
        }
    }

    /// Sends a signal to a container's process, or to all its processes.
    pub async fn signal(&self, id: &str, signal: u32, all: bool) -> Result<()> {
        let mut client = self.agent.client();
        let request = api::SignalRequest { container_id: id.into(), exec_id: String::new(), signal, all };
        self.agent.call("signal the container", client.signal(request)).await.map(drop)
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
