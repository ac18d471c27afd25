//! The end of a sandbox: asked for, or seen.

use std::sync::{Arc, Weak};

use super::{Sandbox, remove_directory, remove_file};
use crate::model::{ContainerState, SandboxState};
use crate::vm::{End, Vm};
use crate::{Result, signal};

impl Sandbox {
    /// Follows the guest: when it ends by itself, so do its containers.
    pub(super) fn watch(self: &Arc<Self>, vm: Arc<Vm>) {
        let sandbox = Arc::downgrade(self);
        tokio::spawn(async move {
            let end = vm.wait_exit().await;
            if let Some(sandbox) = Weak::upgrade(&sandbox) {
                let queue = sandbox.queue.clone();
                let result = queue.run(async move { sandbox.guest_ended(&end, &vm.console()) }).await;
                if let Err(error) = result {
                    tracing::error!(%error, "end of a guest not recorded");
                }
            }
        });
    }

    fn guest_ended(&self, end: &End, console: &str) -> Result<()> {
        if self.state() != SandboxState::Ready {
            return Ok(());
        }
        tracing::warn!(sandbox = %self.id, "guest ended by itself: {end}{console}");
        for container in self.containers() {
            container.guest_gone(end);
        }
        self.release()?;
        self.update(|record| {
            record.state = SandboxState::NotReady;
            record.message = format!("{end}{console}");
        })
    }

    /// Ends the containers and the guest. Idempotent.
    pub async fn stop(&self) -> Result<()> {
        let vm = match self.state() {
            SandboxState::NotReady => {
                self.detach_network().await?;
                return self.release();
            }
            _ => self.lock().vm.clone(),
        };
        if let Some(vm) = vm {
            let limit = self.manager.call_deadline();
            let running: Vec<_> =
                self.containers().into_iter().filter(|c| c.state() == ContainerState::Running).collect();
            for container in &running {
                if let Err(error) = self.signal(&container.id, signal::KILL, true).await {
                    tracing::warn!(container = container.id, %error, "container not killed: the guest's end will do");
                }
                if !self.agent.answers() {
                    tracing::warn!(sandbox = %self.id, "guest does not answer: killing its VMM");
                    vm.kill().await;
                    break;
                }
            }
            // Their last output is in the logs when they are seen to have ended.
            let ended = async {
                for container in &running {
                    container.wait_exited().await;
                }
            };
            let _ = tokio::time::timeout(limit, ended).await;
            if vm.exit().borrow().is_none()
                && let Err(error) = self.agent.shutdown().await
            {
                tracing::warn!(sandbox = %self.id, %error, "guest does not shut down: killing its VMM");
                vm.kill().await;
            }
            vm.wait_or_kill(limit).await;
        }
        for container in self.containers() {
            container.guest_gone(&End::new("the sandbox was stopped", None));
        }
        self.detach_network().await?;
        self.release()?;
        self.update(|record| record.state = SandboxState::NotReady)
    }

    /// Stops it if need be and removes all there is of it.
    pub async fn remove(&self) -> Result<()> {
        self.stop().await?;
        remove_directory(&self.paths.run)?;
        remove_directory(&self.paths.root)
    }

    /// Gives back what only a running guest needs.
    pub(super) fn release(&self) -> Result<()> {
        self.cgroup()?.remove()?;
        self.lock().vm = None;
        remove_directory(&self.paths.run)?;
        remove_file(&self.paths.scratch())
    }
}
