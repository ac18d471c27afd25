//! virtio-blk: disks made of files (virtio 1.2, section 5.2).
//!
//! `disk` knows the files, `request` what the guest may ask of them, `device` the
//! threads that serve its queue. What the host has in memory is read by one of them, request after request, straight to the
//! guest's buffers, and told with one interrupt; what takes as long as a disk makes nobody wait, not even the disk's next
//! request.

mod config;
mod device;
mod disk;
mod metrics;
mod request;

pub use device::Block;
pub use disk::{Disk, DiskError};
pub use metrics::BlockMetrics;

#[cfg(test)]
mod tests;
