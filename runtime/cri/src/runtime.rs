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
use tonic::{Request, Response, Status};

use crate::pieces::Pieces;
use crate::status::invalid;

type Reply<T> = Result<Response<T>, Status>;

/// How long Status waits for each of the things that it looks at, side by side: the kubelet, which asks every few
/// seconds, takes a runtime that does not answer for dead.
const PATIENCE: Duration = Duration::from_millis(1500);

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
    manager: Manager,
    images: ImageStore,
    handlers: Vec<Handler>,
    version: String,
    health: Health,
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

/// Calls that are the [`Runtime`]'s methods of the same name.
macro_rules! calls {
    ($($name:ident($request:ty) -> $response:ty;)*) => {
        $(
            fn $name<'life0, 'async_trait>(
                &'life0 self,
                request: Request<$request>,
            ) -> Pin<Box<dyn Future<Output = Reply<$response>> + Send + 'async_trait>>
            where
                'life0: 'async_trait,
                Self: 'async_trait,
            {
                // An inherent method comes before the trait's.
                Box::pin(async move { Runtime::$name(self, request.into_inner()).await.map(Response::new) })
            }
        )*
    };
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    type StreamPodSandboxesStream = Pieces<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = Pieces<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = Pieces<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Pieces<cri::StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = Pieces<cri::StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = Pieces<cri::ContainerEventResponse>;

    calls! {
        version(cri::VersionRequest) -> cri::VersionResponse;
        status(cri::StatusRequest) -> cri::StatusResponse;
        runtime_config(cri::RuntimeConfigRequest) -> cri::RuntimeConfigResponse;
        update_runtime_config(cri::UpdateRuntimeConfigRequest) -> cri::UpdateRuntimeConfigResponse;

        run_pod_sandbox(cri::RunPodSandboxRequest) -> cri::RunPodSandboxResponse;
        stop_pod_sandbox(cri::StopPodSandboxRequest) -> cri::StopPodSandboxResponse;
        remove_pod_sandbox(cri::RemovePodSandboxRequest) -> cri::RemovePodSandboxResponse;
        pod_sandbox_status(cri::PodSandboxStatusRequest) -> cri::PodSandboxStatusResponse;
        list_pod_sandbox(cri::ListPodSandboxRequest) -> cri::ListPodSandboxResponse;
        update_pod_sandbox_resources(cri::UpdatePodSandboxResourcesRequest) -> cri::UpdatePodSandboxResourcesResponse;
        port_forward(cri::PortForwardRequest) -> cri::PortForwardResponse;

        create_container(cri::CreateContainerRequest) -> cri::CreateContainerResponse;
        start_container(cri::StartContainerRequest) -> cri::StartContainerResponse;
        stop_container(cri::StopContainerRequest) -> cri::StopContainerResponse;
        remove_container(cri::RemoveContainerRequest) -> cri::RemoveContainerResponse;
        list_containers(cri::ListContainersRequest) -> cri::ListContainersResponse;
        container_status(cri::ContainerStatusRequest) -> cri::ContainerStatusResponse;
        update_container_resources(cri::UpdateContainerResourcesRequest) -> cri::UpdateContainerResourcesResponse;
        reopen_container_log(cri::ReopenContainerLogRequest) -> cri::ReopenContainerLogResponse;
        exec_sync(cri::ExecSyncRequest) -> cri::ExecSyncResponse;
        exec(cri::ExecRequest) -> cri::ExecResponse;
        attach(cri::AttachRequest) -> cri::AttachResponse;
        checkpoint_container(cri::CheckpointContainerRequest) -> cri::CheckpointContainerResponse;

        container_stats(cri::ContainerStatsRequest) -> cri::ContainerStatsResponse;
        list_container_stats(cri::ListContainerStatsRequest) -> cri::ListContainerStatsResponse;
        pod_sandbox_stats(cri::PodSandboxStatsRequest) -> cri::PodSandboxStatsResponse;
        list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest) -> cri::ListPodSandboxStatsResponse;
        list_metric_descriptors(cri::ListMetricDescriptorsRequest) -> cri::ListMetricDescriptorsResponse;
        list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest) -> cri::ListPodSandboxMetricsResponse;

        stream_pod_sandboxes(cri::StreamPodSandboxesRequest) -> Self::StreamPodSandboxesStream;
        stream_containers(cri::StreamContainersRequest) -> Self::StreamContainersStream;
        stream_container_stats(cri::StreamContainerStatsRequest) -> Self::StreamContainerStatsStream;
        stream_pod_sandbox_stats(cri::StreamPodSandboxStatsRequest) -> Self::StreamPodSandboxStatsStream;
        stream_pod_sandbox_metrics(cri::StreamPodSandboxMetricsRequest) -> Self::StreamPodSandboxMetricsStream;
        get_container_events(cri::GetEventsRequest) -> Self::GetContainerEventsStream;
    }
}

#[cfg(test)]
mod tests;
