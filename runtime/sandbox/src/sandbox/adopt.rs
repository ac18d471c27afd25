//! Taking over what an earlier daemon left: guests that run, and what is known of those that do not.

use std::sync::Arc;

use nacelle_proto::agent::v1 as api;

use super::{NOT_STARTED, Sandbox};
use crate::clock;
use crate::container::Container;
use crate::model::{ContainerState, ExitInfo, SandboxState};
use crate::vm::{End, Vm};
use crate::{Error, Result};

impl Sandbox {
    /// Takes hold of a guest that an earlier daemon started. Fails if it does not answer.
    pub async fn adopt(self: &Arc<Self>, containers: Vec<Arc<Container>>) -> Result<()> {
        let gone = |reason: &str| Error::GuestGone { id: self.id.clone(), reason: reason.into() };
        let process = self.lock().record.vmm.ok_or_else(|| gone("it was never started"))?;
        let vm = Vm::attach(&self.manager, &self.id, &self.paths, Some(self.cgroup()?), process)
            .map(Arc::new)
            .ok_or_else(|| gone("its VMM ended while no daemon was there"))?;
        self.lock().vm = Some(vm.clone());
        for container in &containers {
            self.enter(container);
        }
        let mut client = self.agent.client();
        let list = client.list_containers(api::ListContainersRequest {});
        let known = match self.agent.call("list the guest's containers", list).await {
            Ok(list) => Some(list.containers),
            Err(error) => {
                // A guest that does not answer now may answer later: it is not lost yet.
                tracing::warn!(sandbox = %self.id, %error, "guest adopted as recorded");
                None
            }
        };
        for container in containers {
            match &known {
                Some(known) => {
                    let there = known.iter().find(|info| info.container_id == container.id);
                    self.adopt_container(&vm, &container, there).await?;
                }
                None if container.state() == ContainerState::Running => self.follow(&vm, &container)?,
                None => {}
            }
        }
        self.check_network();
        self.watch(vm);
        Ok(())
    }

    /// Brings a container's record and the guest's view together.
    async fn adopt_container(
        &self,
        vm: &Arc<Vm>,
        container: &Arc<Container>,
        there: Option<&api::ContainerInfo>,
    ) -> Result<()> {
        use api::container_info::State;
        match (container.state(), there.map(api::ContainerInfo::state)) {
            (ContainerState::Exited, _) | (ContainerState::Created, Some(State::Created)) => {}
            // Half made: nobody was told its id.
            (ContainerState::Creating, _) => {
                self.tear_down_container(container).await?;
                container.forget()?;
                self.lock().containers.remove(&container.id);
            }
            (_, None | Some(State::Unspecified)) => container.exited(ExitInfo {
                code: NOT_STARTED,
                reason: "Error".into(),
                message: "the guest no longer knows the container".into(),
                finished_at: clock::now(),
            }),
            // Running as recorded, or started by a daemon that ended before it could say so.
            (_, Some(_)) => self.follow(vm, container)?,
        }
        Ok(())
    }

    /// Goes on following a container whose process was started earlier.
    fn follow(&self, vm: &Arc<Vm>, container: &Arc<Container>) -> Result<()> {
        let log = container.open_log()?;
        container.update(|record| {
            record.state = ContainerState::Running;
            if record.started_at == 0 {
                record.started_at = clock::now();
            }
        })?;
        container.follow(self.agent.clone(), vm.clone(), log, self.manager.call_deadline());
        Ok(())
    }

    /// A sandbox whose guest is gone for good, with what is known of its containers.
    pub fn restore_ended(&self, containers: Vec<Arc<Container>>, reason: &str) -> Result<()> {
        let cgroup = self.cgroup()?;
        let end = End::new(reason, Some(&cgroup));
        for container in &containers {
            if container.state() != ContainerState::Exited {
                container.guest_gone(&end);
            }
        }
        for container in &containers {
            self.enter(container);
        }
        self.release()?;
        self.update(|record| {
            if record.state != SandboxState::NotReady {
                record.state = SandboxState::NotReady;
                record.message = end.reason.clone();
            }
        })
    }
}
