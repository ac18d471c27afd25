//! Operations on the containers of a sandbox.

use std::sync::Arc;

use nacelle_proto::agent::v1 as api;

use super::teardown::owner;
use super::volumes::Volumes;
use super::{NOT_STARTED, Sandbox, make_directory};
use crate::clock;
use crate::config::ImageVolumes;
use crate::container::Container;
use crate::failpoint::step;
use crate::model::{
    ContainerConfig, ContainerImages, ContainerState, ExitInfo, ExitReason, NamespaceMode, SandboxState, Security,
};
use crate::record::{ContainerRecord, Unusable};
use crate::vm::Vm;
use crate::{AgentFailure, Error, ErrorKind, Result, replies, signal, spec};

impl Sandbox {
    /// Makes a container.
    pub async fn create_container(
        self: &Arc<Self>,
        id: String,
        config: ContainerConfig,
        images: ContainerImages,
        stop_signal: u32,
    ) -> Result<()> {
        let vm = self.vm()?;
        if self.state() != SandboxState::Ready {
            return Err(Error::GuestGone { id: self.id.clone(), reason: "it is not ready".into() });
        }
        let status = self.status();
        let pid_target = self.pid_target(&config.security)?;
        let hostname = status.config.host_name();
        // What is wrong with a mount is told before anything is made.
        let volumes = Volumes::open(&self.id, &id, &config, self.manager.call_deadline()).await?;
        let spec = spec::build(&config, &images.root.config, &hostname, &format!("/pod/{id}"), volumes.binds.clone())?;
        let spec_json = serde_json::to_vec(&spec).map_err(|e| Error::Internal(e.to_string()))?;
        let apparmor_policy = match &config.security.apparmor {
            Some(profile) => spec::apparmor_policy(profile)?,
            None => Vec::new(),
        };
        let log_path = match (status.config.log_directory.as_str(), config.log_path.as_str()) {
            ("", _) | (_, "") => String::new(),
            (directory, path) => std::path::Path::new(directory).join(path).to_string_lossy().into_owned(),
        };
        let request = api::CreateContainerRequest {
            container_id: id.clone(),
            spec_json,
            rootfs: None,
            user: spec::user(&config.security.user, &images.root.config),
            stdin: config.stdin,
            terminal: config.tty,
            readonly_rootfs: config.security.readonly_rootfs,
            strict_groups: config.security.user.strict_groups,
            pid_namespace: pid_namespace(config.security.pid).into(),
            pid_target,
            apparmor_policy,
            image_volumes: match self.manager.image_volumes {
                ImageVolumes::Ignore => Vec::new(),
                ImageVolumes::Mkdir | ImageVolumes::Bind => images.root.config.volumes.clone(),
            },
            image_volumes_writable: self.manager.image_volumes == ImageVolumes::Bind,
            volumes: None,
            images: Vec::new(),
            block_devices: Vec::new(),
        };
        let record = ContainerRecord {
            id: id.clone(),
            sandbox_id: self.id.clone(),
            config,
            image_id: images.root.id.clone(),
            log_path,
            stop_signal,
            state: ContainerState::Creating,
            created_at: clock::now(),
            started_at: 0,
            exit: None,
            slot: None,
            disks: Vec::new(),
            log: None,
            user: None,
        };
        make_directory(&self.paths.containers())?;
        let container = Container::create(self.paths.container(&id), record);
        container.save().await?;
        step!("create.record");
        self.enter(&container);
        let made = self.build_container(&vm, &container, &images, volumes, request).await;
        if made.is_err() {
            if container.state() != ContainerState::Creating {
                self.tell_removed(&id);
            }
            // Until it is out of the guest its record stays: it says that it is to go.
            container.change(|record| record.state = ContainerState::Creating);
            match self.tear_down_container(&container).await {
                Ok(()) => {
                    self.lock().containers.remove(&id);
                    container.forget().await?;
                }
                Err(error) => {
                    tracing::warn!(container = id, %error, "half made, and still in the guest: it is tried again");
                    self.attend();
                }
            }
        } else {
            self.settle_on_host().await;
        }
        made
    }

    async fn build_container(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        container: &Arc<Container>,
        images: &ContainerImages,
        volumes: Volumes,
        mut request: api::CreateContainerRequest,
    ) -> Result<()> {
        let files = images.root.open_rootfs()?;
        let slot = vm.add_disk(owner(&container.id, "rootfs"), true, files).await?;
        step!("create.rootfs");
        container.update(|record| record.slot = Some(slot)).await?;
        request.rootfs = Some(api::Device { slot: slot.into() });
        volumes.hand_over(vm, container, images, &mut request).await?;
        step!("create.volumes");
        let mut client = self.agent.client();
        let user = replies::created(self.agent.call("create the container", client.create_container(request)).await?)?;
        step!("create.guest");
        container
            .update(|record| {
                record.state = ContainerState::Created;
                record.user = Some(user);
            })
            .await
    }

    /// The id of the container whose process ids another is to see; empty if none is meant.
    fn pid_target(&self, security: &Security) -> Result<String> {
        if security.pid != NamespaceMode::Target {
            return Ok(String::new());
        }
        let wanted = security.pid_target.as_str();
        let fitting: Vec<_> = self.containers().into_iter().filter(|c| c.id.starts_with(wanted)).collect();
        match fitting.as_slice() {
            [target] => {
                target.require(ContainerState::Running, "show its processes to another")?;
                Ok(target.id.clone())
            }
            [] => Err(Error::ContainerNotFound(wanted.into())),
            _ => Err(Error::AmbiguousId(wanted.into())),
        }
    }

    /// Starts a created container.
    pub async fn start_container(self: &Arc<Self>, id: &str) -> Result<()> {
        let container = self.container(id).ok_or_else(|| Error::ContainerNotFound(id.into()))?;
        container.changeable()?;
        container.require(ContainerState::Created, "start it")?;
        let vm = self.vm()?;
        let opening = container.clone();
        let log = super::blocking(move || opening.open_log()).await?;
        step!("start_container.log");
        let mut client = self.agent.client();
        let request = api::StartContainerRequest { container_id: id.into() };
        let started_at = clock::now();
        let answer = self.agent.call("start the container", client.start_container(request)).await;
        step!("start_container.guest");
        match answer {
            Ok(_) => {
                container.change(|record| {
                    record.state = ContainerState::Running;
                    record.started_at = started_at;
                });
                container.follow(self.followed(&vm), log);
                if let Err(error) = container.save().await {
                    // It runs, and the guest knows.
                    tracing::warn!(container = id, %error, "not on record yet that the container runs");
                    self.attend();
                }
                Ok(())
            }
            // By a request of before, whose answer was lost and which came late: it is one start all the same.
            Err(Error::Agent { kind: AgentFailure::State, .. }) => {
                self.runs(&vm, &container);
                self.attend();
                Ok(())
            }
            Err(error) if answer_was_lost(&error) => {
                container.set_unsettled(true);
                self.attend();
                Err(error)
            }
            Err(error) => {
                container.exited(ExitInfo {
                    code: NOT_STARTED,
                    reason: ExitReason::StartError,
                    message: error.to_string(),
                    finished_at: clock::now(),
                });
                self.attend();
                Err(error)
            }
        }
    }

    /// Removes a container, killing it first if it runs, and returns whether there was one.
    pub async fn remove_container(self: &Arc<Self>, id: &str) -> Result<bool> {
        let Some(container) = self.container(id) else { return Ok(false) };
        if let Some(why) = container.why_kept()
            && !matches!(why, Unusable::Torn(_))
        {
            container.changeable()?;
        }
        self.kill_unsettled(&container).await?;
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
        step!("remove_container.record");
        container.forget().await?;
        self.lock().containers.remove(id);
        self.settle_on_host().await;
        Ok(true)
    }

    /// Sends a signal to a container's process, or to all its processes.
    pub async fn signal(&self, id: &str, signal: u32, all: bool) -> Result<()> {
        let mut client = self.agent.client();
        let container_id = id.into();
        let request = api::SignalRequest { container_id, signal, all, ..api::SignalRequest::default() };
        self.agent.call("signal the container", client.signal(request)).await.map(drop)
    }
}

/// Whether a call may have been carried out although it failed.
fn answer_was_lost(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Unreachable)
}

/// What the agent calls a mode. A namespace of the container's own is in its specification.
fn pid_namespace(mode: NamespaceMode) -> api::PidNamespace {
    match mode {
        NamespaceMode::Container | NamespaceMode::Node => api::PidNamespace::Guest,
        NamespaceMode::Pod => api::PidNamespace::Pod,
        NamespaceMode::Target => api::PidNamespace::Target,
    }
}
