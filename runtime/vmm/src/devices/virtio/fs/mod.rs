//! virtio-fs: directories and files of the host in the guest (virtio 1.2, section 5.11).
//!
//! One device serves all volumes of a pod. Its root is a directory of the device's own with
//! an entry for each volume; what lies below an entry is the host's. A volume comes as a
//! descriptor of a directory or of a single file and never as a path, and it comes and goes
//! while the guest runs. See [`Volumes`].
//!
//! The FUSE protocol is decoded by `fuse-backend-rs`; what its requests do is here. Its own
//! pass-through file system serves directories by their paths, acts with nothing but the
//! caller's own group (a volume of an `fsGroup` would not be writable), and knows neither
//! single files nor read-only ones.
//!
//! * `volumes`: which volumes there are and at which `places` they begin, and what the guest
//!   knows of them: `nodes` (files it has looked up) and `handles` (files it has open).
//! * `passthrough`: what each request does, with `attributes`, `directory` and `credentials`.
//! * `transfer`: the same for reads and writes, and `short` for names and attributes: what is
//!   frequent, without the crate. `by_crate`: the rest.
//! * `requests`: which of these answers a request, in the threads of `super::workers`. A disk that is slow makes nobody wait
//!   but who reads from it: the event loop never sees a request.
//! * `device`: the registers.
//! * `init`: what the crate does not know yet of the first request.
//!
//! # What the guest caches
//!
//! Names and attributes for a second, so that what the host changes (a kubelet that swaps the
//! link of a ConfigMap) is seen about as fast. The content of a file for as long as its time
//! of modification and its size stay the same. Writes go through: what a process has written
//! is on the host when `write` returns.
//!
//! # What is one file
//!
//! One file of the host is one inode of the guest, through however many volumes the pod's
//! containers reach it, hard links included; so a socket, a pipe, a lock, a shared mapping or a
//! watch is between them what it is on a host. Directories are one in volumes that begin at the
//! same directory and have nothing mounted below (see `places`), which is what containers share.
//!
//! The guest may do with a file what any of the volumes allows that it reached it through; its
//! own mounts are read-only or not for each container. What only read-only volumes lead to stays
//! as it is, whatever the guest asks.
//!
//! # Whose files they are
//!
//! Ids are the same on both sides. In its own mounts the guest may map them (to a pod's user
//! namespace, say), and `init` tells it so: it then maps what it is told and what it says, and
//! names a user in requests that make a file only. No other request is served in anybody's
//! name.
//!
//! # What a guest cannot do
//!
//! It names one component of a path at a time, and no link is followed on the host, so it
//! does not get out of its volumes. It opens regular files and directories only: pipes,
//! sockets and devices that lie in a volume are the guest's own to the guest. It makes no
//! device files. Locks hold among the processes of its pod.

mod attributes;
mod by_crate;
mod config;
mod credentials;
mod device;
mod directory;
mod handles;
mod init;
mod metrics;
mod nodes;
mod numbers;
mod passthrough;
mod places;
mod requests;
mod short;
mod sys;
mod transfer;
mod volumes;

pub use config::TAG;
pub use device::Fs;
pub use metrics::FsMetrics;
pub use places::Access;
pub use volumes::{VolumeError, Volumes};

#[cfg(test)]
mod tests;
