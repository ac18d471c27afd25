//! The RuntimeService: which call is which.
//!
//! A call is a method of [`Runtime`] with the call's name, message in and message out, in the
//! module of what it is about:
//!
//! * [`node`] has the runtime itself,
//! * [`pods`] has sandboxes,
//! * [`containers`] has containers, and commands in them,
//! * [`stats`] and [`metrics`] have what they use,
//! * [`lists`] has the lists again, in pieces,
//! * [`events`] has what happens to them.

mod containers;
mod events;
mod lists;
mod metrics;
mod node;
mod pods;
mod stats;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use nacelle_image::ImageStore;
use nacelle_proto::runtime::v1 as cri;
use nacelle_proto::runtime::v1::runtime_service_server::RuntimeService;
use nacelle_sandbox::{Manager, Seccomp};
use nacelle_streaming::Door;
use tonic::Status;

use crate::calls::service;
use crate::pieces::Pieces;
use crate::status::invalid;

/// How long Status waits for each of the things that it looks at, side by side: the kubelet, which asks every few
/// seconds, takes a runtime that does not answer for dead.
const PATIENCE: Duration = Duration::from_millis(1900);

/// A RuntimeClass handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// Its name, `kata` unless configured otherwise.
    pub name: String,
}

/// Tells why guests cannot run on this host now, or that they can.
pub type Health = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send + Sync>;

/// The RuntimeService over a [`Manager`] and the images its containers are made of.
#[derive(Clone)]
pub struct Runtime {
    pub(crate) manager: Manager,
    images: ImageStore,
    handlers: Vec<Handler>,
    version: String,
    health: Health,
    handlers_health: Option<Health>,
    streaming: Door,
    unset_seccomp: Seccomp,
    patience: Duration,
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").field("handlers", &self.handlers).finish_non_exhaustive()
    }
}

impl Runtime {
    /// `handlers` are the names that RunPodSandbox accepts, the first being the default;
    /// `version` is that of the daemon; requests of streaming clients are left at `streaming`.
    #[must_use]
    pub fn new(
        manager: Manager,
        images: ImageStore,
        handlers: Vec<Handler>,
        version: String,
        health: Health,
        streaming: Door,
    ) -> Self {
        Self {
            manager,
            images,
            handlers,
            version,
            health,
            handlers_health: None,
            streaming,
            unset_seccomp: Seccomp::Unconfined,
            patience: PATIENCE,
        }
    }

    /// What filters the system calls of a container that names no profile: nothing, unless
    /// this says otherwise.
    #[must_use]
    pub fn with_unset_seccomp(self, unset_seccomp: Seccomp) -> Self {
        Self { unset_seccomp, ..self }
    }

    /// Tells in Status which handlers cannot make pods now, and why, although the runtime can.
    #[must_use]
    pub fn with_handlers_health(self, health: Health) -> Self {
        Self { handlers_health: Some(health), ..self }
    }

    /// A runtime on a host that is slower by this factor.
    #[must_use]
    pub fn with_timeout_scale(self, scale: f64) -> Self {
        Self { patience: PATIENCE.mul_f64(scale), ..self }
    }
}

/// A field that must not be empty.
fn required<'a>(field: &str, value: &'a str) -> Result<&'a str, Status> {
    if value.is_empty() { Err(invalid(field, "is empty")) } else { Ok(value) }
}

service! {
    impl RuntimeService for Runtime {
        streams {
            StreamPodSandboxesStream = Pieces<cri::StreamPodSandboxesResponse>;
            StreamContainersStream = Pieces<cri::StreamContainersResponse>;
            StreamContainerStatsStream = Pieces<cri::StreamContainerStatsResponse>;
            StreamPodSandboxStatsStream = Pieces<cri::StreamPodSandboxStatsResponse>;
            StreamPodSandboxMetricsStream = Pieces<cri::StreamPodSandboxMetricsResponse>;
            GetContainerEventsStream = Pieces<cri::ContainerEventResponse>;
        }
        calls {
            Read version(cri::VersionRequest) -> cri::VersionResponse;
            Read status(cri::StatusRequest) -> cri::StatusResponse;
            Read runtime_config(cri::RuntimeConfigRequest) -> cri::RuntimeConfigResponse;
            Change update_runtime_config(cri::UpdateRuntimeConfigRequest) -> cri::UpdateRuntimeConfigResponse;

            Change run_pod_sandbox(cri::RunPodSandboxRequest) -> cri::RunPodSandboxResponse { sandbox: pod_sandbox_id };
            Change stop_pod_sandbox(cri::StopPodSandboxRequest) -> cri::StopPodSandboxResponse;
            Change remove_pod_sandbox(cri::RemovePodSandboxRequest) -> cri::RemovePodSandboxResponse;
            Read pod_sandbox_status(cri::PodSandboxStatusRequest) -> cri::PodSandboxStatusResponse;
            Read list_pod_sandbox(cri::ListPodSandboxRequest) -> cri::ListPodSandboxResponse;
            Change update_pod_sandbox_resources(cri::UpdatePodSandboxResourcesRequest)
                -> cri::UpdatePodSandboxResourcesResponse;
            Change checkpoint_pod(cri::CheckpointPodRequest) -> cri::CheckpointPodResponse;
            Change restore_pod(cri::RestorePodRequest) -> cri::RestorePodResponse;
            Change port_forward(cri::PortForwardRequest) -> cri::PortForwardResponse;

            Change create_container(cri::CreateContainerRequest) -> cri::CreateContainerResponse
                { container: container_id };
            Change start_container(cri::StartContainerRequest) -> cri::StartContainerResponse;
            Change stop_container(cri::StopContainerRequest) -> cri::StopContainerResponse;
            Change remove_container(cri::RemoveContainerRequest) -> cri::RemoveContainerResponse;
            Read list_containers(cri::ListContainersRequest) -> cri::ListContainersResponse;
            Read container_status(cri::ContainerStatusRequest) -> cri::ContainerStatusResponse;
            Change update_container_resources(cri::UpdateContainerResourcesRequest)
                -> cri::UpdateContainerResourcesResponse;
            Change reopen_container_log(cri::ReopenContainerLogRequest) -> cri::ReopenContainerLogResponse;
            Exec exec_sync(cri::ExecSyncRequest) -> cri::ExecSyncResponse;
            Change exec(cri::ExecRequest) -> cri::ExecResponse;
            Change attach(cri::AttachRequest) -> cri::AttachResponse;
            Change checkpoint_container(cri::CheckpointContainerRequest) -> cri::CheckpointContainerResponse;

            Read container_stats(cri::ContainerStatsRequest) -> cri::ContainerStatsResponse;
            Read list_container_stats(cri::ListContainerStatsRequest) -> cri::ListContainerStatsResponse;
            Read pod_sandbox_stats(cri::PodSandboxStatsRequest) -> cri::PodSandboxStatsResponse;
            Read list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest) -> cri::ListPodSandboxStatsResponse;
            Read list_metric_descriptors(cri::ListMetricDescriptorsRequest) -> cri::ListMetricDescriptorsResponse;
            Read list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest) -> cri::ListPodSandboxMetricsResponse;

            Read stream_pod_sandboxes(cri::StreamPodSandboxesRequest) -> Self::StreamPodSandboxesStream;
            Read stream_containers(cri::StreamContainersRequest) -> Self::StreamContainersStream;
            Read stream_container_stats(cri::StreamContainerStatsRequest) -> Self::StreamContainerStatsStream;
            Read stream_pod_sandbox_stats(cri::StreamPodSandboxStatsRequest) -> Self::StreamPodSandboxStatsStream;
            Read stream_pod_sandbox_metrics(cri::StreamPodSandboxMetricsRequest) -> Self::StreamPodSandboxMetricsStream;
            Read get_container_events(cri::GetEventsRequest) -> Self::GetContainerEventsStream;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
