//! The PCI bus: bus 0 with a host bridge at device 0 and virtio devices at 1 to 31, each
//! with function 0 only, configured by mechanism #1 (ports 0xcf8 and 0xcfc).
//!
//! Every device has two address ranges: I/O ports for the virtio registers, because a
//! port access takes KVM a fraction of the work of a memory access, and a page of memory
//! for the MSI-X table, which must be memory. The VMM assigns both by slot number; the
//! guest may move them.

mod bus;
mod config;
mod msix;
mod registers;
mod virtio;

pub use bus::{BusError, PciBus};
pub use virtio::{FunctionState, VirtioPci};
