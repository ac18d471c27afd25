//! Nacelle's virtual machine monitor: one process runs one guest.
//!
//! # Shape
//!
//! [`run`] builds the machine from a [`config::MachineConfig`], starts it, and serves it
//! until it ends. The calling thread becomes the event loop: it handles the queues of network, vsock and random number
//! devices, the control socket and termination signals. It waits for none of them, and what it does for one before the
//! others get their turn has a bound ([`devices::virtio::budget::Budget`]). Each virtual processor has a thread that does
//! nothing but run the guest and handle its register accesses. Each disk ([`devices::virtio::block`]) and the device of
//! volumes ([`devices::virtio::fs`]) have threads of their own, for a file may take as long as its disk does. There are no
//! other threads once the guest runs.
//!
//! [`run_jailed`], which the process of a pod calls, leaves the host behind before that: see `jail`. What the machine has
//! by name on the host (sockets, rings, its process's [`identity`]) is made before, in a directory that it can only read
//! from then on.
//!
//! The process ends with the first thread of its that panics ([`end_at_a_panic`]). What it has to say goes to a ring
//! beside the console's ([`config::MachineConfig::messages`]).
//!
//! A machine may also start where another stopped that was saved, see [`config::Start`]: its
//! memory is then the saved one's, copied page by page as the guest writes to it.
//!
//! What a guest does can cost that guest its devices or its life, never the VMM its
//! integrity: guest memory, queues and registers are hostile input everywhere.
//!
//! # The machine
//!
//! An x86-64 PC without firmware, ACPI and IOAPIC: processors and their local APICs
//! described by an MP table, kvm-clock, one serial port for what the kernel has to say
//! ([`console`]), a PCI bus of virtio devices ([`pci`]), and two ports by which the guest
//! ends the machine ([`exit`]).

mod acceptor;
mod boot;
mod bus;
pub mod config;
pub mod console;
pub mod control;
mod cpu;
pub mod devices;
mod event_loop;
pub mod exit;
pub mod identity;
mod interrupts;
mod jail;
mod layout;
mod machine;
mod memory;
mod messages;
pub mod pci;
mod saved;
mod sys;
mod timer;

use std::error::Error as StdError;

pub use exit::Exit;
pub use identity::Identity;
pub use machine::{Error, run, run_jailed};
use messages::report;
pub use messages::{end_at_a_panic, say};

/// An error and its causes on one line.
#[must_use]
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
