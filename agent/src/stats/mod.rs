//! What the pod uses at present, in one answer.
//!
//! * [`layer`]: how much of the scratch disk each container's upper layer takes.
//! * [`network`]: what went over the pod's interfaces.
//! * [`processes`]: what a container's processes have open.
//!
//! The control groups' files are read by `nacelle_proto::usage`. Whatever cannot be read is
//! left out of the answer: figures are no reason for a call to fail.

pub mod layer;
mod network;
mod processes;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use nacelle_proto::agent::v1::{ContainerUsage, DeviceUsage, FilesystemUsage, GroupUsage, StatsRequest, StatsResponse};
use nacelle_proto::usage;
use rustix::time::{ClockId, clock_gettime};

use crate::agent::Agent;
use crate::container::{Container, Status};
use crate::error::Result;
use crate::paths::{CGROUPS, POD_CGROUP};

impl Agent {
    /// Reads everything.
    pub async fn stats(self: &Arc<Self>, request: StatsRequest) -> Result<StatsResponse> {
        let agent = self.clone();
        self.blocking(move || Ok(agent.read_stats(&request))).await
    }

    /// Blocks, for about [`layer::PATIENCE`] at most.
    fn read_stats(&self, request: &StatsRequest) -> StatsResponse {
        let deadline = std::time::Instant::now() + layer::PATIENCE;
        let running = self.containers().into_iter().filter(|c| c.status() == Some(Status::Running));
        let containers = running.map(|container| self.container_usage(&container, request, deadline)).collect();
        StatsResponse {
            containers,
            pod: Some(group(&Path::new(CGROUPS).join(POD_CGROUP))),
            interfaces: match self.sandbox.namespaces() {
                Some(namespaces) => namespaces.inside(network::interfaces).unwrap_or_default(),
                None => network::interfaces(),
            },
            scratch: filesystem(&self.paths.scratch()),
        }
    }

    fn container_usage(
        &self,
        container: &Arc<Container>,
        request: &StatsRequest,
        deadline: std::time::Instant,
    ) -> ContainerUsage {
        let upper = self.paths.upper(&container.id).join("upper");
        ContainerUsage {
            container_id: container.id.clone(),
            group: Some(group(container.cgroup_path())),
            writable_layer: container.layer.measure(&upper, deadline),
            processes: request.processes.then(|| processes::usage(container)),
        }
    }
}

fn group(path: &Path) -> GroupUsage {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let now = seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0));
    let mut usage = usage::read(path, now);
    for device in usage.io.iter_mut().flat_map(|io| &mut io.devices) {
        device.name = device_name(device);
    }
    usage
}

/// As in /dev; empty for a device that has gone.
fn device_name(device: &DeviceUsage) -> String {
    let link = format!("/sys/dev/block/{}:{}", device.major, device.minor);
    let target = fs::read_link(link).unwrap_or_default();
    target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn filesystem(path: &Path) -> Option<FilesystemUsage> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(FilesystemUsage {
        total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        total_inodes: stat.f_files,
        free_inodes: stat.f_favail,
    })
}
