//! One virtual processor and the thread that runs it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::{self, JoinHandle};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::GuestMemoryMmap;

use super::{CpuError, CpuState, cpuid, registers};
use crate::bus::{Bus, PortWrite};
use crate::exit::Exit;
use crate::sys;

/// Enough for a loop that calls KVM and, at most, a device's register handler.
const STACK_SIZE: usize = 256 * 1024;

/// What a processor's thread does when the machine has ended because of it.
pub type End = Arc<dyn Fn(Exit) + Send + Sync>;

/// A processor that is set up but does not run yet.
pub struct Vcpu {
    id: u8,
    fd: VcpuFd,
}

/// A processor whose thread runs.
pub struct Running {
    thread: JoinHandle<Vcpu>,
    stop: Arc<AtomicBool>,
    /// `immediate_exit` in the structure shared with KVM. Valid until the thread is
    /// joined, because the thread hands the owner of the mapping back.
    immediate_exit: *const AtomicU8,
}

impl Vcpu {
    /// Makes processor `id` of `count` in `vm`.
    pub fn new(vm: &VmFd, template: &cpuid::Template, id: u8, count: u8) -> Result<Self, CpuError> {
        let failed = |what| move |source| CpuError::Kvm { what, id, source };
        let fd = vm.create_vcpu(u64::from(id)).map_err(failed("ask for creation"))?;
        let features = template.for_processor(id, count).map_err(failed("fit the features"))?;
        fd.set_cpuid2(&features).map_err(failed("set the features"))?;
        registers::set_msrs(&fd, id, template.is_intel())?;
        Ok(Self { id, fd })
    }

    /// KVM's handle.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Makes this the boot processor, which starts a 64-bit kernel at `entry`. The others
    /// wait for it to wake them.
    pub fn boot(&self, memory: &GuestMemoryMmap, entry: u64) -> Result<(), CpuError> {
        registers::write_tables(memory)?;
        registers::set_boot_state(&self.fd, entry)
    }

    /// Takes what it holds; `msrs` is [`super::msr_list`].
    pub fn save(&self, vm: &VmFd, msrs: &[u32]) -> Result<CpuState, CpuError> {
        CpuState::take(vm, &self.fd, self.id, msrs)
    }

    /// Lets it go on where another stopped.
    pub fn restore(&self, state: &CpuState) -> Result<(), CpuError> {
        state.give(&self.fd, self.id)
    }

    /// Starts the processor's thread. `end` is called at most once, from that thread.
    pub fn start(mut self, bus: Arc<Bus>, end: End) -> Result<Running, CpuError> {
        let id = self.id;
        let stop = Arc::new(AtomicBool::new(false));
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: `run` points to a live mapping; only the field's address is taken.
        let immediate_exit = unsafe { &raw const (*run).immediate_exit }.cast();
        let stopping = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                if let Some(exit) = self.run(&bus, &stopping) {
                    end(exit);
                }
                self
            })
            .map_err(|source| CpuError::Thread { id, source })?;
        Ok(Running { thread, stop, immediate_exit })
    }

    /// Runs until the machine ends because of this processor, or until stopped (none).
    fn run(&mut self, bus: &Bus, stop: &AtomicBool) -> Option<Exit> {
        while !stop.load(Ordering::Acquire) {
            match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => match bus.write_port(port, data) {
                    PortWrite::Done => {}
                    PortWrite::End(exit) => return Some(exit),
                },
                Ok(VcpuExit::IoIn(port, data)) => bus.read_port(port, data),
                Ok(VcpuExit::MmioWrite(address, data)) => bus.write_memory(address, data),
                Ok(VcpuExit::MmioRead(address, data)) => bus.read_memory(address, data),
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::Shutdown) => return Some(Exit::TripleFault),
                Ok(VcpuExit::InternalError) => return Some(Exit::Failed(self.internal_error())),
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    return Some(Exit::Failed(format!("the processor refuses to enter the guest, reason {reason:#x}")));
                }
                Ok(other) => return Some(Exit::Failed(format!("unexpected exit {other:?}"))),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(error) => return Some(Exit::Failed(format!("KVM_RUN failed: {error}"))),
            }
        }
        // What the last exit was about is only done with when the guest would be entered again.
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        None
    }

    /// KVM_EXIT_INTERNAL_ERROR in words.
    fn internal_error(&mut self) -> String {
        // SAFETY: the exit reason says that this is the union's live member; both fields
        // are plain integers.
        let (kind, count, data) = unsafe {
            let internal = &self.fd.get_kvm_run().__bindgen_anon_1.internal;
            (internal.suberror, internal.ndata, internal.data)
        };
        let what = match kind {
            1 => "it cannot emulate an instruction (is this a software-virtualised /dev/kvm? `nacelle check` tells)",
            2 => "it met events it cannot deliver together",
            3 => "delivering an event faulted",
            4 => "the hardware reported an exit that it does not know",
            _ => "internal error",
        };
        let position = self.fd.get_regs().map_or(0, |registers| registers.rip);
        let count = usize::try_from(count).unwrap_or(0).min(data.len());
        format!("{what}; kind {kind}, instruction pointer {position:#x}, data {:x?}", &data[..count])
    }
}

impl Running {
    /// Asks the processor to stop; it does at its next exit, which this brings about.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        // SAFETY: see the field. KVM reads it whenever it enters the guest, so neither a
        // signal before the entry nor one during it is lost.
        unsafe { &*self.immediate_exit }.store(1, Ordering::SeqCst);
        sys::kick(&self.thread);
    }

    /// Waits for the thread to end; call [`Running::stop`] before. None if it panicked, which in a VMM's own process
    /// ends that ([`crate::end_at_a_panic`]).
    pub fn join(self) -> Option<Vcpu> {
        self.thread.join().ok()
    }
}
