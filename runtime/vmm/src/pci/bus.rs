//! The slots, and the accesses that are looked up in them. All methods may be called from
//! any thread.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};

use super::config::{ConfigSpace, Identity};
use super::virtio::VirtioPci;
use crate::devices::virtio::device::VirtioDevice;
use crate::interrupts::Routes;
use crate::layout;
use crate::sys::CoalescedWrites;
use vm_memory::GuestMemoryMmap;

/// Device numbers on the bus.
const SLOTS: usize = 32;
const ADDRESS_ENABLE: u32 = 1 << 31;

/// A device cannot be put on the bus or taken off it.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// No slot is left.
    #[error("all 31 slots of the PCI bus are taken: remove a device first")]
    Full,
    /// Nothing is there.
    #[error("there is no device in slot {0}")]
    Empty(u8),
    /// The device cannot be set up.
    #[error("cannot set up the {device} device")]
    Device {
        /// Which.
        device: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

/// Bus 0.
pub struct PciBus {
    routes: Arc<Routes>,
    bridge: ConfigSpace,
    /// What the guest last wrote to the configuration address port.
    address: AtomicU32,
    /// Where KVM keeps writes to that port until something is done about them.
    pending: Mutex<Option<CoalescedWrites>>,
    slots: RwLock<[Option<Arc<VirtioPci>>; SLOTS]>,
}

impl PciBus {
    /// A bus with nothing but its bridge.
    pub fn new(routes: Arc<Routes>) -> Self {
        // A host bridge of no particular make, for nobody to work around the bugs of.
        let bridge = Identity { vendor: 0x1af4, device: 0x10f0, class: 0x06_00_00, subsystem: 0x1100 };
        Self {
            routes,
            bridge: ConfigSpace::new(bridge),
            address: AtomicU32::new(0),
            pending: Mutex::new(None),
            slots: RwLock::new([const { None }; SLOTS]),
        }
    }

    /// The virtual machine that the bus belongs to.
    pub fn vm(&self) -> &VmFd {
        self.routes.vm()
    }

    /// Puts a device into the lowest free slot. The guest sees it when it next scans.
    pub fn add(&self, device: Box<dyn VirtioDevice>, memory: &GuestMemoryMmap) -> Result<Arc<VirtioPci>, BusError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let (slot, place) =
            slots.iter_mut().enumerate().skip(1).find(|(_, place)| place.is_none()).ok_or(BusError::Full)?;
        let name = device.name();
        let function = VirtioPci::new(slot as u8, device, memory.clone(), Arc::clone(&self.routes))
            .map_err(|source| BusError::Device { device: name, source })?;
        let function = Arc::new(function);
        *place = Some(Arc::clone(&function));
        Ok(function)
    }

    /// Takes a device off the bus and silences it.
    pub fn remove(&self, slot: u8) -> Result<Arc<VirtioPci>, BusError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let function = slots.get_mut(usize::from(slot)).and_then(Option::take).ok_or(BusError::Empty(slot))?;
        drop(slots);
        function.detach();
        Ok(function)
    }

    /// Lets KVM collect the writes to the address port, of which there is one for every
    /// access to a register, without leaving the guest for each.
    pub fn collect_addresses(&self, vcpu: &VcpuFd) -> std::io::Result<()> {
        let writes = CoalescedWrites::new(vcpu)?;
        let port = IoEventAddress::Pio(u64::from(layout::PCI_CONFIG_ADDRESS));
        self.routes.vm().register_coalesced_mmio(port, 4)?;
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) = Some(writes);
        Ok(())
    }

    /// Catches up with the address port.
    fn settle_address(&self) {
        if let Some(writes) = self.pending.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            writes.drain(|_, data| self.set_address(data));
        }
    }

    /// The guest wrote to the address port.
    pub fn write_config_address(&self, data: &[u8]) {
        self.settle_address();
        self.set_address(data);
    }

    /// What the address port holds.
    pub fn address(&self) -> u32 {
        self.settle_address();
        self.address.load(Ordering::Relaxed)
    }

    /// Only whole words count.
    pub fn set_address(&self, data: &[u8]) {
        if let Ok(bytes) = data.try_into() {
            self.address.store(u32::from_le_bytes(bytes), Ordering::Relaxed);
        }
    }

    /// The guest reads the address port.
    pub fn read_config_address(&self, data: &mut [u8]) {
        for (byte, value) in data.iter_mut().zip(self.address().to_le_bytes()) {
            *byte = value;
        }
    }

    /// The slot and register that the address port selects, if it selects one here.
    fn selected(&self, port_offset: u16) -> Option<(usize, usize)> {
        self.settle_address();
        let address = self.address.load(Ordering::Relaxed);
        let bus_and_function = address & 0x7fff_0700;
        let slot = (address >> 11 & 0x1f) as usize;
        let register = (address & 0xfc) as usize | usize::from(port_offset & 3);
        (address & ADDRESS_ENABLE != 0 && bus_and_function == 0).then_some((slot, register))
    }

    /// What is in a slot.
    pub fn function(&self, slot: usize) -> Option<Arc<VirtioPci>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).get(slot).cloned().flatten()
    }

    /// The guest reads the selected register.
    pub fn read_config(&self, port_offset: u16, data: &mut [u8]) {
        match self.selected(port_offset) {
            Some((0, register)) => self.bridge.read(register, data),
            Some((slot, register)) => {
                if let Some(function) = self.function(slot) {
                    function.read_config(register, data);
                }
            }
            None => {}
        }
    }

    /// The guest writes the selected register.
    pub fn write_config(&self, port_offset: u16, data: &[u8]) {
        if let Some((slot, register)) = self.selected(port_offset)
            && let Some(function) = self.function(slot)
        {
            function.write_config(register, data);
        }
    }

    fn find<T>(&self, place: impl Fn(&VirtioPci) -> Option<T>) -> Option<(Arc<VirtioPci>, T)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().flatten().find_map(|function| place(function).map(|offset| (Arc::clone(function), offset)))
    }

    /// The guest writes an I/O port of some device.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        if let Some((function, offset)) = self.find(|function| function.port_offset(port)) {
            function.write_port(offset, data);
        }
    }

    /// The guest reads an I/O port of some device.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        if let Some((function, offset)) = self.find(|function| function.port_offset(port)) {
            function.read_port(offset, data);
        }
    }

    /// The guest writes memory of some device.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((function, offset)) = self.find(|function| function.memory_offset(address)) {
            function.write_memory(offset, data);
        }
    }

    /// The guest reads memory of some device.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        if let Some((function, offset)) = self.find(|function| function.memory_offset(address)) {
            function.read_memory(offset, data);
        }
    }
}
