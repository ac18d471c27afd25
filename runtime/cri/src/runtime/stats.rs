//! What pods and containers use.

use std::collections::HashSet;

use nacelle_proto::runtime::v1 as cri;
use tonic::Status;

use super::{Runtime, required};
use crate::filter::{id_matches, labels_match};
use crate::stats;
use crate::status::of_sandbox;

impl Runtime {
    pub(super) async fn container_stats(
        &self,
        request: cri::ContainerStatsRequest,
    ) -> Result<cri::ContainerStatsResponse, Status> {
        let id = required("container_id", &request.container_id)?;
        let (pod, container) = self.manager.container_stats(id).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::ContainerStatsResponse { stats: Some(stats::container(&container, &pod)) })
    }

    pub(super) async fn list_container_stats(
        &self,
        request: cri::ListContainerStatsRequest,
    ) -> Result<cri::ListContainerStatsResponse, Status> {
        let stats = self.all_container_stats(&request.filter.unwrap_or_default()).await;
        Ok(cri::ListContainerStatsResponse { stats })
    }

    pub(super) async fn pod_sandbox_stats(
        &self,
        request: cri::PodSandboxStatsRequest,
    ) -> Result<cri::PodSandboxStatsResponse, Status> {
        let id = required("pod_sandbox_id", &request.pod_sandbox_id)?;
        let pod = self.manager.sandbox_stats(id).await.map_err(|e| of_sandbox(&e))?;
        Ok(cri::PodSandboxStatsResponse { stats: Some(stats::pod(&pod)) })
    }

    pub(super) async fn list_pod_sandbox_stats(
        &self,
        request: cri::ListPodSandboxStatsRequest,
    ) -> Result<cri::ListPodSandboxStatsResponse, Status> {
        let stats = self.all_pod_stats(&request.filter.unwrap_or_default()).await;
        Ok(cri::ListPodSandboxStatsResponse { stats })
    }

    /// Of the containers that a filter lets through, those that run.
    pub(super) async fn all_container_stats(&self, filter: &cri::ContainerStatsFilter) -> Vec<cri::ContainerStats> {
        let wanted = |container: &nacelle_sandbox::ContainerStatus| {
            id_matches(&container.id, &filter.id)
                && id_matches(&container.sandbox_id, &filter.pod_sandbox_id)
                && labels_match(&container.config.labels, &filter.label_selector)
        };
        // Guests without a container that is asked for are not asked.
        let asked: HashSet<_> =
            self.manager.containers().into_iter().filter(&wanted).map(|container| container.sandbox_id).collect();
        let pods = self.manager.stats(|pod| asked.contains(&pod.id), false).await;
        let containers = pods.iter().flat_map(|pod| pod.containers.iter().map(move |container| (container, pod)));
        containers
            .filter(|(container, _)| wanted(&container.status))
            .map(|(container, pod)| stats::container(container, pod))
            .collect()
    }

    /// Of the pods that a filter lets through, those that are ready.
    pub(super) async fn all_pod_stats(&self, filter: &cri::PodSandboxStatsFilter) -> Vec<cri::PodSandboxStats> {
        let wanted = |pod: &nacelle_sandbox::SandboxStatus| {
            id_matches(&pod.id, &filter.id) && labels_match(&pod.config.labels, &filter.label_selector)
        };
        self.manager.stats(wanted, false).await.iter().map(stats::pod).collect()
    }
}
