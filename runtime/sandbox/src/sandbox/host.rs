//! What the host holds a pod to beside its limits, which follows from its containers: the
//! kubelet names it for each of those, and they are all in one VMM.

use super::Sandbox;
use crate::model::ContainerState;
use crate::oom;

impl Sandbox {
    /// Brings the VMM's cgroup and `oom_score_adj` in line with the pod and its containers, after
    /// those have changed. What the host does not take costs nothing but itself.
    pub(super) async fn settle_on_host(&self) {
        let (config, vm) = (self.record().config, self.lock().vm.clone());
        let Some(vm) = vm else { return };
        let ended = |state: ContainerState| matches!(state, ContainerState::Exited | ContainerState::Unknown);
        let containers: Vec<_> = self
            .containers()
            .iter()
            .map(|container| container.record())
            .filter(|record| !ended(record.state))
            .map(|record| record.config.resources)
            .collect();
        let cgroup = self.cgroup();
        let id = self.id.clone();
        let done = tokio::task::spawn_blocking(move || {
            // A pod without containers keeps what it had.
            if let Some(value) = oom::of_containers(containers.iter().map(|limits| limits.oom_score_adj)) {
                vm.set_oom_score_adj(value);
            }
            let Some(cgroup) = cgroup.ok().filter(crate::cgroup::Cgroup::exists) else { return };
            cgroup.complete();
            if let Err(error) = cgroup.limit(&config.resources, &config.overhead) {
                tracing::debug!(sandbox = id, %error, "limits on the host not repeated");
            }
            let cpus = containers.iter().map(|limits| limits.cpuset_cpus.as_str());
            cgroup.pin(cpus, containers.iter().map(|limits| limits.cpuset_mems.as_str()));
        });
        if let Err(error) = done.await {
            tracing::error!(sandbox = %self.id, %error, "the pod's place on the host is not settled");
        }
    }
}
