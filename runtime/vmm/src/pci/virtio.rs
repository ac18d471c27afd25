//! A virtio device on the PCI bus (Virtual I/O Device 1.2, 4.1): modern interface only,
//! MSI-X only.
//!
//! The I/O port range holds, at fixed offsets, the common configuration, the interrupt
//! status (always 0), the notification registers, and the device's own configuration. A
//! notification never leaves KVM: it writes an event descriptor that the event loop
//! watches. The memory range holds the MSI-X table.
//!
//! Register accesses come from the processors' threads and take the function's lock; so
//! does the event loop before it calls the device.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch};
use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::config::{ConfigSpace, Identity, MEMORY_BAR, MEMORY_SIZE, PORTS_BAR, PORTS_SIZE};
use super::msix::{CONTROL_ENABLE, CONTROL_MASK_ALL, Msix, MsixState, PENDING_OFFSET};
use super::registers::{self, Effect, Registers};
use crate::devices::virtio::device::{Activation, DeviceError, DeviceState, Interrupt, QueuePosition, VirtioDevice};
use crate::interrupts::Routes;

const VENDOR: u16 = 0x1af4;
const MODERN_DEVICE: u16 = 0x1040;
/// Any from 0x40 on says "modern" too.
const SUBSYSTEM: u16 = 0x1100;
/// "Does not fit any class": drivers match by device number.
const CLASS: u32 = 0xff_00_00;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const STRUCTURE_COMMON: u8 = 1;
const STRUCTURE_NOTIFY: u8 = 2;
const STRUCTURE_STATUS: u8 = 3;
const STRUCTURE_DEVICE: u8 = 4;
const STRUCTURE_WINDOW: u8 = 5;

const COMMON_OFFSET: u16 = 0;
const STATUS_OFFSET: u16 = 0x40;
const NOTIFY_OFFSET: u16 = 0x80;
const NOTIFY_SIZE: u16 = 0x80;
const NOTIFY_MULTIPLIER: u16 = 4;
const DEVICE_OFFSET: u16 = 0x100;
const DEVICE_SIZE: u16 = 0x100;
/// Most queues that the notification registers have room for.
const QUEUE_LIMIT: usize = (NOTIFY_SIZE / NOTIFY_MULTIPLIER) as usize;
/// Stands for "does not answer".
const NOWHERE: u32 = u32::MAX;

/// A virtio device with its registers.
pub struct VirtioPci {
    slot: u8,
    name: &'static str,
    memory: GuestMemoryMmap,
    routes: Arc<Routes>,
    interrupt: Arc<Msix>,
    notifications: Vec<EventFd>,
    /// Whether the device waits for them itself.
    own_threads: bool,
    /// Copies of where the function answers, to be looked up without its lock.
    ports: AtomicU32,
    window: AtomicU32,
    inner: Mutex<Inner>,
}

/// What the guest has set up of a function, and how far its device has come.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FunctionState {
    config: Vec<u8>,
    registers: Registers,
    interrupt: MsixState,
    /// None if the driver is not ready.
    pub device: Option<DeviceState>,
}

struct Inner {
    device: Box<dyn VirtioDevice>,
    config: ConfigSpace,
    msix_capability: usize,
    window_capability: usize,
    registers: Registers,
    active: bool,
    /// The driver has reset it, and waits until it sees that done.
    resetting: bool,
    /// It has been taken off the bus. A processor may be about to access it all the same.
    detached: bool,
    /// First port of the notifications that KVM handles.
    connected: Option<u16>,
}

impl VirtioPci {
    /// The device as it appears in `slot`.
    pub fn new(
        slot: u8,
        mut device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        routes: Arc<Routes>,
    ) -> io::Result<Self> {
        let name = device.name();
        let queues = device.queue_sizes().len();
        if queues > QUEUE_LIMIT {
            return Err(io::Error::other(format!("{queues} queues, at most {QUEUE_LIMIT} are possible")));
        }
        let interrupt = Arc::new(Msix::new(name, queues, device.shares_interrupt(), Arc::clone(&routes)));
        let notifications = (0..queues)
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<io::Result<Vec<_>>>()?;
        let own_threads = device.take_notifications(&notifications)?;
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: MODERN_DEVICE + device.device_type(),
            class: CLASS,
            subsystem: SUBSYSTEM,
        });
        config.add_ranges(slot);
        let (msix_capability, window_capability) = add_capabilities(&mut config, interrupt.vectors());
        let registers = Registers::new(device.features(), device.queue_sizes());
        Ok(Self {
            slot,
            name,
            memory,
            routes,
            interrupt,
            notifications,
            own_threads,
            ports: AtomicU32::new(NOWHERE),
            window: AtomicU32::new(NOWHERE),
            inner: Mutex::new(Inner {
                device,
                config,
                msix_capability,
                window_capability,
                registers,
                active: false,
                resetting: false,
                detached: false,
                connected: None,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Device number on the bus.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// What kind of device this is, for messages.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The event descriptors of its queues, written when the driver notifies one; none if
    /// nobody else is to wait for them.
    pub fn notifications(&self) -> &[EventFd] {
        if self.own_threads { &[] } else { &self.notifications }
    }

    /// Calls `watch` with the descriptor that the device wants watched, if any.
    pub fn with_poll_fd<T>(&self, watch: impl FnOnce(BorrowedFd<'_>) -> T) -> Option<T> {
        self.lock().device.poll_fd().map(watch)
    }

    /// Where `port` is in the function's ports.
    pub fn port_offset(&self, port: u16) -> Option<u16> {
        let offset = u32::from(port).checked_sub(self.ports.load(Ordering::Acquire))?;
        u16::try_from(offset).ok().filter(|offset| *offset < PORTS_SIZE)
    }

    /// Where `address` is in the function's memory.
    pub fn memory_offset(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(u64::from(self.window.load(Ordering::Acquire)))?;
        (offset < u64::from(MEMORY_SIZE)).then_some(offset)
    }

    /// The driver notified queue `index`; on the event loop's thread.
    pub fn queue_notified(&self, index: u16) {
        self.call(|inner| if inner.active { inner.device.queue_notified(index) } else { Ok(()) });
    }

    /// The device's descriptor is readable; on the event loop's thread.
    pub fn poll_ready(&self) {
        self.call(|inner| inner.device.poll_ready());
    }

    fn call(&self, handler: impl FnOnce(&mut Inner) -> Result<(), DeviceError>) {
        let mut inner = self.lock();
        if let Err(error) = handler(&mut inner) {
            self.fail(&mut inner, &error);
        }
    }

    /// The driver broke the protocol: the device stops until it is reset, and says so.
    fn fail(&self, inner: &mut Inner, error: &DeviceError) {
        crate::report(&format!("the device in slot {} needs a reset", self.slot), error);
        self.disconnect(inner);
        inner.active = false;
        inner.device.reset();
        inner.registers.set_needs_reset();
        self.interrupt.config();
    }

    fn deactivate(&self, inner: &mut Inner) {
        self.disconnect(inner);
        if inner.active {
            inner.active = false;
            inner.device.reset();
        }
    }

    /// Ends the reset that the driver waits for, if nothing writes to its buffers any more.
    fn settle_reset(&self, inner: &mut Inner) {
        if inner.resetting && inner.device.is_reset() {
            inner.resetting = false;
            inner.registers.reset();
            self.interrupt.forget_vectors();
        }
    }

    fn apply(&self, inner: &mut Inner, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Reset => {
                self.deactivate(inner);
                inner.resetting = true;
                self.settle_reset(inner);
            }
            // What it registered then would stay in KVM, in the way of the next device in its slot.
            Effect::Activate if inner.detached => {}
            Effect::Activate => {
                if let Err(error) = self.activate(inner, &[]) {
                    self.fail(inner, &error);
                }
            }
        }
    }

    /// What [`VirtioPci::restore`] needs; none if the device cannot be saved. No processor runs.
    pub fn state(&self) -> Option<FunctionState> {
        let inner = self.lock();
        let device = if inner.active { Some(inner.device.state()?) } else { None };
        Some(FunctionState {
            config: inner.config.bytes().to_vec(),
            registers: inner.registers.clone(),
            interrupt: self.interrupt.state(),
            device,
        })
    }

    /// Goes on where a function with a device of the same kind stopped. No processor runs yet.
    ///
    /// # Errors
    /// If it was of another kind, or its driver had not set it up as a driver does.
    pub fn restore(&self, state: &FunctionState) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        if !state.registers.fits(&inner.registers) {
            let reason = "the saved registers are of another device".into();
            return Err(DeviceError { device: self.name, reason });
        }
        inner.registers = state.registers.clone();
        self.interrupt.restore(&state.interrupt);
        self.configure(&mut inner, 0, &state.config);
        if let Some(device) = &state.device {
            self.activate(&mut inner, &device.positions)?;
            // Whatever was on its way: one interrupt too many does no harm.
            (0..).zip(&self.notifications).for_each(|(index, _)| self.interrupt.queue(index));
        }
        Ok(())
    }

    /// Hands the device its queues, with which it has come as far as `positions` say: not at
    /// all, where they say nothing.
    fn activate(&self, inner: &mut Inner, positions: &[QueuePosition]) -> Result<(), DeviceError> {
        let mut queues = inner.registers.build_queues(&self.memory).map_err(|index| DeviceError {
            device: self.name,
            reason: format!("the driver's setup of queue {index} makes no sense"),
        })?;
        for (queue, position) in queues.iter_mut().zip(positions) {
            queue.set_next_avail(position.available);
            queue.set_next_used(position.used);
        }
        inner.active = true;
        inner.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
            features: inner.registers.features(),
        })?;
        self.connect(inner);
        Ok(())
    }

    /// Lets KVM handle the notifications where the function answers now. Where nobody does,
    /// [`VirtioPci::write_port`] does the same, only slower; where another function answers, which is the guest's own doing,
    /// that one is notified.
    fn connect(&self, inner: &mut Inner) {
        self.disconnect(inner);
        let Some(ports) = inner.config.ports().filter(|_| inner.active) else { return };
        for (address, event) in notification_ports(ports).zip(&self.notifications) {
            if let Err(error) = self.routes.vm().register_ioevent(event, &IoEventAddress::Pio(address), NoDatamatch) {
                crate::report(&format!("notifications of the device in slot {} stay slow", self.slot), &error);
            }
        }
        inner.connected = Some(ports);
    }

    fn disconnect(&self, inner: &mut Inner) {
        let Some(ports) = inner.connected.take() else { return };
        for (address, event) in notification_ports(ports).zip(&self.notifications) {
            // Fails only where the registration did.
            let _ = self.routes.vm().unregister_ioevent(event, &IoEventAddress::Pio(address), NoDatamatch);
        }
    }

    /// Silences the device for good: it has been taken off the bus.
    pub fn detach(&self) {
        let mut inner = self.lock();
        inner.detached = true;
        self.ports.store(NOWHERE, Ordering::Release);
        self.window.store(NOWHERE, Ordering::Release);
        self.deactivate(&mut inner);
        self.interrupt.disconnect();
    }

    /// The guest reads configuration space.
    pub fn read_config(&self, register: usize, data: &mut [u8]) {
        let mut inner = self.lock();
        let window = inner.window_capability + WINDOW_DATA;
        if register == window {
            self.access_window(&mut inner, WindowAccess::Read(data));
        } else {
            inner.config.read(register, data);
        }
    }

    /// The guest writes configuration space.
    pub fn write_config(&self, register: usize, data: &[u8]) {
        let mut inner = self.lock();
        if register == inner.window_capability + WINDOW_DATA {
            self.access_window(&mut inner, WindowAccess::Write(data));
            return;
        }
        self.configure(&mut inner, register, data);
    }

    /// Writes configuration space, with all that follows from it.
    fn configure(&self, inner: &mut Inner, register: usize, data: &[u8]) {
        inner.config.write(register, data);
        let control = (inner.config.word(inner.msix_capability) >> 16) as u16;
        let changed = register..register.saturating_add(data.len().max(1));
        if changed.start < inner.msix_capability + 4 && changed.end > inner.msix_capability {
            self.interrupt.set_control(control & (CONTROL_ENABLE | CONTROL_MASK_ALL));
        }
        let ports = inner.config.ports();
        self.ports.store(ports.map_or(NOWHERE, u32::from), Ordering::Release);
        self.window.store(inner.config.memory().unwrap_or(NOWHERE), Ordering::Release);
        if inner.active && inner.connected != ports {
            self.connect(inner);
        }
    }

    /// An access to the ranges by way of configuration space (4.1.4.9).
    fn access_window(&self, inner: &mut Inner, access: WindowAccess<'_>) {
        let capability = inner.window_capability;
        let range = inner.config.byte(capability + 4);
        let offset = inner.config.word(capability + 8);
        let length = inner.config.word(capability + 12) as usize;
        if !matches!(length, 1 | 2 | 4) {
            return;
        }
        match (access, range, u16::try_from(offset)) {
            (WindowAccess::Read(data), PORTS_BAR, Ok(offset)) => {
                let length = length.min(data.len());
                self.read_register(inner, offset, &mut data[..length]);
            }
            (WindowAccess::Write(data), PORTS_BAR, Ok(offset)) => {
                self.write_register(inner, offset, &data[..length.min(data.len())]);
            }
            (WindowAccess::Read(data), MEMORY_BAR, _) => {
                let length = length.min(data.len());
                self.interrupt.read(u64::from(offset), &mut data[..length]);
            }
            (WindowAccess::Write(data), MEMORY_BAR, _) => {
                self.interrupt.write(u64::from(offset), &data[..length.min(data.len())]);
            }
            _ => {}
        }
    }

    /// The guest reads a port of the function.
    pub fn read_port(&self, offset: u16, data: &mut [u8]) {
        self.read_register(&mut self.lock(), offset, data);
    }

    /// The guest writes a port of the function.
    pub fn write_port(&self, offset: u16, data: &[u8]) {
        self.write_register(&mut self.lock(), offset, data);
    }

    fn read_register(&self, inner: &mut Inner, offset: u16, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON_OFFSET..STATUS_OFFSET => {
                self.settle_reset(inner);
                inner.registers.read(usize::from(offset - COMMON_OFFSET), data, &self.interrupt);
            }
            DEVICE_OFFSET.. => inner.device.read_config(u64::from(offset - DEVICE_OFFSET), data),
            _ => {}
        }
    }

    fn write_register(&self, inner: &mut Inner, offset: u16, data: &[u8]) {
        match offset {
            COMMON_OFFSET..STATUS_OFFSET => {
                self.settle_reset(inner);
                // A driver does not touch a device until it sees its reset done (4.1.4.3.2).
                if inner.resetting {
                    return;
                }
                let effect = inner.registers.write(usize::from(offset - COMMON_OFFSET), data, &self.interrupt);
                self.apply(inner, effect);
            }
            NOTIFY_OFFSET..DEVICE_OFFSET => {
                let queue = usize::from((offset - NOTIFY_OFFSET) / NOTIFY_MULTIPLIER);
                if let Some(event) = self.notifications.get(queue) {
                    // Full means that the event loop has yet to see an earlier one.
                    let _ = event.write(1);
                }
            }
            _ => {}
        }
    }

    /// The guest reads memory of the function.
    pub fn read_memory(&self, offset: u64, data: &mut [u8]) {
        self.interrupt.read(offset, data);
    }

    /// The guest writes memory of the function.
    pub fn write_memory(&self, offset: u64, data: &[u8]) {
        self.interrupt.write(offset, data);
    }

    /// Raw descriptors, for the tests of what hot-removal leaves.
    #[cfg(test)]
    pub fn connected_ports(&self) -> Option<u16> {
        self.lock().connected
    }
}

enum WindowAccess<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

/// Offset of the data register in its capability.
const WINDOW_DATA: usize = 16;

fn notification_ports(ports: u16) -> impl Iterator<Item = u64> {
    (0_u64..).map(move |queue| u64::from(ports) + u64::from(NOTIFY_OFFSET) + queue * u64::from(NOTIFY_MULTIPLIER))
}

/// Appends the capabilities, those that drivers look for most first: each step along the
/// list is an exit. Returns the offsets of MSI-X and of the window.
fn add_capabilities(config: &mut ConfigSpace, vectors: usize) -> (usize, usize) {
    let structure = |kind: u8, offset: u16, size: u16, extra: &[u8]| {
        let mut body = vec![16 + extra.len() as u8, kind, PORTS_BAR, 0, 0, 0];
        body.extend_from_slice(&u32::from(offset).to_le_bytes());
        body.extend_from_slice(&u32::from(size).to_le_bytes());
        body.extend_from_slice(extra);
        body
    };
    let mut msix = (vectors as u16 - 1).to_le_bytes().to_vec();
    msix.extend_from_slice(&u32::from(MEMORY_BAR).to_le_bytes());
    msix.extend_from_slice(&(PENDING_OFFSET as u32 | u32::from(MEMORY_BAR)).to_le_bytes());
    let msix_capability = config.add_capability(CAPABILITY_MSIX, &msix, &[0, 0xc0]);
    let common = structure(STRUCTURE_COMMON, COMMON_OFFSET, registers::SIZE as u16, &[]);
    config.add_capability(CAPABILITY_VENDOR, &common, &[]);
    config.add_capability(CAPABILITY_VENDOR, &structure(STRUCTURE_STATUS, STATUS_OFFSET, 1, &[]), &[]);
    let multiplier = u32::from(NOTIFY_MULTIPLIER).to_le_bytes();
    let notify = structure(STRUCTURE_NOTIFY, NOTIFY_OFFSET, NOTIFY_SIZE, &multiplier);
    config.add_capability(CAPABILITY_VENDOR, &notify, &[]);
    config.add_capability(CAPABILITY_VENDOR, &structure(STRUCTURE_DEVICE, DEVICE_OFFSET, DEVICE_SIZE, &[]), &[]);
    let window = structure(STRUCTURE_WINDOW, 0, 0, &[0; 4]);
    let writable = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
    let window_capability = config.add_capability(CAPABILITY_VENDOR, &window, &writable);
    (msix_capability, window_capability)
}

#[cfg(test)]
#[path = "virtio_tests.rs"]
mod tests;
