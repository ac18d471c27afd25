//! The machine as a whole: built from its configuration, served until it ends.

mod devices;
mod names;
mod origin;
mod requests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::BootError;
use crate::bus::Bus;
use crate::config::{MachineConfig, Start};
use crate::console::ConsoleError;
use crate::control::server::{Incoming, Server, ServerError};
use crate::control::{Request, Response};
use crate::cpu::{self, CpuError, End, Running, Vcpu};
use crate::devices::virtio::device::DeviceError;
use crate::devices::virtio::fs::Volumes;
use crate::devices::virtio::vsock::VsockError;
use crate::event_loop::{EventLoop, Mode, Source, Token};
use crate::exit::Exit;
use crate::identity::Identity;
use crate::interrupts::Routes;
use crate::jail::{self, JailError};
use crate::memory::{self, MemoryError};
use crate::pci::{BusError, PciBus};
use crate::saved::SavedError;
use crate::{chain, layout, messages, report, sys};
use devices::Attached;
use names::{Names, Removed};
use origin::{Origin, Template};

const MEMORY_MIB: std::ops::RangeInclusive<u64> = 32..=1_048_576;
const VCPUS: std::ops::RangeInclusive<u8> = 1..=64;

/// The machine cannot be built or served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration asks for something impossible.
    #[error("the machine's configuration is invalid: {0}")]
    Config(String),
    /// There is no usable KVM.
    #[error("cannot use /dev/kvm: run `nacelle check` to find out what this host lacks")]
    Kvm(#[source] kvm_ioctls::Error),
    /// KVM is too old.
    #[error("KVM on this host lacks {0}: Linux 5.10 or newer is needed")]
    Capability(&'static str),
    /// KVM refused a step.
    #[error("cannot {what}")]
    Setup {
        /// The step.
        what: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// See there.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// See there.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// See there.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// See there.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// See there.
    #[error(transparent)]
    Control(#[from] ServerError),
    /// See there.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// See there.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// See there.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// The saved state of a device makes no sense.
    #[error("cannot restore a device")]
    Restore(#[from] DeviceError),
    /// See there.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The host's own resources are exhausted.
    #[error("cannot {what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { what, source }
}

fn setup(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Setup { what, source }
}

/// Builds the machine and serves it until it ends. Sockets that it made are removed, and if it could not be built, its
/// console, too.
///
/// SIGTERM and SIGINT end it as [`Request::Stop`] does; they stay blocked in the calling
/// thread. So does what bounds the system calls of a VMM: the thread is of no use for
/// anything else afterwards.
///
/// # Errors
/// If the machine cannot be built, in which case the guest never ran; or if the host's
/// resources give out while it is served.
pub fn run(config: &MachineConfig) -> Result<Exit, Error> {
    check(config)?;
    build_and_serve(config, Names::make(config)?)
}

/// The same, with this process put into its jail first: it can do nothing else afterwards. To
/// be called while it has one thread only. The process is put on record ([`crate::identity`]), its messages go to a ring
/// from then on, and its standard descriptors nowhere. What it has made by name stays.
///
/// # Errors
/// Those of [`run`], and if the process cannot be jailed.
pub fn run_jailed(config: &MachineConfig) -> Result<Exit, Error> {
    check(config)?;
    let identity = config.identity();
    Identity::own().and_then(|own| own.write(&identity)).map_err(host("put its process on record"))?;
    messages::open(&config.messages())?;
    let names = Names::make(config)?;
    jail::enter(config)?;
    build_and_serve(config, names)
}

fn build_and_serve(config: &MachineConfig, names: Names) -> Result<Exit, Error> {
    let (machine, vcpus, bus) = Machine::build(config, names)?;
    jail::filter::confine()?;
    machine.serve(vcpus, bus)
}

fn check(config: &MachineConfig) -> Result<(), Error> {
    if !MEMORY_MIB.contains(&config.memory_mib) {
        return Err(Error::Config(format!("memory_mib is {}, it must be 32 to 1048576", config.memory_mib)));
    }
    if !VCPUS.contains(&config.vcpus) {
        return Err(Error::Config(format!("vcpus is {}, it must be 1 to 64", config.vcpus)));
    }
    let paths = [&config.kernel, &config.initramfs, &config.vsock, &config.control, &config.console];
    let saved = match &config.start {
        Start::Boot => None,
        Start::Template(files) | Start::Clone(files) => Some([&files.memory, &files.state]),
    };
    match paths.into_iter().chain(saved.into_iter().flatten()).find(|path| !path.is_absolute()) {
        Some(path) => Err(Error::Config(format!("the path {} must be absolute", path.display()))),
        None => Ok(()),
    }
}

struct Machine {
    id: String,
    memory: GuestMemoryMmap,
    pci: Arc<PciBus>,
    events: EventLoop,
    /// The devices on the bus, by slot.
    devices: BTreeMap<u8, Attached>,
    /// What the device of volumes shows, while there is one.
    volumes: Option<(u8, Arc<Volumes>)>,
    /// What it takes to save it.
    template: Option<Template>,
    /// The client that asked for it to be saved.
    saving: Option<u64>,
    control: Server,
    clients: BTreeMap<u64, Token>,
    ended: Arc<Mutex<Option<Exit>>>,
    exit_event: Arc<EventFd>,
    _signals: OwnedFd,
    _sockets: [Removed; 2],
}

/// Opens KVM and makes an empty virtual machine with interrupt controllers.
pub(crate) fn create_vm() -> Result<(Kvm, VmFd), Error> {
    let kvm = Kvm::new().map_err(Error::Kvm)?;
    for (capability, name) in [
        (Cap::Irqfd, "irqfd"),
        (Cap::IrqRouting, "interrupt routing"),
        (Cap::IoeventfdNoLength, "ioeventfd without length"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::SplitIrqchip, "local interrupt controllers alone"),
        (Cap::CoalescedPio, "coalesced port writes"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(Error::Capability(name));
        }
    }
    let vm = loop {
        match kvm.create_vm() {
            // The kernel gives up on a signal here.
            Err(error) if error.errno() == libc::EINTR => {}
            result => break result.map_err(setup("create a virtual machine"))?,
        }
    };
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(setup("set the task segment's address"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(setup("set the identity map's address"))?;
    // Local interrupt controllers in KVM, and no others.
    let controllers = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    vm.enable_cap(&controllers).map_err(setup("create the interrupt controllers"))?;
    Ok((kvm, vm))
}

/// Makes the virtual machine, and its memory with what the guest starts from: at the same
/// time, for the host's kernel spends milliseconds of the first in waiting for grace periods.
fn create_and_load(config: &MachineConfig) -> Result<((Kvm, VmFd), GuestMemoryMmap, Origin), Error> {
    thread::scope(|scope| {
        let creation = thread::Builder::new()
            .name("create-vm".into())
            .spawn_scoped(scope, create_vm)
            .map_err(host("start a thread"))?;
        let loaded = Origin::load(config);
        let created = creation.join().map_err(|_| host("create a virtual machine")(io::Error::other("panic")))??;
        let (memory, origin) = loaded?;
        Ok((created, memory, origin))
    })
}

impl Machine {
    fn build(config: &MachineConfig, names: Names) -> Result<(Self, Vec<Vcpu>, Arc<Bus>), Error> {
        let signals = sys::termination_signals().map_err(host("set up signal handling"))?;
        sys::install_kick_handler().map_err(host("set up signal handling"))?;
        let ((kvm, vm), memory, origin) = create_and_load(config)?;
        memory::register(&vm, &memory)?;

        let features = cpu::Template::read(&kvm).map_err(setup("read the processor features that KVM supports"))?;
        let vcpus =
            (0..config.vcpus).map(|id| Vcpu::new(&vm, &features, id, config.vcpus)).collect::<Result<Vec<_>, _>>()?;
        origin.set_processors(&vm, &vcpus, &memory)?;

        let routes = Arc::new(Routes::new(Arc::new(vm)));
        let pci = Arc::new(PciBus::new(Arc::clone(&routes)));
        if let Some(first) = vcpus.first() {
            pci.collect_addresses(first.fd()).map_err(host("collect port writes"))?;
        }
        let bus = Arc::new(origin.bus(names.console, &pci)?);

        let control = names.control;
        let vsock = origin.vsock(names.vsock)?;

        let mut events = EventLoop::new().map_err(host("create an epoll instance"))?;
        let exit_event =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("create an event descriptor"))?;
        for (fd, source, mode) in [
            (sys::event_fd(&exit_event), Source::Exit, Mode::Edge),
            (signals.as_fd(), Source::Signal, Mode::Level),
            (control.listener(), Source::Listener, Mode::Level),
        ] {
            events.watch(fd, source, mode).map_err(host("watch a descriptor"))?;
        }
        let mut machine = Self {
            id: config.id.clone(),
            memory,
            pci,
            events,
            devices: BTreeMap::new(),
            volumes: None,
            template: Template::of(config, &kvm)?,
            saving: None,
            control,
            clients: BTreeMap::new(),
            ended: Arc::default(),
            exit_event: Arc::new(exit_event),
            _signals: signals,
            _sockets: names.sockets,
        };
        let slot = machine.add_device(Box::new(vsock), String::new())?;
        origin.restore_vsock(&machine.pci, slot)?;
        names.console_file.keep();
        Ok((machine, vcpus, bus))
    }

    /// Starts the processors and handles events until the machine ends.
    fn serve(mut self, vcpus: Vec<Vcpu>, bus: Arc<Bus>) -> Result<Exit, Error> {
        let end = self.end();
        let mut running = Vec::new();
        let mut result = vcpus.into_iter().try_for_each(|vcpu| {
            running.push(vcpu.start(Arc::clone(&bus), Arc::clone(&end))?);
            Ok(())
        });
        let mut ready = Vec::new();
        let exit = loop {
            if let Err(error) = result {
                break Err(error);
            }
            if let Some(exit) = self.ended.lock().unwrap_or_else(PoisonError::into_inner).take() {
                break Ok(exit);
            }
            result = self.events.wait(&mut ready).map_err(host("wait for events"));
            for token in &ready {
                // A source may have gone because of an earlier event of the same batch.
                if let Some(source) = self.events.source(*token) {
                    self.handle(source);
                }
            }
        };
        running.iter().for_each(Running::stop);
        let stopped: Option<Vec<Vcpu>> = running.into_iter().map(Running::join).collect();
        match self.saving.take() {
            None => exit,
            Some(client) => {
                let saved = exit.and_then(|_| self.save(stopped.unwrap_or_default(), &bus));
                let response = match &saved {
                    Ok(()) => Response::Done,
                    Err(error) => Response::Error { message: chain(error) },
                };
                self.control.answer(client, &response);
                saved.map(|()| Exit::Saved)
            }
        }
    }

    /// What ends the machine: the first exit counts.
    fn end(&self) -> End {
        let (ended, event) = (Arc::clone(&self.ended), Arc::clone(&self.exit_event));
        Arc::new(move |exit| {
            ended.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(exit);
            // Full is as good as written: the loop will look.
            let _ = event.write(1);
        })
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Exit => {}
            Source::Signal => self.end()(Exit::Stopped),
            Source::Listener => {
                if let Err(error) = self.accept() {
                    report("cannot accept a control client", &error);
                }
            }
            Source::Client(number) => self.serve_client(number),
            Source::Queue(function, index) => function.queue_notified(index),
            Source::Poll(function) => function.poll_ready(),
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        if let Some(number) = self.control.accept()?
            && let Some(fd) = self.control.client(number)
        {
            let token = self.events.watch(fd, Source::Client(number), Mode::Level)?;
            self.clients.insert(number, token);
        }
        Ok(())
    }

    fn serve_client(&mut self, number: u64) {
        let response = match self.control.receive(number) {
            Incoming::Nothing => return,
            Incoming::Gone => return self.drop_client(number),
            Incoming::Bad(response) => response,
            // Answered when it is done.
            Incoming::Request(Request::Save, fds) if fds.is_empty() && self.may_save() => {
                self.saving = Some(number);
                return self.end()(Exit::Saved);
            }
            Incoming::Request(request, fds) => {
                self.perform(request, fds).unwrap_or_else(|message| Response::Error { message })
            }
        };
        if !self.control.answer(number, &response) {
            self.drop_client(number);
        }
    }

    fn drop_client(&mut self, number: u64) {
        if let (Some(fd), Some(token)) = (self.control.client(number), self.clients.remove(&number)) {
            self.events.forget(fd, token);
        }
        self.control.drop_client(number);
    }
}
