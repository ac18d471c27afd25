//! The standard streams of processes, between their pipes and the host.
//!
//! * [`buffer`]: bytes with offsets, kept until acknowledged.
//! * [`output`]: one output stream: the pipe fills the buffer, a connection drains it.
//! * [`input`]: one input stream: a connection fills the pipe.
//! * [`streams`]: all streams of one process, and the descriptors it gets.
//! * [`connection`]: one connection of the host, from its header to its end.

pub mod buffer;
pub mod connection;
pub mod input;
pub mod output;
pub mod streams;
