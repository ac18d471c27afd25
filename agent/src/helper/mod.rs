//! The helper: the agent's own executable run again, single-threaded, to build one
//! container or one process in one through libcontainer.
//!
//! libcontainer clones the calling process, changes its directory and its attributes;
//! none of that is safe in a process with threads. The agent ([`client`]) sends one
//! request and the descriptors of the process over a socket ([`message`]); the helper
//! ([`child`]) answers with the new process's id and then waits to be released. Until then
//! it is the parent, so that the agent cannot reap what it has not yet registered, and if
//! the agent hangs up instead, the helper kills what it made.

pub mod child;
pub mod client;
mod executor;
mod message;

/// First argument of a process that is to be the helper.
pub const ARGUMENT: &str = "helper";

pub use message::{Create, ExecFailure, Inside, Late, Request, Tenant};
