//! Changing the limits of a container that lives.

use std::sync::Arc;

use libcontainer::oci_spec::runtime::LinuxResources;
use nacelle_proto::agent::v1::UpdateContainerRequest;

use super::{Status, limits};
use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::json;

impl Agent {
    /// Applies the limits that the request names.
    pub async fn update_container(self: &Arc<Self>, request: UpdateContainerRequest) -> Result<()> {
        let container = self.container(&request.container_id)?;
        let resources: LinuxResources =
            json::read(&request.resources_json).map_err(|error| Error::invalid("resources_json", error.to_string()))?;
        // Beside execs, but not beside the container's start or end.
        let _order = container.order.clone().read_owned().await;
        if !matches!(container.status(), Some(Status::Created | Status::Running)) {
            return Err(Error::State(format!("container {} has ended", container.id)));
        }
        let group = container.cgroup.path().to_owned();
        self.blocking(move || {
            limits::check_memory(&group, &resources)?;
            limits::apply(&group, &resources)
        })
        .await
    }
}
