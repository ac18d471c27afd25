//! End-to-end tests through the CRI socket, as the kubelet would drive it.
//!
//! They need a node: `hack/node -- <this program>`. Tests that only use pods share the
//! node's daemon and run side by side; tests that break things start a daemon of their
//! own, with directories of its own.

// In helpers too, which clippy does not take for tests.
#![allow(clippy::unwrap_used)]

mod apparmor;
mod clones;
mod container;
mod contexts;
mod events;
mod expectations;
mod faults;
mod handlers;
mod hostile;
mod image;
mod jail;
mod lists;
mod logs;
mod many;
mod metrics;
mod mirrors;
mod network;
mod pod;
mod recovery;
mod resources;
mod restart;
mod security;
mod shared_volumes;
mod start_up;
mod state;
mod stats;
mod streaming;
mod unpatched;
mod user_namespaces;
mod versions;
mod volumes;
mod workloads;
