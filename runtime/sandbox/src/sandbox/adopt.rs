//! Taking over what an earlier daemon left: guests that run, and what is known of those that do not.
//!
//! Adoption has no right to end anything. Each step of it may fail, for a full disk, for want of descriptors, for a guest
//! that is silent just now; then the pod stays as its record says, with the reason, and it is tried again
//! ([`super::attend`]). Only a VMM that is gone for certain makes an end of its pod.

use std::collections::HashSet;
use std::sync::Arc;

use nacelle_proto::agent::v1 as api;

use super::{NOT_STARTED, Sandbox};
use crate::clock;
use crate::container::Container;
use crate::failpoint::step;
use crate::model::{ContainerState, ExitInfo, ExitReason, SandboxState};
use crate::vm::{Devices, End, Vm};
use crate::{Result, exec, replies, signal, volumes};

impl Sandbox {
    /// Finds out what is there of a pod that an earlier daemon made, and goes on from there. Nothing happens if that
    /// is done.
    ///
    /// # Errors
    /// What keeps it from being done now. Everything that runs runs on.
    pub async fn adopt(self: &Arc<Self>) -> Result<()> {
        if self.lock().not_adopted.is_none() {
            return Ok(());
        }
        match self.state() {
            SandboxState::Creating => return Ok(()),
            SandboxState::NotReady => self.release().await?,
            SandboxState::Ready => self.take_over().await?,
        }
        self.lock().not_adopted = None;
        Ok(())
    }

    async fn take_over(self: &Arc<Self>) -> Result<()> {
        let Some(vm) = self.hold_vm().await? else { return self.found_ended().await };
        step!("adopt.held");
        for container in self.containers() {
            if container.why_kept().is_none() && container.state() == ContainerState::Running {
                container.follow(self.followed(&vm), None);
            }
        }
        step!("adopt.followed");
        let mut client = self.agent.client();
        let list = client.list_containers(api::ListContainersRequest {});
        let known = replies::containers(self.agent.call("list the guest's containers", list).await?);
        let devices = vm.devices().await?;
        step!("adopt.asked");
        self.reconcile(&vm, &known, devices).await?;
        self.note_versions(&vm).await?;
        // One that was started by an earlier release may have what that gave it.
        self.settle_on_host().await;
        self.check_network();
        tracing::info!(target: "nacelle::recovery", sandbox = self.id, pod = self.name(), "pod taken over");
        Ok(())
    }

    /// The VMM on record, held and watched; none if it has ended for certain.
    pub(super) async fn hold_vm(self: &Arc<Self>) -> Result<Option<Arc<Vm>>> {
        if let Some(vm) = self.lock().vm.clone() {
            return Ok(Some(vm).filter(|vm| !vm.has_ended()));
        }
        let Some(process) = self.record().vmm else { return Ok(None) };
        let held = Vm::attach(&self.manager, &self.id, &self.paths, Some(self.cgroup()?), process)?;
        let Some(vm) = held.map(Arc::new) else { return Ok(None) };
        self.lock().vm = Some(vm.clone());
        self.watch(vm.clone());
        Ok(Some(vm))
    }

    /// The VMM ended while nobody looked.
    async fn found_ended(self: &Arc<Self>) -> Result<()> {
        let asked = self.record.lock().stopping;
        let reason = if asked { "the sandbox was stopped" } else { "the guest ended while no daemon was there" };
        let end = End::new(reason, Some(&self.cgroup()?));
        self.ended(&end, if asked { String::new() } else { end.reason.clone() });
        self.release().await
    }

    /// Brings the records, the guest's view and the VMM's together.
    async fn reconcile(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        known: &[api::ContainerInfo],
        devices: Option<Devices>,
    ) -> Result<()> {
        let mut owed = Ok(());
        for container in self.containers() {
            if container.why_kept().is_none() {
                let there = known.iter().find(|info| info.container_id == container.id);
                owed = owed.and(self.reconcile_container(vm, &container, there).await);
            }
        }
        let ours: HashSet<String> = self.containers().iter().map(|container| container.id.clone()).collect();
        for info in known {
            for exec_id in info.exec_ids.iter().filter(|id| !exec::is_own(id)) {
                // Who waited for it was a client of the daemon before.
                self.forget_exec(&info.container_id, exec_id).await;
            }
            if !ours.contains(&info.container_id) {
                tracing::warn!(target: "nacelle::recovery", sandbox = self.id, container = info.container_id,
                    "the guest has a container that is not on record: removing it");
                let mut client = self.agent.client();
                let request = api::RemoveContainerRequest { container_id: info.container_id.clone() };
                owed =
                    owed.and(self.agent.call("remove a container", client.remove_container(request)).await.map(drop));
            }
        }
        if let Some(devices) = devices {
            owed = owed.and(self.reconcile_devices(vm, &devices, &ours).await);
        }
        owed
    }

    /// Takes off the bus what is no container's, and brings the records up to what is there.
    async fn reconcile_devices(&self, vm: &Vm, there: &Devices, ours: &HashSet<String>) -> Result<()> {
        for device in &there.devices {
            let Some((container, _)) = device.owner.split_once('/').filter(|(id, _)| crate::id::is_id(id)) else {
                continue;
            };
            if !ours.contains(container) {
                tracing::warn!(target: "nacelle::recovery", sandbox = self.id, device = device.owner,
                    "the guest has a device of a container that is not on record: removing it");
                vm.remove_device(device.slot, device.owner.clone()).await?;
            }
        }
        for name in &there.volumes {
            if !ours.iter().any(|id| volumes::is_of(name, id)) {
                vm.remove_volume(name.clone()).await?;
            }
        }
        if vm.features().await?.owners() {
            for container in self.containers() {
                let holds = !self.devices_of(there, &container).is_empty();
                let record = container.record();
                // A removal whose record was not written.
                if !holds
                    && container.why_kept().is_none()
                    && (record.slot.is_some() || !record.disks.is_empty())
                    && there.devices.iter().any(|device| !device.owner.is_empty())
                {
                    container.change(|record| {
                        record.slot = None;
                        record.disks.clear();
                    });
                }
            }
        }
        Ok(())
    }

    async fn reconcile_container(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        container: &Arc<Container>,
        there: Option<&api::ContainerInfo>,
    ) -> Result<()> {
        use api::container_info::State;
        let guest = there.map(api::ContainerInfo::state);
        match (container.record().state, guest) {
            // Half made: nobody was told its id.
            (ContainerState::Creating, _) => {
                self.tear_down_container(container).await?;
                container.forget().await?;
                self.lock().containers.remove(&container.id);
            }
            (ContainerState::Created, Some(State::Created)) => {
                if super::settle::is_starting(there) {
                    container.set_unsettled(true);
                }
            }
            // On record it has ended, whatever the guest thinks of it.
            (ContainerState::Exited, Some(State::Running)) => {
                tracing::warn!(target: "nacelle::recovery", sandbox = self.id, container = container.id,
                    "a container that has ended by its record runs: killing it");
                self.signal(&container.id, signal::KILL, true).await?;
            }
            (ContainerState::Exited, _) => {}
            (_, None | Some(State::Unspecified)) => container.exited(ExitInfo {
                code: NOT_STARTED,
                reason: ExitReason::Error,
                message: "the guest no longer knows the container".into(),
                finished_at: clock::now(),
            }),
            // Running as recorded, or started by a daemon that ended before it could say so.
            (_, Some(_)) => self.runs(vm, container),
        }
        Ok(())
    }

    /// A container's process runs, or has: its record says so, and it is followed.
    pub(super) fn runs(&self, vm: &Arc<Vm>, container: &Arc<Container>) {
        container.change(|record| {
            record.state = ContainerState::Running;
            if record.started_at == 0 {
                record.started_at = clock::now();
            }
        });
        container.set_unsettled(false);
        container.follow(self.followed(vm), None);
    }

    async fn forget_exec(&self, container_id: &str, exec_id: &str) {
        let mut client = self.agent.client();
        let request = api::ForgetExecRequest { container_id: container_id.into(), exec_id: exec_id.into() };
        if let Err(error) = self.agent.call("forget an exec", client.forget_exec(request)).await {
            tracing::warn!(target: "nacelle::recovery", sandbox = self.id, container = container_id, %error,
                "a process of an earlier daemon's client goes on");
        }
    }

    /// Has it on record, in a while, who drives the guest, and what runs in it. Nothing waits for that: not who asked for the
    /// pod, and not what comes next in its queue.
    pub(super) fn learn_versions(self: &Arc<Self>, vm: Arc<Vm>) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            match sandbox.note_versions(&vm).await {
                Ok(()) => sandbox.attend(),
                // The next daemon asks again.
                Err(error) => tracing::debug!(sandbox = sandbox.id, %error, "not known what the pod consists of"),
            }
        });
    }

    /// Knows who drives the guest, and what runs in it.
    async fn note_versions(&self, vm: &Vm) -> Result<()> {
        let features = vm.features().await?;
        let mut client = self.agent.client();
        let info = self.agent.call("ask the agent who it is", client.info(api::InfoRequest {})).await?;
        let info = replies::info(info);
        let versions = crate::record::Versions {
            vmm: features.version,
            vmm_features: features.names,
            agent: info.agent_version,
            agent_features: info.features,
            kernel: info.kernel_release,
        };
        let changed = self.record.lock().versions != versions;
        if changed && self.state() == SandboxState::Ready {
            self.change(|record| record.versions = versions);
        }
        Ok(())
    }

    /// The pod's name with its namespace, for messages.
    pub(super) fn name(&self) -> String {
        let record = self.record.lock();
        format!("{}/{}", record.config.namespace, record.config.name)
    }
}
