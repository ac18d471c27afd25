//! virtio-rng: the host's random numbers for the guest (virtio 1.2, section 5.4).

mod device;
mod metrics;

pub(crate) use device::NAME;
pub use device::Rng;
pub use metrics::RngMetrics;
