//! What happens to pods and containers, until the client hangs up.

use futures_util::stream;
use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{Event, EventKind};
use tonic::Status;

use super::Runtime;
use crate::pieces::Pieces;
use crate::sandbox;
use crate::status::of_missed;

impl Runtime {
    pub(super) async fn get_container_events(
        &self,
        _: cri::GetEventsRequest,
    ) -> Result<Pieces<cri::ContainerEventResponse>, Status> {
        // After an error the client has to look at everything anew: there is no more for it.
        let events = stream::unfold(Some((self.clone(), self.manager.events())), |state| async {
            let (runtime, mut events) = state?;
            match events.next().await {
                Ok(event) => Some((Ok(runtime.event(&*event?)), Some((runtime, events)))),
                Err(missed) => Some((Err(of_missed(missed)), None)),
            }
        });
        Ok(Box::pin(events))
    }

    fn event(&self, event: &Event) -> cri::ContainerEventResponse {
        let kind = match event.kind {
            EventKind::Created => cri::ContainerEventType::ContainerCreatedEvent,
            EventKind::Started => cri::ContainerEventType::ContainerStartedEvent,
            EventKind::Stopped => cri::ContainerEventType::ContainerStoppedEvent,
            EventKind::Deleted => cri::ContainerEventType::ContainerDeletedEvent,
        };
        cri::ContainerEventResponse {
            container_id: event.id.clone(),
            container_event_type: kind.into(),
            created_at: event.at,
            pod_sandbox_status: Some(sandbox::status(event.sandbox.clone())),
            containers_statuses: event.containers.iter().cloned().map(|container| self.container(container)).collect(),
        }
    }
}
