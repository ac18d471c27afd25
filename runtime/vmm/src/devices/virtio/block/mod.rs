//! virtio-blk: disks made of files (virtio 1.2, section 5.2).
//!
//! `disk` knows the files, `request` what the guest may ask of them, `device` the
//! queue. Requests are served one after the other, by system calls straight on the guest's
//! buffers; all that a batch finished is told with one interrupt.

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
