//! Virtual processors: what they are ([`cpuid`]), how they start ([`registers`]) or go on
//! ([`state`]), and the threads that run them ([`vcpu`]).

mod cpuid;
mod registers;
mod state;
mod vcpu;

pub use state::{CpuState, msr_list};
pub use vcpu::{End, Running, Vcpu};

/// A processor cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// KVM refused a step.
    #[error("cannot {what} of virtual processor {id}")]
    Kvm {
        /// The step.
        what: &'static str,
        /// Index of the processor.
        id: u8,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// KVM does not take a register's value.
    #[error("KVM does not accept machine-specific register {register:#x} of virtual processor {id}")]
    Msr {
        /// Which register.
        register: u32,
        /// Index of the processor.
        id: u8,
    },
    /// Its extended state is larger than what can be saved.
    #[error("virtual processor {id} has more extended state (AMX) than can be saved")]
    Extended {
        /// Index of the processor.
        id: u8,
    },
    /// The boot structures do not fit.
    #[error("cannot write the boot processor's tables to guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The thread cannot be started.
    #[error("cannot start the thread of virtual processor {id}")]
    Thread {
        /// Index of the processor.
        id: u8,
        /// Why.
        source: std::io::Error,
    },
}

/// Reads what the host's KVM can give to a guest's processors. One call serves all.
pub use cpuid::Template;
