//! The registry's side of a pull: the HTTP API of the OCI distribution specification, read only.
//!
//! Credentials and plain HTTP are handled with care: credentials go only where the registry's own challenge, received
//! over HTTPS or from this host, sends them; plain HTTP is spoken to loopback addresses, redirects included, and to
//! addresses that are configured with it; a redirect to another host carries neither credentials nor configured
//! headers. No answer is taken into memory without a bound.

mod auth;
mod blob;
mod challenge;
mod client;
mod endpoint;
mod exchange;
mod failure;
mod hosts;
mod mirrors;
mod pace;
mod token;

pub use auth::{Credentials, Login};
pub use endpoint::{Endpoint, default_endpoint};
pub use hosts::parse_duration;
pub use mirrors::Mirrors;
pub use pace::Pace;

pub(crate) use blob::channel;
pub(crate) use client::{Manifest, Repository};
