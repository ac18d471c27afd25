//! The pod's network: CNI plugins make it on the host, the guest takes it over.
//!
//! A pod has a network namespace on the host, named by its sandbox id, in which the plugins
//! work exactly as the CNI specification says ([`cni`]). Each interface that they leave
//! there is joined to a tap: what arrives at the one leaves by the other, both ways, before
//! the host's network stack sees it. The guest gets the tap as its interface, with the MAC,
//! MTU, addresses, routes and neighbours of the plugin's. Those stay where the plugins put
//! them, too: CHECK and DEL look for them.
//!
//! What is done is on record before it is ([`record`]), with all that undoing it takes, so
//! that a pod's network can be taken down after a crash at any moment, and with a
//! configuration that has changed since.
//!
//! Nothing waits without an end: for plugins (killed after their time), for the lock of all networks, for what else is
//! being done for the pod. What hangs holds up its own pod.
//!
//! Everything here blocks, and a thread that has entered a namespace is of no other use, so
//! each operation runs on a thread of its own; nothing of it happens on those of tokio.

mod cancel;
mod capabilities;
mod check;
pub mod cni;
mod config;
mod detach;
mod error;
mod garbage;
mod join;
mod lock;
mod netns;
mod network;
mod parameters;
mod record;
mod status;
mod tap;
mod turn;

pub use capabilities::{Dns, Pod, PortMapping, Protocol};
pub use check::{Checked, Finding};
pub use config::{Mode, NetworkConfig};
pub use error::Error;
pub use nacelle_netlink::{Address, Interface, Mac, Neighbour, Route, Scope};
pub use network::{Attached, GuestInterface, Network};
pub use parameters::Parameters;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests;
