//! What the end-to-end tests, the demo and the benchmarks share: a CRI client, daemons to
//! break, and a look at what pods leave on the host.

pub mod client;
pub mod daemon;
pub mod dead;
pub mod disk;
pub mod host;
pub mod streaming;
