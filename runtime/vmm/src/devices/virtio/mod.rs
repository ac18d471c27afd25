//! The virtio devices. Each is a folder; what they have in common is [`device`].

pub mod block;
pub mod budget;
pub mod chain;
mod chain_queue;
mod config_space;
mod descriptors;
pub mod device;
pub mod fs;
pub mod net;
mod regions;
pub mod ring;
pub mod rng;
mod stretch;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
pub mod wake;
mod workers;
