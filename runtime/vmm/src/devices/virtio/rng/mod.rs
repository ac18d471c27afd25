//! virtio-rng: the host's random numbers for the guest (virtio 1.2, section 5.4).

mod device;
mod metrics;

pub use device::Rng;
pub use metrics::RngMetrics;
