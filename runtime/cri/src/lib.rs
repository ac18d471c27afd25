//! The Container Runtime Interface: CRI words in, our types out.
//!
//! [`Runtime`] is the RuntimeService, [`Images`] the ImageService. Translation happens
//! here and nowhere below; gRPC status codes are chosen in [`status`] and nowhere else.
//!
//! What a guest cannot give, or is not there yet, is refused with the field that asked for
//! it: a pod never runs in a weaker form than it was written.

mod calls;
mod connection;
mod container;
mod filter;
mod images;
mod metrics;
mod mounts;
mod namespaces;
mod network;
mod pieces;
mod resources;
mod runtime;
mod sandbox;
mod security;
mod signal;
mod stats;
mod status;
mod streaming;

pub use connection::Connection;
pub use images::Images;
pub use runtime::{Handler, Health, Runtime};
pub use streaming::Pods;
