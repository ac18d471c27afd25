//! The list calls whose answers come in pieces.

use nacelle_proto::runtime::v1 as cri;
use tonic::Status;

use super::Runtime;
use crate::pieces::{Pieces, in_pieces};

impl Runtime {
    pub(super) async fn stream_pod_sandboxes(
        &self,
        request: cri::StreamPodSandboxesRequest,
    ) -> Result<Pieces<cri::StreamPodSandboxesResponse>, Status> {
        let pods = self.pods(&request.filter.unwrap_or_default())?;
        Ok(in_pieces(pods, |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes }))
    }

    pub(super) async fn stream_containers(
        &self,
        request: cri::StreamContainersRequest,
    ) -> Result<Pieces<cri::StreamContainersResponse>, Status> {
        let containers = self.pod_containers(&request.filter.unwrap_or_default())?;
        Ok(in_pieces(containers, |containers| cri::StreamContainersResponse { containers }))
    }

    pub(super) async fn stream_container_stats(
        &self,
        request: cri::StreamContainerStatsRequest,
    ) -> Result<Pieces<cri::StreamContainerStatsResponse>, Status> {
        let stats = self.all_container_stats(&request.filter.unwrap_or_default()).await;
        Ok(in_pieces(stats, |container_stats| cri::StreamContainerStatsResponse { container_stats }))
    }

    pub(super) async fn stream_pod_sandbox_stats(
        &self,
        request: cri::StreamPodSandboxStatsRequest,
    ) -> Result<Pieces<cri::StreamPodSandboxStatsResponse>, Status> {
        let stats = self.all_pod_stats(&request.filter.unwrap_or_default()).await;
        Ok(in_pieces(stats, |pod_sandbox_stats| cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }))
    }

    pub(super) async fn stream_pod_sandbox_metrics(
        &self,
        _: cri::StreamPodSandboxMetricsRequest,
    ) -> Result<Pieces<cri::StreamPodSandboxMetricsResponse>, Status> {
        let metrics = self.all_metrics().await;
        Ok(in_pieces(metrics, |pod_sandbox_metrics| cri::StreamPodSandboxMetricsResponse { pod_sandbox_metrics }))
    }
}
