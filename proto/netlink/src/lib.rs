//! Network interfaces of the calling thread's network namespace, by rtnetlink.
//!
//! Host and guest share this: the host reads what a plugin made of an interface
//! ([`Netlink::interface`]), the agent makes the guest's the same ([`Netlink::configure`]).
//! Everything blocks, and none of it for longer than the kernel takes to answer.

mod address;
mod interface;
mod link;
mod neighbour;
mod route;
mod socket;
mod traffic;

pub use address::Address;
pub use interface::Interface;
pub use link::{Link, Mac, MacError};
pub use neighbour::Neighbour;
pub use route::{Route, Scope};
pub use socket::{Error, Netlink};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
