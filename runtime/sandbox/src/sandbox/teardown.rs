//! Taking a container out of its guest: every step may have been done before, and is done again without harm.

use std::sync::Arc;

use nacelle_proto::agent::v1 as api;

use super::Sandbox;
use crate::container::Container;
use crate::failpoint::step;
use crate::model::{ContainerState, MountSource, Propagation, SandboxState};
use crate::vm::Vm;
use crate::{Result, volumes};

/// What the device of a container is known by: its root's, or that of a further disk's number.
pub(super) fn owner(container: &str, part: &str) -> String {
    format!("{container}/{part}")
}

/// Whether a device is a container's.
pub(super) fn owned_by(owner: &str, container: &str) -> bool {
    owner.strip_prefix(container).is_some_and(|rest| rest.starts_with('/'))
}

impl Sandbox {
    /// Takes a container out of the guest, and its disks and volumes off the bus.
    pub(super) async fn tear_down_container(&self, container: &Container) -> Result<()> {
        let vm = self.vm()?;
        let mut client = self.agent.client();
        let request = api::RemoveContainerRequest { container_id: container.id.clone() };
        self.agent.call("remove the container", client.remove_container(request)).await?;
        step!("teardown.guest");
        let record = container.record();
        for (index, mount) in record.config.mounts.iter().enumerate() {
            if matches!(mount.source, MountSource::Host(_)) {
                let name = volumes::name(&container.id, index);
                vm.remove_volume(name.clone()).await?;
                if mount.propagation == Propagation::HostToContainer {
                    volumes::unfollow(&self.id, vm.pidfd(), name, vm.call_deadline()).await?;
                }
            }
        }
        step!("teardown.volumes");
        match vm.devices().await? {
            Some(there) => {
                for device in there.devices.iter().filter(|device| owned_by(&device.owner, &container.id)) {
                    vm.remove_device(device.slot, device.owner.clone()).await?;
                    step!("teardown.device");
                }
                container.change(|record| {
                    record.slot = None;
                    record.disks.clear();
                });
            }
            None => self.remove_devices_by_place(&vm, container).await?,
        }
        Ok(())
    }

    /// For a VMM that knows devices by their places alone: a place is off the record before it is asked for, so that
    /// what comes into it later is never taken for this container's.
    async fn remove_devices_by_place(&self, vm: &Vm, container: &Container) -> Result<()> {
        loop {
            let mut place = None;
            let record = container.record();
            if let Some(last) = record.disks.last() {
                place = Some(*last);
                container
                    .update(|record| {
                        record.disks.pop();
                    })
                    .await?;
            } else if record.slot.is_some() {
                place = record.slot;
                container.update(|record| record.slot = None).await?;
            }
            match place {
                Some(slot) => vm.remove_device(slot, String::new()).await?,
                None => return Ok(()),
            }
        }
    }

    /// Takes containers that have ended out of the guest: nobody looks at their disks any more, and places on the bus
    /// are few.
    pub(super) async fn retire_containers(self: &Arc<Self>) -> Result<()> {
        if self.state() != SandboxState::Ready || self.lock().vm.is_none() {
            return Ok(());
        }
        let mut owed = Ok(());
        for container in self.containers() {
            let record = container.record();
            let holds = record.slot.is_some() || !record.disks.is_empty();
            if record.state == ContainerState::Exited && holds && container.why_kept().is_none() {
                // How it ended is on disk before the guest forgets it.
                let retired = match container.save().await {
                    Ok(()) => self.tear_down_container(&container).await,
                    Err(error) => Err(error),
                };
                owed = owed.and(retired);
                owed = owed.and(container.save().await);
            }
        }
        owed
    }
}
