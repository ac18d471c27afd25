//! What is told of a sandbox and its containers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Sandbox;
use crate::agent::Reach;
use crate::container::{Container, Watcher};
use crate::events::EventKind;
use crate::model::{ContainerState, ContainerStatus, SandboxState, SandboxStatus};

impl Sandbox {
    /// It and its containers as they are, those being made left out.
    pub fn snapshot(&self) -> (SandboxStatus, Vec<ContainerStatus>) {
        let containers = self.containers().iter().map(|c| self.container_status(c)).collect::<Vec<_>>();
        let containers = containers.into_iter().filter(|status| status.state != ContainerState::Creating);
        (self.status(), containers.collect())
    }

    /// Enters a container, whose states are told from now on.
    pub(super) fn enter(&self, container: &Arc<Container>) {
        let sandbox = self.me.clone();
        container.watch(Watcher::new(move |id, state| {
            let Some(sandbox) = sandbox.upgrade() else { return };
            match state {
                ContainerState::Created => sandbox.tell(id, EventKind::Created),
                ContainerState::Running => sandbox.tell(id, EventKind::Started),
                ContainerState::Exited => sandbox.tell(id, EventKind::Stopped),
                ContainerState::Creating | ContainerState::Unknown => {}
            }
        }));
        self.lock().containers.insert(container.id.clone(), container.clone());
    }

    /// Tells that the sandbox itself has come into another state.
    pub(super) fn tell_change(&self, before: SandboxState, now: SandboxState) {
        match (before, now) {
            (SandboxState::Creating, SandboxState::Ready) => {
                self.tell(&self.id, EventKind::Created);
                self.tell(&self.id, EventKind::Started);
            }
            (SandboxState::Ready, SandboxState::NotReady) => self.tell(&self.id, EventKind::Stopped),
            _ => {}
        }
    }

    /// Tells that a container was removed.
    pub fn tell_removed(&self, container: &str) {
        self.tell(container, EventKind::Deleted);
    }

    /// Tells that the sandbox was removed with all its containers, once.
    pub fn tell_gone(&self) {
        if self.gone.swap(true, Ordering::Relaxed) {
            return;
        }
        for container in self.containers() {
            self.lock().containers.remove(&container.id);
            self.tell(&container.id, EventKind::Deleted);
        }
        self.tell(&self.id, EventKind::Deleted);
    }

    /// Tells, from now on, of containers that become unknown because the guest does not answer, as
    /// of such that have ended, and of those that turn out to run.
    pub(super) fn tell_reach(&self) {
        let (sandbox, mut reach) = (self.me.clone(), self.agent().watch_reach());
        tokio::spawn(async move {
            let mut unknown = false;
            while reach.changed().await.is_ok() {
                let now = matches!(*reach.borrow_and_update(), Reach::Unknown { .. });
                if std::mem::replace(&mut unknown, now) == now {
                    continue;
                }
                let Some(sandbox) = sandbox.upgrade() else { return };
                let kind = if now { EventKind::Stopped } else { EventKind::Started };
                for container in sandbox.containers() {
                    if container.state() == ContainerState::Running {
                        sandbox.tell(&container.id, kind);
                    }
                }
            }
        });
    }

    fn tell(&self, id: &str, kind: EventKind) {
        self.events.tell(id, kind, || self.snapshot());
    }
}
