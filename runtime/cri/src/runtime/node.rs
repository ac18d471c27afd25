//! The runtime itself: who it is, how it is, what it is told of the node.

use std::collections::HashMap;

use nacelle_proto::runtime::v1 as cri;
use tonic::Status;

use super::Runtime;
use crate::network;

impl Runtime {
    pub(super) async fn version(&self, _: cri::VersionRequest) -> Result<cri::VersionResponse, Status> {
        Ok(cri::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "nacelle".into(),
            runtime_version: self.version.clone(),
            runtime_api_version: "v1".into(),
        })
    }

    pub(super) async fn status(&self, request: cri::StatusRequest) -> Result<cri::StatusResponse, Status> {
        let health = (self.health)().await;
        let ready = cri::RuntimeCondition {
            r#type: "RuntimeReady".into(),
            status: health.is_ok(),
            reason: if health.is_ok() { String::new() } else { "GuestsCannotRun".into() },
            message: health.err().unwrap_or_default(),
        };
        let network = network::condition(self.manager.network()).await;
        let handlers = self.handlers.iter().map(|handler| cri::RuntimeHandler {
            name: handler.name.clone(),
            features: Some(cri::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: true }),
        });
        let mut info = HashMap::new();
        if request.verbose {
            let pods = self.manager.sandboxes().len();
            let containers = self.manager.containers().len();
            let state = serde_json::json!({ "version": self.version, "pods": pods, "containers": containers });
            info.insert("nacelle".into(), state.to_string());
            info.insert("cniconfig".into(), self.manager.network().describe().await.to_string());
        }
        Ok(cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions: vec![ready, network] }),
            info,
            runtime_handlers: handlers.collect(),
            features: Some(cri::RuntimeFeatures { supplemental_groups_policy: true, ..Default::default() }),
        })
    }

    pub(super) async fn runtime_config(
        &self,
        _: cri::RuntimeConfigRequest,
    ) -> Result<cri::RuntimeConfigResponse, Status> {
        let slices = self.manager.cgroups_are_slices();
        let driver = if slices { cri::CgroupDriver::Systemd } else { cri::CgroupDriver::Cgroupfs };
        let linux = cri::LinuxRuntimeConfiguration { cgroup_driver: driver.into() };
        Ok(cri::RuntimeConfigResponse { linux: Some(linux) })
    }

    pub(super) async fn update_runtime_config(
        &self,
        request: cri::UpdateRuntimeConfigRequest,
    ) -> Result<cri::UpdateRuntimeConfigResponse, Status> {
        network::update(&request)?;
        Ok(cri::UpdateRuntimeConfigResponse {})
    }
}
