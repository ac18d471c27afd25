//! Containers that were asked to start, without an answer: whether they did is found out, never assumed.

use std::sync::Arc;
use std::time::Duration;

use nacelle_proto::agent::v1 as api;
use nacelle_proto::features;

use super::{NOT_STARTED, Sandbox};
use crate::clock;
use crate::container::Container;
use crate::model::{ContainerState, ExitInfo, ExitReason};
use crate::{Error, Result, replies, signal};

/// How long an agent may take for a start that it does not tell of, before the configuration's factor.
const STARTING: Duration = Duration::from_secs(90);

/// How long a request may take to reach an agent that answers, before the factor.
const ON_ITS_WAY: Duration = Duration::from_secs(5);

/// Whether the guest is about to start it.
pub(super) fn is_starting(there: Option<&api::ContainerInfo>) -> bool {
    there.is_some_and(|info| info.starting)
}

impl Sandbox {
    /// Finds out what became of them.
    ///
    /// # Errors
    /// The guest does not say yet.
    pub(super) async fn settle_containers(self: &Arc<Self>) -> Result<()> {
        let unsettled: Vec<_> = self.containers().into_iter().filter(|container| container.is_unsettled()).collect();
        if unsettled.is_empty() {
            return Ok(());
        }
        let vm = self.vm()?;
        let mut client = self.agent.client();
        let list = client.list_containers(api::ListContainersRequest {});
        let known = replies::containers(self.agent.call("list the guest's containers", list).await?);
        let mut owed = Ok(());
        for container in unsettled {
            let there = known.iter().find(|info| info.container_id == container.id);
            match there.map(api::ContainerInfo::state) {
                Some(api::container_info::State::Created) => {
                    let since = container.unsettled_for().unwrap_or_default();
                    let tells =
                        self.record.lock().versions.agent_features.iter().any(|name| name == features::STARTING);
                    // A request may be on its way still, which the guest cannot tell of.
                    let patience = if tells { ON_ITS_WAY } else { STARTING };
                    let may_start = since < patience.mul_f64(self.manager.timeout_scale);
                    if is_starting(there) || may_start {
                        let action = format!("the start of container {}", container.id);
                        owed = owed.and(Err(Error::Deadline { action, limit: since }));
                    } else {
                        container.set_unsettled(false);
                    }
                }
                Some(api::container_info::State::Running | api::container_info::State::Exited) => {
                    tracing::info!(target: "nacelle::recovery", sandbox = self.id, container = container.id,
                        "a start whose answer was lost has been done");
                    self.runs(&vm, &container);
                }
                _ => container.exited(ExitInfo {
                    code: NOT_STARTED,
                    reason: ExitReason::StartError,
                    message: "the guest no longer knows the container".into(),
                    finished_at: clock::now(),
                }),
            }
        }
        owed
    }

    /// Ends a container of which nobody knows whether it was started.
    ///
    /// # Errors
    /// The guest does not answer.
    pub async fn kill_unsettled(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        if !container.is_unsettled() {
            return Ok(());
        }
        self.signal(&container.id, signal::KILL, true).await?;
        let vm = self.vm()?;
        if container.record().state == ContainerState::Created {
            self.runs(&vm, container);
        }
        Ok(())
    }
}
