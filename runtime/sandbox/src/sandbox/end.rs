//! The end of a sandbox: asked for, or seen.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use super::{Sandbox, blocking, remove_directory, remove_file};
use crate::failpoint::step;
use crate::model::{ContainerState, SandboxState};
use crate::record::Unusable;
use crate::vm::{End, Vm};
use crate::{Error, Result, guest_clock, signal};

impl Sandbox {
    /// Follows the guest: when it ends by itself, so do its containers.
    pub(super) fn watch(self: &Arc<Self>, vm: Arc<Vm>) {
        let scale = self.manager.timeout_scale;
        tokio::spawn(guest_clock::keep(self.agent.clone(), vm.clone(), self.id.clone(), scale));
        let sandbox = Arc::downgrade(self);
        tokio::spawn(async move {
            let end = vm.wait_exit().await;
            if let Some(sandbox) = Weak::upgrade(&sandbox) {
                let queue = sandbox.queue.clone();
                let id = sandbox.id.clone();
                let result = queue.run_to_end(async move { sandbox.guest_ended(&end, &vm).await }).await;
                if let Err(error) = result {
                    tracing::warn!(sandbox = id, %error, "not all that the guest used is given back: it is tried again");
                }
            }
        });
    }

    async fn guest_ended(self: &Arc<Self>, end: &End, vm: &Vm) -> Result<()> {
        let asked = self.record.lock().stopping;
        if self.state() != SandboxState::Ready || asked {
            tracing::info!(target: "nacelle::sandbox", sandbox = %self.id, pod = self.name(), "guest ended as asked: {end}");
        }
        if self.state() != SandboxState::Ready {
            return Ok(());
        }
        let console = vm.console();
        if !asked {
            tracing::warn!(target: "nacelle::sandbox", sandbox = %self.id, pod = self.name(), "guest ended by itself: {end}{console}");
        }
        self.ended(end, if asked { String::new() } else { format!("{end}{console}") });
        // What is left to do is done sooner or later; that it has ended is known from now on.
        self.lock().not_adopted = Some("what its guest used is not given back yet".into());
        self.attend();
        Ok(())
    }

    /// Says of the sandbox and its containers that the guest has ended.
    pub(super) fn ended(&self, end: &End, message: String) {
        for container in self.containers() {
            match container.record().state {
                ContainerState::Creating => drop(self.lock().containers.remove(&container.id)),
                _ if container.why_kept().is_none() => container.guest_gone(end),
                _ => {}
            }
        }
        self.change(|record| {
            if record.state != SandboxState::NotReady {
                record.state = SandboxState::NotReady;
                record.message = message;
            }
        });
    }

    /// Ends the containers and the guest. Idempotent.
    ///
    /// # Errors
    /// What could not be ended or given back. It may be asked again.
    pub async fn stop(self: &Arc<Self>) -> Result<()> {
        match &self.kept {
            Some(Unusable::Torn(_) | Unusable::Absent) => return self.end_by_evidence().await,
            Some(why) => return Err(self.is_kept(why)),
            None => {}
        }
        if self.state() != SandboxState::NotReady {
            self.change(|record| record.stopping = true);
            // A full disk keeps no pod from ending.
            if let Err(error) = self.save().await {
                tracing::warn!(sandbox = %self.id, %error, "not on record that the pod is to end");
            }
            step!("stop.noted");
            match self.hold_vm().await {
                Ok(Some(vm)) => self.end_guest(&vm).await?,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(sandbox = %self.id, %error, "VMM not held: its control group is ended");
                    self.remove_cgroup().await?;
                }
            }
            step!("stop.ended");
            self.ended(&End::new("the sandbox was stopped", None), String::new());
            self.attend();
        }
        self.detach_network().await?;
        step!("stop.detached");
        self.release().await?;
        self.lock().not_adopted = None;
        if let Err(error) = self.save().await {
            tracing::warn!(sandbox = %self.id, %error, "not on record yet that the pod has ended");
        }
        Ok(())
    }

    async fn end_guest(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<()> {
        let limit = self.manager.call_deadline();
        let running: Vec<_> = self
            .containers()
            .into_iter()
            .filter(|container| matches!(container.state(), ContainerState::Running | ContainerState::Unknown))
            .collect();
        let mut killed = Vec::new();
        for container in &running {
            if vm.has_ended() {
                break;
            }
            match self.signal(&container.id, signal::KILL, true).await {
                Ok(()) => killed.push(container),
                Err(error @ Error::Deadline { .. }) => {
                    tracing::warn!(sandbox = %self.id, %error, "guest does not answer: killing its VMM");
                    vm.kill().await?;
                }
                Err(error) => {
                    tracing::warn!(container = container.id, %error, "container not killed: the guest's end will do");
                }
            }
        }
        step!("stop.killed");
        // Their last output is in the logs when they are seen to have ended.
        let ended = async {
            for container in killed.iter().filter(|container| container.state() == ContainerState::Running) {
                tokio::select! {
                    () = container.wait_exited() => {}
                    _ = vm.wait_exit() => {}
                }
            }
        };
        let _ = tokio::time::timeout(limit, ended).await;
        if !vm.has_ended()
            && let Err(error) = self.agent.shutdown().await
        {
            tracing::warn!(sandbox = %self.id, %error, "guest does not shut down: killing its VMM");
            return vm.kill().await;
        }
        vm.wait_or_kill(limit).await
    }

    /// Ends what is there of a pod whose record says nothing: by what only its own VMM and daemons can have made.
    async fn end_by_evidence(self: &Arc<Self>) -> Result<()> {
        let (paths, limit) = (self.paths.clone(), self.manager.call_deadline());
        blocking(move || crate::recovery::end_vmm(&paths, limit)).await?;
        self.remove_cgroup().await?;
        self.detach_network().await?;
        self.change(|record| record.state = SandboxState::NotReady);
        Ok(())
    }

    /// Stops it if need be and removes all there is of it.
    ///
    /// # Errors
    /// As [`Sandbox::stop`], and if something cannot be removed.
    pub async fn remove(self: &Arc<Self>) -> Result<()> {
        self.stop().await?;
        step!("remove.stopped");
        let (run, root) = (self.paths.run.clone(), self.paths.root.clone());
        blocking(move || {
            remove_directory(&run)?;
            step!("remove.run");
            remove_directory(&root)
        })
        .await?;
        self.removed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Gives back what only a running guest needs.
    pub(super) async fn release(&self) -> Result<()> {
        self.remove_cgroup().await?;
        step!("release.cgroup");
        self.lock().vm = None;
        let (run, scratch) = (self.paths.run.clone(), self.paths.scratch());
        blocking(move || {
            remove_directory(&run)?;
            step!("release.run");
            remove_file(&scratch)
        })
        .await
    }
}
