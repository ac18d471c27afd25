//! What clients of the control socket ask of a machine.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::Machine;
use crate::chain;
use crate::control::message::{FEATURE_DEVICES, FEATURE_OWNERS, FEATURE_PLAIN_VOLUMES, FEATURE_VOLATILE};
use crate::control::{Request, Response, check_owner};
use crate::devices::virtio::block::{Block, Disk};
use crate::devices::virtio::fs::Access;
use crate::devices::virtio::net::{Net, Tap};
use crate::exit::Exit;

impl Machine {
    /// Does what a client asks, or says why not.
    pub fn perform(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Response, String> {
        let takes_files =
            matches!(request, Request::AddDisk { .. } | Request::AddNet { .. } | Request::AddVolume { .. });
        if !fds.is_empty() && !takes_files {
            return Err("this request takes no file descriptors".into());
        }
        match request {
            Request::Status => Ok(Response::Status { version: env!("CARGO_PKG_VERSION").into(), id: self.id.clone() }),
            Request::AddDisk { read_only, volatile, owner } => {
                self.check_owner(&owner)?;
                let files = fds.into_iter().map(File::from).collect();
                let disk = Disk::new(files, read_only).map_err(|error| chain(&error))?.volatile(volatile);
                let block = Block::new(disk).map_err(|error| format!("cannot create the disk's device: {error}"))?;
                let slot = self.add_device(Box::new(block), owner).map_err(|error| chain(&error))?;
                self.add_random_source();
                Ok(Response::Device { slot })
            }
            Request::AddNet { mac, mtu, owner } => {
                self.check_owner(&owner)?;
                let net = net_device(fds, mac, mtu)?;
                let slot = self.add_device(Box::new(net), owner).map_err(|error| chain(&error))?;
                Ok(Response::Device { slot })
            }
            Request::AddFs => self.add_fs().map(|slot| Response::Device { slot }),
            Request::AddVolume { name, access, plain } => {
                self.add_volume(&name, access, plain, fds).map(|()| Response::Done)
            }
            Request::RemoveVolume { name } => {
                if let Some((_, volumes)) = &self.volumes {
                    volumes.remove(&name);
                }
                Ok(Response::Done)
            }
            Request::RemoveDevice { slot, owner } => {
                let removed = if owner.is_empty() {
                    self.remove_device(slot)
                } else {
                    check_owner(&owner).map_err(|error| error.to_string())?;
                    self.remove_device_of(slot, &owner)
                };
                removed.map(|()| Response::Done).map_err(|error| chain(&error))
            }
            Request::Features => Ok(Response::Features {
                version: env!("CARGO_PKG_VERSION").into(),
                features: [FEATURE_OWNERS, FEATURE_DEVICES, FEATURE_VOLATILE, FEATURE_PLAIN_VOLUMES]
                    .map(String::from)
                    .to_vec(),
            }),
            Request::Devices => {
                let volumes = self.volumes.as_ref().map(|(_, volumes)| volumes.names()).unwrap_or_default();
                Ok(Response::devices(self.list_devices(), volumes))
            }
            Request::Save => Err("only a template can be saved, and only without devices of a pod".into()),
            Request::Stop => {
                self.end()(Exit::Stopped);
                Ok(Response::Done)
            }
        }
    }

    /// Whether a device can be given to `owner`, if there is one.
    fn check_owner(&self, owner: &str) -> Result<(), String> {
        if owner.is_empty() {
            return Ok(());
        }
        check_owner(owner).map_err(|error| error.to_string())?;
        match self.slot_of(owner) {
            Some(slot) => Err(format!("{owner} has a device already, in slot {slot}: remove that first")),
            None => Ok(()),
        }
    }

    fn add_volume(&mut self, name: &str, access: Access, plain: bool, fds: Vec<OwnedFd>) -> Result<(), String> {
        let [file] = <[OwnedFd; 1]>::try_from(fds)
            .map_err(|fds| format!("a volume is one directory or file, not {}", fds.len()))?;
        let (_, volumes) = self.volumes.as_ref().ok_or("there is no device for volumes: add it first")?;
        volumes.add(name, file, access, plain).map_err(|error| chain(&error))
    }
}

/// The network interface behind the tap that came with a request.
fn net_device(fds: Vec<OwnedFd>, mac: [u8; 6], mtu: u16) -> Result<Net, String> {
    let [tap] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| format!("an interface has one tap, not {}", fds.len()))?;
    let tap = Tap::new(tap).map_err(|error| chain(&error))?;
    Net::new(tap, mac, mtu).map_err(|error| format!("cannot create the interface's device: {error}"))
}
