//! A container's volumes: opened, handed to its guest, taken back.
//!
//! A volume carries its container's id in its name, so that what a daemon that was killed has
//! left is found by the container's record.

use std::sync::Arc;
use std::time::Duration;

use nacelle_proto::agent::v1 as api;

use super::teardown::owner;
use crate::container::Container;
use crate::failpoint::step;
use crate::model::{ContainerConfig, ContainerImages, MountSource};
use crate::spec::{Bind, guest_has};
use crate::vm::Vm;
use crate::volumes::{self, HostVolume};
use crate::{Error, Result};

/// What a container mounts, open.
#[derive(Debug)]
pub struct Volumes {
    /// What each of the container's mounts becomes in the guest.
    pub binds: Vec<Bind>,
    /// Directories and files of the host, by the mount's number.
    host: Vec<(usize, HostVolume)>,
    /// Block devices, in the container's order.
    block: Vec<std::fs::File>,
}

impl Volumes {
    /// Opens everything of the host that a container of `pod` asks for, within `limit`.
    pub async fn open(pod: &str, id: &str, config: &ContainerConfig, limit: Duration) -> Result<Self> {
        let mut binds: Vec<_> =
            config.mounts.iter().enumerate().map(|(index, mount)| Bind::of(id, index, mount)).collect();
        let (host, block) = volumes::open_all(pod, config, limit).await?;
        for (index, volume) in &host {
            if let Some(bind) = binds.get_mut(*index) {
                bind.read_only = volume.read_only;
            }
        }
        Ok(Self { binds, host, block })
    }

    /// Gives them to the guest, and tells the agent of them in `request`.
    pub async fn hand_over(
        self,
        vm: &Vm,
        container: &Arc<Container>,
        images: &ContainerImages,
        request: &mut api::CreateContainerRequest,
    ) -> Result<()> {
        if !self.host.is_empty() {
            // A pod without volumes has no device for them.
            request.volumes = Some(api::Device { slot: vm.add_fs().await?.into() });
        }
        for (index, volume) in self.host {
            let (name, access, plain) = (volumes::name(&container.id, index), volume.access, volume.plain);
            let sandbox = container.record().sandbox_id;
            let file = volume.for_vmm(&sandbox, vm.pidfd(), name.clone(), vm.call_deadline()).await?;
            vm.add_volume(name, access, plain, file).await?;
        }
        let config = container.record().config;
        for (index, mount) in config.mounts.iter().enumerate() {
            let MountSource::Image { id, sub_path, .. } = &mount.source else { continue };
            let image = images.mounted.get(id).ok_or_else(|| Error::Internal(format!("image {id} was not given")))?;
            let device = add_disk(vm, container, format!("image.{index}"), true, image.open_rootfs()?).await?;
            let name = volumes::name(&container.id, index);
            request.images.push(api::ImageVolume { name, device: Some(device), sub_path: sub_path.clone() });
        }
        let block = config.devices.iter().filter(|device| !guest_has(&device.host_path));
        for (index, (device, file)) in block.zip(self.block).enumerate() {
            let part = format!("block.{index}");
            let disk = add_disk(vm, container, part, !volumes::writable(device), vec![file]).await?;
            request.block_devices.push(api::BlockDevice {
                device: Some(disk),
                path: device.container_path.to_string_lossy().into_owned(),
                permissions: device.permissions.clone(),
            });
        }
        Ok(())
    }
}

/// Adds a container's disk and keeps its place on record.
async fn add_disk(
    vm: &Vm,
    container: &Arc<Container>,
    part: String,
    read_only: bool,
    files: Vec<std::fs::File>,
) -> Result<api::Device> {
    let slot = vm.add_disk(owner(&container.id, &part), read_only, files).await?;
    container.update(|record| record.disks.push(slot)).await?;
    step!("create.disk");
    Ok(api::Device { slot: slot.into() })
}
