//! Metrics of pods and containers.

use nacelle_proto::runtime::v1 as cri;
use tonic::Status;

use super::Runtime;
use crate::metrics;

impl Runtime {
    pub(super) async fn list_metric_descriptors(
        &self,
        _: cri::ListMetricDescriptorsRequest,
    ) -> Result<cri::ListMetricDescriptorsResponse, Status> {
        Ok(cri::ListMetricDescriptorsResponse { descriptors: metrics::descriptors() })
    }

    pub(super) async fn list_pod_sandbox_metrics(
        &self,
        _: cri::ListPodSandboxMetricsRequest,
    ) -> Result<cri::ListPodSandboxMetricsResponse, Status> {
        Ok(cri::ListPodSandboxMetricsResponse { pod_metrics: self.all_metrics().await })
    }

    /// Of all pods that are ready.
    pub(super) async fn all_metrics(&self) -> Vec<cri::PodSandboxMetrics> {
        self.manager.stats(|_| true, true).await.iter().map(metrics::metrics).collect()
    }
}
