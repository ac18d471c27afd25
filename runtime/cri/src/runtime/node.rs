//! The runtime itself: who it is, how it is, what it is told of the node.

use std::collections::HashMap;

use nacelle_proto::runtime::v1 as cri;
use tokio::time::timeout;
use tonic::Status;

use super::Runtime;
use crate::network;
use crate::status::bounded;

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
        let late = || format!("no answer within {:?}", self.patience);
        let health = timeout(self.patience, (self.health)());
        let network = timeout(self.patience, network::condition(self.manager.network()));
        let described = async {
            match request.verbose {
                true => Some(timeout(self.patience, self.manager.network().describe()).await),
                false => None,
            }
        };
        let handlers_health = async {
            match &self.handlers_health {
                Some(health) => timeout(self.patience, health()).await.unwrap_or_else(|_| Err(late())),
                None => Ok(()),
            }
        };
        let (health, network, described, handlers_health) = tokio::join!(health, network, described, handlers_health);
        let health = health.unwrap_or_else(|_| Err(late()));
        let ready = cri::RuntimeCondition {
            r#type: "RuntimeReady".into(),
            status: health.is_ok(),
            reason: if health.is_ok() { String::new() } else { "GuestsCannotRun".into() },
            message: bounded(health.err().unwrap_or_default()),
        };
        // A condition of its own: for a handler that few pods name, a kubelet need not give its node up.
        let handlers_ready = cri::RuntimeCondition {
            r#type: "HandlersReady".into(),
            status: handlers_health.is_ok(),
            reason: if handlers_health.is_ok() { String::new() } else { "HandlerCannotRun".into() },
            message: bounded(handlers_health.err().unwrap_or_default()),
        };
        let network = network.unwrap_or_else(|_| network::not_ready(format!("plugins: {}", late())));
        // Pods without a RuntimeClass ask for the one without a name.
        let names = std::iter::once("").chain(self.handlers.iter().map(|handler| handler.name.as_str()));
        let handlers = names.map(|name| cri::RuntimeHandler {
            name: name.to_owned(),
            features: Some(cri::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: true }),
        });
        let mut info = HashMap::new();
        if request.verbose {
            // None while that is not known.
            let known = self.manager.knows_records();
            let pods = known.then(|| self.manager.sandboxes().len());
            let containers = known.then(|| self.manager.containers().len());
            let state = serde_json::json!({ "version": self.version, "pods": pods, "containers": containers });
            info.insert("nacelle".into(), state.to_string());
        }
        if let Some(described) = described {
            let networks = described.map_or_else(|_| late(), |networks| networks.to_string());
            info.insert("cniconfig".into(), networks);
        }
        Ok(cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions: vec![ready, network, handlers_ready] }),
            info,
            runtime_handlers: handlers.collect(),
            features: Some(cri::RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: false,
                mount_options: true,
            }),
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
