//! The RuntimeService.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use nacelle_image::ImageStore;
use nacelle_proto::runtime::v1 as cri;
use nacelle_proto::runtime::v1::runtime_service_server::RuntimeService;
use nacelle_sandbox::Manager;
use tonic::{Request, Response, Status};

use crate::filter::{id_matches, labels_match};
use crate::status::{invalid, of_sandbox};
use crate::{container, sandbox};

type Reply<T> = Result<Response<T>, Status>;
type Stream<T> = tokio_stream::Empty<Result<T, Status>>;

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
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").field("handlers", &self.handlers).finish_non_exhaustive()
    }
}

impl Runtime {
    /// `handlers` are the names that RunPodSandbox accepts, the first being the default;
    /// `version` is that of the daemon.
    #[must_use]
    pub fn new(manager: Manager, images: ImageStore, handlers: Vec<Handler>, version: String, health: Health) -> Self {
        Self { manager, images, handlers, version, health }
    }

    /// The handler of this name; an empty name is the default.
    fn handler(&self, name: &str) -> Result<&Handler, Status> {
        let found = if name.is_empty() {
            self.handlers.first()
        } else {
            self.handlers.iter().find(|handler| handler.name == name)
        };
        found.ok_or_else(|| {
            let known: Vec<_> = self.handlers.iter().map(|handler| handler.name.as_str()).collect();
            invalid(
                "runtime_handler",
                format!("no handler {name:?}: use one of {known:?} in the RuntimeClass", known = known.join(", ")),
            )
        })
    }

    fn pod_containers(&self, filter: &cri::ContainerFilter) -> Vec<cri::Container> {
        self.manager
            .containers()
            .into_iter()
            .filter(|status| {
                id_matches(&status.id, &filter.id)
                    && id_matches(&status.sandbox_id, &filter.pod_sandbox_id)
                    && filter.state.as_ref().is_none_or(|wanted| wanted.state() == container::state(status.state))
                    && labels_match(&status.config.labels, &filter.label_selector)
            })
            .map(container::item)
            .collect()
    }

    fn pods(&self, filter: &cri::PodSandboxFilter) -> Vec<cri::PodSandbox> {
        self.manager
            .sandboxes()
            .into_iter()
            .filter(|status| {
                id_matches(&status.id, &filter.id)
                    && filter.state.as_ref().is_none_or(|wanted| wanted.state() == sandbox::state(status.state))
                    && labels_match(&status.config.labels, &filter.label_selector)
            })
            .map(sandbox::item)
            .collect()
    }
}

/// A timeout in seconds as the CRI gives it: 0 or less for none.
fn seconds(timeout: i64) -> Option<Duration> {
    u64::try_from(timeout).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs)
}

/// Calls that are answered by UNIMPLEMENTED.
macro_rules! not_there_yet {
    ($($name:ident($request:ty) -> $response:ty;)*) => {
        $(
            fn $name<'life0, 'async_trait>(
                &'life0 self,
                _: Request<$request>,
            ) -> Pin<Box<dyn Future<Output = Reply<$response>> + Send + 'async_trait>>
            where
                'life0: 'async_trait,
                Self: 'async_trait,
            {
                Box::pin(async {
                    Err(Status::unimplemented(concat!(stringify!($name), " is not there yet")))
                })
            }
        )*
    };
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(&self, _: Request<cri::VersionRequest>) -> Reply<cri::VersionResponse> {
        Ok(Response::new(cri::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "nacelle".into(),
            runtime_version: self.version.clone(),
            runtime_api_version: "v1".into(),
        }))
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Reply<cri::StatusResponse> {
        let health = (self.health)().await;
        let ready = cri::RuntimeCondition {
            r#type: "RuntimeReady".into(),
            status: health.is_ok(),
            reason: if health.is_ok() { String::new() } else { "GuestsCannotRun".into() },
            message: health.err().unwrap_or_default(),
        };
        let network = cri::RuntimeCondition {
            r#type: "NetworkReady".into(),
            status: false,
            reason: "NetworkPluginNotReady".into(),
            message: "pods have their loopback interface only: CNI networking is not there yet".into(),
        };
        let handlers = self.handlers.iter().map(|handler| cri::RuntimeHandler {
            name: handler.name.clone(),
            features: Some(cri::RuntimeHandlerFeatures::default()),
        });
        let mut info = HashMap::new();
        if request.into_inner().verbose {
            let pods = self.manager.sandboxes().len();
            let containers = self.manager.containers().len();
            let state = serde_json::json!({ "version": self.version, "pods": pods, "containers": containers });
            info.insert("nacelle".into(), state.to_string());
        }
        Ok(Response::new(cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions: vec![ready, network] }),
            info,
            runtime_handlers: handlers.collect(),
            features: Some(cri::RuntimeFeatures::default()),
        }))
    }

    async fn runtime_config(&self, _: Request<cri::RuntimeConfigRequest>) -> Reply<cri::RuntimeConfigResponse> {
        let linux = cri::LinuxRuntimeConfiguration { cgroup_driver: cri::CgroupDriver::Cgroupfs.into() };
        Ok(Response::new(cri::RuntimeConfigResponse { linux: Some(linux) }))
    }

    async fn run_pod_sandbox(&self, request: Request<cri::RunPodSandboxRequest>) -> Reply<cri::RunPodSandboxResponse> {
        let request = request.into_inner();
        let handler = self.handler(&request.runtime_handler)?;
        let config = request.config.ok_or_else(|| invalid("config", "is missing"))?;
        let config = sandbox::config(config, &handler.name)?;
        let pod_sandbox_id = self.manager.run_sandbox(config).await.map_err(|e| of_sandbox(&e))?;
        Ok(Response::new(cri::RunPodSandboxResponse { pod_sandbox_id }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Reply<cri::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        self.manager.stop_sandbox(required("pod_sandbox_id", &id)?).await.map_err(|e| of_sandbox(&e))?;
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Reply<cri::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        self.manager.remove_sandbox(required("pod_sandbox_id", &id)?).await.map_err(|e| of_sandbox(&e))?;
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Reply<cri::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let status =
            self.manager.sandbox(required("pod_sandbox_id", &request.pod_sandbox_id)?).map_err(|e| of_sandbox(&e))?;
        let mut info = HashMap::new();
        if request.verbose {
            let state = serde_json::json!({
                "pid": status.vmm_pid,
                "runtimeHandler": status.config.handler,
                "message": status.message,
            });
            info.insert("info".into(), state.to_string());
        }
        Ok(Response::new(cri::PodSandboxStatusResponse {
            status: Some(sandbox::status(status)),
            info,
            containers_statuses: Vec::new(),
            timestamp: 0,
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Reply<cri::ListPodSandboxResponse> {
        let items = self.pods(&request.into_inner().filter.unwrap_or_default());
        Ok(Response::new(cri::ListPodSandboxResponse { items }))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Reply<cri::CreateContainerResponse> {
        let request = request.into_inner();
        let pod = required("pod_sandbox_id", &request.pod_sandbox_id)?;
        let config = container::config(request.config.ok_or_else(|| invalid("config", "is missing"))?)?;
        let image = self
            .images
            .get(&config.image)
            .ok_or_else(|| Status::not_found(format!("image {:?} is not present: pull it first", config.image)))?;
        let container_id = self.manager.create_container(pod, config, image).await.map_err(|e| of_sandbox(&e))?;
        Ok(Response::new(cri::CreateContainerResponse { container_id }))
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Reply<cri::StartContainerResponse> {
        let id = request.into_inner().container_id;
        self.manager.start_container(required("container_id", &id)?).await.map_err(|e| of_sandbox(&e))?;
        Ok(Response::new(cri::StartContainerResponse {}))
    }

    async fn stop_container(&self, request: Request<cri::StopContainerRequest>) -> Reply<cri::StopContainerResponse> {
        let request = request.into_inner();
        let grace = seconds(request.timeout).unwrap_or_default();
        let id = required("container_id", &request.container_id)?;
        self.manager.stop_container(id, grace).await.map_err(|e| of_sandbox(&e))?;
        Ok(Response::new(cri::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Reply<cri::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        self.manager.remove_container(required("container_id", &id)?).await.map_err(|e| of_sandbox(&e))?;
        Ok(Response::new(cri::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Reply<cri::ListContainersResponse> {
        let containers = self.pod_containers(&request.into_inner().filter.unwrap_or_default());
        Ok(Response::new(cri::ListContainersResponse { containers }))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Reply<cri::ContainerStatusResponse> {
        let request = request.into_inner();
        let status =
            self.manager.container(required("container_id", &request.container_id)?).map_err(|e| of_sandbox(&e))?;
        let mut info = HashMap::new();
        if request.verbose {
            let state = serde_json::json!({ "sandboxID": status.sandbox_id, "config": status.config });
            info.insert("info".into(), state.to_string());
        }
        Ok(Response::new(cri::ContainerStatusResponse { status: Some(container::status(status)), info }))
    }

    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Reply<cri::ExecSyncResponse> {
        let request = request.into_inner();
        let id = required("container_id", &request.container_id)?;
        let output =
            self.manager.exec_sync(id, request.cmd, seconds(request.timeout)).await.map_err(|e| of_sandbox(&e))?;
        Ok(Response::new(cri::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: output.exit_code,
        }))
    }

    type StreamPodSandboxesStream = Stream<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = Stream<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = Stream<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Stream<cri::StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = Stream<cri::StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = Stream<cri::ContainerEventResponse>;

    not_there_yet! {
        stream_pod_sandboxes(cri::StreamPodSandboxesRequest) -> Self::StreamPodSandboxesStream;
        stream_containers(cri::StreamContainersRequest) -> Self::StreamContainersStream;
        update_container_resources(cri::UpdateContainerResourcesRequest) -> cri::UpdateContainerResourcesResponse;
        reopen_container_log(cri::ReopenContainerLogRequest) -> cri::ReopenContainerLogResponse;
        exec(cri::ExecRequest) -> cri::ExecResponse;
        attach(cri::AttachRequest) -> cri::AttachResponse;
        port_forward(cri::PortForwardRequest) -> cri::PortForwardResponse;
        container_stats(cri::ContainerStatsRequest) -> cri::ContainerStatsResponse;
        list_container_stats(cri::ListContainerStatsRequest) -> cri::ListContainerStatsResponse;
        stream_container_stats(cri::StreamContainerStatsRequest) -> Self::StreamContainerStatsStream;
        pod_sandbox_stats(cri::PodSandboxStatsRequest) -> cri::PodSandboxStatsResponse;
        list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest) -> cri::ListPodSandboxStatsResponse;
        stream_pod_sandbox_stats(cri::StreamPodSandboxStatsRequest) -> Self::StreamPodSandboxStatsStream;
        update_runtime_config(cri::UpdateRuntimeConfigRequest) -> cri::UpdateRuntimeConfigResponse;
        checkpoint_container(cri::CheckpointContainerRequest) -> cri::CheckpointContainerResponse;
        get_container_events(cri::GetEventsRequest) -> Self::GetContainerEventsStream;
        list_metric_descriptors(cri::ListMetricDescriptorsRequest) -> cri::ListMetricDescriptorsResponse;
        list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest) -> cri::ListPodSandboxMetricsResponse;
        stream_pod_sandbox_metrics(cri::StreamPodSandboxMetricsRequest) -> Self::StreamPodSandboxMetricsStream;
        update_pod_sandbox_resources(cri::UpdatePodSandboxResourcesRequest) -> cri::UpdatePodSandboxResourcesResponse;
    }
}

/// A field that must not be empty.
fn required<'a>(field: &str, value: &'a str) -> Result<&'a str, Status> {
    if value.is_empty() { Err(invalid(field, "is empty")) } else { Ok(value) }
}
