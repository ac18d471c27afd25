//! The registry's side of a pull: the HTTP API of the OCI distribution specification, read only.
//!
//! Credentials and plain HTTP are handled with care: credentials go only where the registry's own challenge, received
//! over HTTPS or from this host, sends them; plain HTTP is spoken to loopback addresses only, redirects included; a
//! redirect to another host carries no credentials. No answer is taken into memory without a bound.

mod auth;
mod blob;
mod challenge;
mod client;
mod endpoint;

pub use auth::Credentials;
pub use endpoint::{Endpoint, default_endpoints};

pub(crate) use blob::channel;
pub(crate) use client::Repository;
