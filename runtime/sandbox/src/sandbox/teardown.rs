//! Taking a container out of its guest: every step may have been done before, and is done again without harm.

use std::sync::Arc;

use nacelle_proto::agent::v1 as api;
use nacelle_vmm::control::DeviceInfo;

use super::Sandbox;
use crate::container::Container;
use crate::failpoint::step;
use crate::model::{ContainerState, MountSource, Propagation, SandboxState};
use crate::vm::{Devices, Vm};
use crate::{Result, volumes};

/// What the device of a container is known by: its root's, or that of a further disk's number.
pub(super) fn owner(container: &str, part: &str) -> String {
    format!("{container}/{part}")
}

/// What a VMM calls a disk.
const DISK: &str = "disk";

/// Whether a device is a container's.
fn owned_by(owner: &str, container: &str) -> bool {
    owner.strip_prefix(container).is_some_and(|rest| rest.starts_with('/'))
}

/// The devices of a container: those that have its name, and disks without one in the places on its record (`own`), unless
/// another container has them on record too (`others`): so a daemon of the first release leaves them, which tells no VMM
/// whose a device is.
fn select<'a>(there: &'a Devices, container: &str, own: &[u8], others: &[u8]) -> Vec<&'a DeviceInfo> {
    let is_own = |device: &&DeviceInfo| match device.owner.as_str() {
        "" => device.kind == DISK && own.contains(&device.slot) && !others.contains(&device.slot),
        owner => owned_by(owner, container),
    };
    there.devices.iter().filter(is_own).collect()
}

/// The places on the bus that a container has on record.
fn places(container: &Container) -> Vec<u8> {
    let record = container.record();
    record.slot.into_iter().chain(record.disks).collect()
}

impl Sandbox {
    /// What a container has of the devices that are there.
    pub(super) fn devices_of<'a>(&self, there: &'a Devices, container: &Container) -> Vec<&'a DeviceInfo> {
        let others = self.containers().into_iter().filter(|other| other.id != container.id);
        let others: Vec<_> = others.flat_map(|other| places(&other)).collect();
        select(there, &container.id, &places(container), &others)
    }

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
                for device in self.devices_of(&there, container) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_daemon_without_owners_has_added_is_its_containers_by_place() {
        let device = |slot, kind: &str, owner: &str| DeviceInfo { slot, kind: kind.into(), owner: owner.into() };
        let there = Devices {
            devices: vec![
                device(1, "vsock", ""),
                device(2, "disk", "scratch"),
                device(3, "disk", "a/rootfs"),
                device(4, "disk", ""),
                device(5, "disk", ""),
                device(6, "fs", ""),
                device(7, "disk", "ab/rootfs"),
            ],
            volumes: Vec::new(),
        };
        let slots = |own: &[u8], others: &[u8]| -> Vec<u8> {
            select(&there, "a", own, others).into_iter().map(|device| device.slot).collect()
        };
        assert_eq!(slots(&[3], &[]), [3]);
        assert_eq!(slots(&[], &[]), [3], "what is not on record yet");
        assert_eq!(slots(&[4], &[5]), [3, 4]);
        assert_eq!(slots(&[4, 5], &[5]), [3, 4], "a place that went to another since");
        assert_eq!(slots(&[1, 2, 6, 7], &[]), [3], "what is no container's disk, or another's");
    }
}
