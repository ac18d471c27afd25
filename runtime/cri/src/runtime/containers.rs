//! Containers, and commands in them.

use std::collections::HashMap;
use std::time::Duration;

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{ContainerImages, ContainerStatus};
use tonic::Status;

use super::{Runtime, required};
use crate::filter::{self, id_matches, labels_match};
use crate::status::{invalid, not_found, of_sandbox, of_token, unsupported};
use crate::{container, mounts, resources, streaming};

impl Runtime {
    pub(super) async fn create_container(
        &self,
        request: cri::CreateContainerRequest,
    ) -> Result<cri::CreateContainerResponse, Status> {
        let pod = required("pod_sandbox_id", &request.pod_sandbox_id)?;
        let config = request.config.ok_or_else(|| invalid("config", "is missing"))?;
        let mut config = container::config(config, &self.unset_seccomp)?;
        let image = self
            .images
            .get(&config.image)
            .ok_or_else(|| not_found(format_args!("image {:?} is not present: pull it first", config.image)))?;
        let mounted = mounts::images(&mut config, &self.images)?;
        let images = ContainerImages { root: image, mounted };
        let container_id = self.manager.create_container(pod, config, images).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::CreateContainerResponse { container_id })
    }

    pub(super) async fn start_container(
        &self,
        request: cri::StartContainerRequest,
    ) -> Result<cri::StartContainerResponse, Status> {
        let id = required("container_id", &request.container_id)?;
        self.manager.start_container(id).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::StartContainerResponse {})
    }

    pub(super) async fn stop_container(
        &self,
        request: cri::StopContainerRequest,
    ) -> Result<cri::StopContainerResponse, Status> {
        let grace = seconds(request.timeout).unwrap_or_default();
        let id = required("container_id", &request.container_id)?;
        self.manager.stop_container(id, grace).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::StopContainerResponse {})
    }

    pub(super) async fn remove_container(
        &self,
        request: cri::RemoveContainerRequest,
    ) -> Result<cri::RemoveContainerResponse, Status> {
        let id = required("container_id", &request.container_id)?;
        self.manager.remove_container(id).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::RemoveContainerResponse {})
    }

    pub(super) async fn list_containers(
        &self,
        request: cri::ListContainersRequest,
    ) -> Result<cri::ListContainersResponse, Status> {
        Ok(cri::ListContainersResponse { containers: self.pod_containers(&request.filter.unwrap_or_default())? })
    }

    pub(super) async fn container_status(
        &self,
        request: cri::ContainerStatusRequest,
    ) -> Result<cri::ContainerStatusResponse, Status> {
        let id = required("container_id", &request.container_id)?;
        let status = self.manager.container(id).map_err(|e| of_sandbox(&e))?;
        let mut info = HashMap::new();
        if request.verbose {
            let state = serde_json::json!({ "sandboxID": status.sandbox_id, "config": status.config });
            info.insert("info".into(), state.to_string());
        }
        Ok(cri::ContainerStatusResponse { status: Some(self.container(status)), info })
    }

    pub(super) async fn update_container_resources(
        &self,
        request: cri::UpdateContainerResourcesRequest,
    ) -> Result<cri::UpdateContainerResourcesResponse, Status> {
        let id = required("container_id", &request.container_id)?;
        let change = resources::resources("linux", request.linux)?;
        self.manager.update_container(id, change).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::UpdateContainerResourcesResponse {})
    }

    pub(super) async fn reopen_container_log(
        &self,
        request: cri::ReopenContainerLogRequest,
    ) -> Result<cri::ReopenContainerLogResponse, Status> {
        let id = required("container_id", &request.container_id)?;
        self.manager.reopen_log(id).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::ReopenContainerLogResponse {})
    }

    pub(super) async fn exec_sync(&self, request: cri::ExecSyncRequest) -> Result<cri::ExecSyncResponse, Status> {
        let id = required("container_id", &request.container_id)?;
        if request.cmd.is_empty() {
            return Err(invalid("cmd", "is empty"));
        }
        let output = self.manager.exec_sync(id, request.cmd, seconds(request.timeout)).await;
        Ok(streaming::collected(output.map_err(|e| of_sandbox(&e))?))
    }

    pub(super) async fn exec(&self, request: cri::ExecRequest) -> Result<cri::ExecResponse, Status> {
        let request = streaming::exec(&self.manager, request)?;
        let url = self.streaming.url(request).map_err(|e| of_token(&e))?;
        Ok(cri::ExecResponse { url })
    }

    pub(super) async fn attach(&self, request: cri::AttachRequest) -> Result<cri::AttachResponse, Status> {
        let request = streaming::attach(&self.manager, &request)?;
        let url = self.streaming.url(request).map_err(|e| of_token(&e))?;
        Ok(cri::AttachResponse { url })
    }

    pub(super) async fn port_forward(
        &self,
        request: cri::PortForwardRequest,
    ) -> Result<cri::PortForwardResponse, Status> {
        let request = streaming::port_forward(&self.manager, &request)?;
        let url = self.streaming.url(request).map_err(|e| of_token(&e))?;
        Ok(cri::PortForwardResponse { url })
    }

    pub(super) async fn checkpoint_container(
        &self,
        _: cri::CheckpointContainerRequest,
    ) -> Result<cri::CheckpointContainerResponse, Status> {
        Err(unsupported(
            "container_id",
            "a single container of a guest cannot be saved: its state is the guest's, which other containers share. Keep \
             what has to outlive the container in a volume",
        ))
    }

    /// A container in the CRI's words.
    pub(super) fn container(&self, status: ContainerStatus) -> cri::ContainerStatus {
        let image = self.images.get(&status.image_id);
        container::status(status, image.as_ref())
    }

    /// The containers that a filter lets through.
    pub(super) fn pod_containers(&self, filter: &cri::ContainerFilter) -> Result<Vec<cri::Container>, Status> {
        let state: Option<cri::ContainerState> = filter::state(filter.state.map(|wanted| wanted.state))?;
        let containers = self.manager.containers().into_iter().filter(|status| {
            id_matches(&status.id, &filter.id)
                && id_matches(&status.sandbox_id, &filter.pod_sandbox_id)
                && state.is_none_or(|wanted| wanted == container::state(status.state))
                && labels_match(&status.config.labels, &filter.label_selector)
        });
        Ok(containers.map(container::item).collect())
    }
}

/// A timeout in seconds as the CRI gives it: 0 or less for none.
fn seconds(timeout: i64) -> Option<Duration> {
    u64::try_from(timeout).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs)
}
