//! What a machine starts from: a kernel, or another machine that was saved. And how one is
//! saved that is to be started from.

use std::path::PathBuf;
use std::sync::Arc;

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::{Error, Machine, setup};
use crate::boot;
use crate::bus::Bus;
use crate::config::{MachineConfig, Start};
use crate::console::Ring;
use crate::cpu::{self, Vcpu};
use crate::devices::virtio::vsock::{Listener, Vsock, VsockState};
use crate::memory;
use crate::pci::PciBus;
use crate::saved::{self, Saved, SavedError};
use crate::sys::Backing;

/// What a machine starts from.
pub enum Origin {
    /// A kernel, which is in memory, with its 64-bit entry point.
    Kernel(u64),
    /// Another machine.
    Saved(Box<Saved>),
}

/// What it takes to save a machine: where to, and which registers of its processors.
pub struct Template {
    state: PathBuf,
    msrs: Vec<u32>,
}

impl Template {
    /// Of a machine that may be saved; none of others.
    pub fn of(config: &MachineConfig, kvm: &Kvm) -> Result<Option<Self>, Error> {
        let Start::Template(files) = &config.start else { return Ok(None) };
        let msrs = cpu::msr_list(kvm).map_err(setup("list the machine-specific registers"))?;
        Ok(Some(Self { state: files.state.clone(), msrs }))
    }
}

impl Origin {
    /// Makes the guest's memory and puts into it what the guest starts from.
    pub fn load(config: &MachineConfig) -> Result<(GuestMemoryMmap, Self), Error> {
        let mib = config.memory_mib;
        let memory = match &config.start {
            Start::Boot => memory::map(mib)?,
            Start::Template(files) => {
                let file = saved::create_memory(&files.memory, mib)?;
                memory::map_backed(mib, Backing::File(&file))?
            }
            Start::Clone(files) => {
                let saved = Saved::read(&files.state, mib, config.vcpus)?;
                let file = saved::open_memory(&files.memory, mib)?;
                let memory = memory::map_backed(mib, Backing::CopyOf(&file))?;
                return Ok((memory, Self::Saved(Box::new(saved))));
            }
        };
        let entry = boot::prepare(&memory, config)?;
        Ok((memory, Self::Kernel(entry)))
    }

    /// Puts the processors where they start, and the guest's clock with them.
    pub fn set_processors(&self, vm: &VmFd, vcpus: &[Vcpu], memory: &GuestMemoryMmap) -> Result<(), Error> {
        match self {
            Self::Kernel(entry) => vcpus.first().map_or(Ok(()), |first| first.boot(memory, *entry))?,
            Self::Saved(saved) => {
                let clock = kvm_clock_data { clock: saved.clock.clock, ..Default::default() };
                vm.set_clock(&clock).map_err(setup("set the guest's clock"))?;
                vcpus.iter().zip(&saved.cpus).try_for_each(|(vcpu, state)| vcpu.restore(state))?;
            }
        }
        Ok(())
    }

    /// The bus, with a serial port that writes to `console`.
    pub fn bus(&self, console: Ring, pci: &Arc<PciBus>) -> Result<Bus, Error> {
        match self {
            Self::Kernel(_) => Ok(Bus::new(console, Arc::clone(pci))),
            Self::Saved(saved) => Bus::restore(console, Arc::clone(pci), &saved.bus)
                .ok_or_else(|| SavedError::Senseless("the serial port").into()),
        }
    }

    /// The device by which the host reaches the guest.
    pub fn vsock(&self, listener: Listener) -> Result<Vsock, Error> {
        Ok(match self {
            Self::Kernel(_) => Vsock::new(listener)?,
            Self::Saved(saved) => match &saved.vsock.device {
                Some(device) => {
                    let state: VsockState =
                        postcard::from_bytes(&device.own).map_err(|_| SavedError::Senseless("the vsock device"))?;
                    Vsock::restore(listener, &state)?
                }
                None => Vsock::new(listener)?,
            },
        })
    }

    /// Once that is in its slot: lets it go on. The last step before processors run.
    pub fn restore_vsock(&self, pci: &PciBus, slot: u8) -> Result<(), Error> {
        let (Self::Saved(saved), Some(function)) = (self, pci.function(slot.into())) else { return Ok(()) };
        Ok(function.restore(&saved.vsock)?)
    }
}

impl Machine {
    /// Whether [`Machine::save`] can be done.
    pub fn may_save(&self) -> bool {
        self.template.is_some() && self.devices.len() == 1
    }

    /// Saves the machine, whose processors are stopped. The memory is in its file already.
    pub fn save(&self, vcpus: Vec<Vcpu>, bus: &Bus) -> Result<(), Error> {
        let unfit = |why| Error::from(SavedError::Unfit(why));
        let template = self.template.as_ref().ok_or_else(|| unfit("it is no template"))?;
        let vm = self.pci.vm();
        let slot = self.devices.keys().next().ok_or_else(|| unfit("it has no vsock device"))?;
        let function = self.pci.function(usize::from(*slot)).ok_or_else(|| unfit("it has no vsock device"))?;
        // What processors have asked of devices is done: the queues are at rest.
        (0..).zip(function.notifications()).for_each(|(index, _)| function.queue_notified(index));
        let saved = Saved {
            memory_mib: self.memory.iter().map(|region| region.len()).sum::<u64>() >> 20,
            clock: vm.get_clock().map_err(setup("get the guest's clock"))?,
            cpus: vcpus.iter().map(|vcpu| vcpu.save(vm, &template.msrs)).collect::<Result<_, _>>()?,
            bus: bus.state(),
            vsock: function.state().ok_or_else(|| unfit("its vsock device is in no state to be saved"))?,
        };
        Ok(saved.write(&template.state)?)
    }
}
