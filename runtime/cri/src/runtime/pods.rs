//! Sandboxes.

use std::collections::HashMap;

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::clock;
use tonic::Status;

use super::{Handler, Runtime, required};
use crate::filter::{self, id_matches, labels_match};
use crate::status::{bounded, invalid, of_sandbox, unsupported};
use crate::{resources, sandbox};

impl Runtime {
    pub(super) async fn run_pod_sandbox(
        &self,
        request: cri::RunPodSandboxRequest,
    ) -> Result<cri::RunPodSandboxResponse, Status> {
        let handler = self.handler(&request.runtime_handler)?;
        let config = request.config.ok_or_else(|| invalid("config", "is missing"))?;
        let config = sandbox::config(config, &handler.name)?;
        let pod_sandbox_id = self.manager.run_sandbox(config).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::RunPodSandboxResponse { pod_sandbox_id })
    }

    pub(super) async fn stop_pod_sandbox(
        &self,
        request: cri::StopPodSandboxRequest,
    ) -> Result<cri::StopPodSandboxResponse, Status> {
        let id = required("pod_sandbox_id", &request.pod_sandbox_id)?;
        self.manager.stop_sandbox(id).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::StopPodSandboxResponse {})
    }

    pub(super) async fn remove_pod_sandbox(
        &self,
        request: cri::RemovePodSandboxRequest,
    ) -> Result<cri::RemovePodSandboxResponse, Status> {
        let id = required("pod_sandbox_id", &request.pod_sandbox_id)?;
        self.manager.remove_sandbox(id).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::RemovePodSandboxResponse {})
    }

    pub(super) async fn pod_sandbox_status(
        &self,
        request: cri::PodSandboxStatusRequest,
    ) -> Result<cri::PodSandboxStatusResponse, Status> {
        let id = required("pod_sandbox_id", &request.pod_sandbox_id)?;
        let timestamp = clock::now();
        let (status, containers) = self.manager.sandbox_with_containers(id).map_err(|e| of_sandbox(&e))?;
        let mut info = HashMap::new();
        if request.verbose {
            let state = serde_json::json!({
                "pid": status.vmm_pid,
                "runtimeHandler": status.config.handler,
                "message": bounded(status.message.clone()),
                "guest": status.size,
                "answers": status.silent_since.is_none(),
                "silentSince": status.silent_since.map(clock::rfc3339_nanos),
                "notAdopted": status.not_adopted,
                "versions": status.versions,
            });
            info.insert("info".into(), state.to_string());
        }
        Ok(cri::PodSandboxStatusResponse {
            status: Some(sandbox::status(status)),
            info,
            containers_statuses: containers.into_iter().map(|container| self.container(container)).collect(),
            timestamp,
        })
    }

    pub(super) async fn list_pod_sandbox(
        &self,
        request: cri::ListPodSandboxRequest,
    ) -> Result<cri::ListPodSandboxResponse, Status> {
        Ok(cri::ListPodSandboxResponse { items: self.pods(&request.filter.unwrap_or_default())? })
    }

    pub(super) async fn update_pod_sandbox_resources(
        &self,
        request: cri::UpdatePodSandboxResourcesRequest,
    ) -> Result<cri::UpdatePodSandboxResourcesResponse, Status> {
        let id = required("pod_sandbox_id", &request.pod_sandbox_id)?;
        let overhead = resources::resources("overhead", request.overhead)?;
        let resources = resources::resources("resources", request.resources)?;
        self.manager.update_sandbox(id, overhead, resources).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::UpdatePodSandboxResourcesResponse {})
    }

    pub(super) async fn checkpoint_pod(
        &self,
        _: cri::CheckpointPodRequest,
    ) -> Result<cri::CheckpointPodResponse, Status> {
        Err(unsupported("pod_sandbox_id", "pods in guests cannot be saved yet; the pod has not been paused"))
    }

    pub(super) async fn restore_pod(&self, _: cri::RestorePodRequest) -> Result<cri::RestorePodResponse, Status> {
        Err(unsupported("checkpoint_path", "pods in guests cannot be restored yet; nothing has been made"))
    }

    /// The pods that a filter lets through.
    pub(super) fn pods(&self, filter: &cri::PodSandboxFilter) -> Result<Vec<cri::PodSandbox>, Status> {
        let state: Option<cri::PodSandboxState> = filter::state(filter.state.map(|wanted| wanted.state))?;
        let pods = self.manager.sandboxes().into_iter().filter(|status| {
            id_matches(&status.id, &filter.id)
                && state.is_none_or(|wanted| wanted == sandbox::state(status.state))
                && labels_match(&status.config.labels, &filter.label_selector)
        });
        Ok(pods.map(sandbox::item).collect())
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
}
