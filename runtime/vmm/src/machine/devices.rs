//! The devices of a machine: on the bus, watched by the event loop, and off again.

use std::io;
use std::sync::Arc;

use super::{Error, Machine, host};
use crate::control::DeviceInfo;
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::fs::{Fs, Volumes};
use crate::devices::virtio::rng::{self, Rng};
use crate::event_loop::{Mode, Source, Token};
use crate::pci::{BusError, VirtioPci};
use crate::{chain, report, sys};

/// A device on the bus.
pub struct Attached {
    /// As its [`VirtioDevice::name`] says.
    name: &'static str,
    /// Whose it is; empty if nobody's.
    owner: String,
    /// What the event loop watches for it.
    queues: Vec<Token>,
    poll: Option<Token>,
}

/// What clients call a device.
fn kind(name: &str) -> &str {
    match name {
        "block" => "disk",
        name => name,
    }
}

impl Machine {
    /// Puts a device on the bus, for `owner` unless that is empty, and watches what it needs watched. Returns its slot.
    pub fn add_device(&mut self, device: Box<dyn VirtioDevice>, owner: String) -> Result<u8, Error> {
        let name = device.name();
        let function = self.pci.add(device, &self.memory)?;
        let slot = function.slot();
        self.devices.insert(slot, Attached { name, owner, queues: Vec::new(), poll: None });
        let watched = self.watch_device(&function);
        if watched.is_err() {
            // Undo what was done of it.
            let _ = self.remove_device(slot);
        }
        watched.map_err(host("watch a device's descriptors")).map(|()| slot)
    }

    /// Puts the random number device on the bus beside the first disk, to be found by the
    /// same scan. At boot it would only cost time: the kernel gets a seed from us.
    pub fn add_random_source(&mut self) {
        if self.devices.values().any(|device| device.name == rng::NAME) {
            return;
        }
        let device = Rng::new().map_err(host("create the random number device"));
        let added = device.and_then(|device| self.add_device(Box::new(device), String::new()));
        if let Err(error) = added {
            report("the guest has no random number device", &error);
        }
    }

    fn watch_device(&mut self, function: &Arc<VirtioPci>) -> io::Result<()> {
        let Some(watched) = self.devices.get_mut(&function.slot()) else { return Ok(()) };
        for (index, event) in (0..).zip(function.notifications()) {
            let source = Source::Queue(Arc::clone(function), index);
            watched.queues.push(self.events.watch(sys::event_fd(event), source, Mode::Edge)?);
        }
        let source = Source::Poll(Arc::clone(function));
        let events = &mut self.events;
        watched.poll = function.with_poll_fd(|fd| events.watch(fd, source, Mode::Level)).transpose()?;
        Ok(())
    }

    /// Takes a device off the bus.
    pub fn remove_device(&mut self, slot: u8) -> Result<(), BusError> {
        let function = self.pci.remove(slot)?;
        self.volumes.take_if(|(of, _)| *of == slot);
        let Some(device) = self.devices.remove(&slot) else { return Ok(()) };
        for (token, event) in device.queues.into_iter().zip(function.notifications()) {
            self.events.forget(sys::event_fd(event), token);
        }
        if let Some(token) = device.poll {
            function.with_poll_fd(|fd| self.events.forget(fd, token));
        }
        Ok(())
    }

    /// Takes a device off the bus, if the one in the slot is `owner`'s.
    pub fn remove_device_of(&mut self, slot: u8, owner: &str) -> Result<(), BusError> {
        match self.devices.get(&slot) {
            Some(device) if device.owner == owner => self.remove_device(slot),
            _ => Ok(()),
        }
    }

    /// The slot of the device that `owner` has.
    pub fn slot_of(&self, owner: &str) -> Option<u8> {
        self.devices.iter().find(|(_, device)| device.owner == owner).map(|(slot, _)| *slot)
    }

    /// What is on the bus, by slot.
    pub fn list_devices(&self) -> Vec<DeviceInfo> {
        let info = |(slot, device): (&u8, &Attached)| DeviceInfo {
            slot: *slot,
            kind: kind(device.name).into(),
            owner: device.owner.clone(),
        };
        self.devices.iter().map(info).collect()
    }

    /// The slot of the device of volumes, which is put on the bus at the first call.
    pub fn add_fs(&mut self) -> Result<u8, String> {
        if let Some((slot, _)) = self.volumes {
            return Ok(slot);
        }
        let volumes = Arc::new(Volumes::new());
        let device = Fs::new(volumes.clone()).map_err(|error| format!("cannot create the device: {error}"))?;
        let slot = self.add_device(Box::new(device), String::new()).map_err(|error| chain(&error))?;
        self.volumes = Some((slot, volumes));
        Ok(slot)
    }
}
