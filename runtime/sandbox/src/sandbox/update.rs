//! Limits that change while the pod runs.

use std::sync::Arc;

use nacelle_proto::agent::v1 as api;

use super::Sandbox;
use crate::model::{ContainerState, Resources, SandboxState};
use crate::{Error, Result, spec};

impl Sandbox {
    /// Changes a container's limits; what is zero or empty stays as it is.
    ///
    /// # Errors
    /// The guest is not large enough, or its kernel refuses.
    pub async fn update_container(self: &Arc<Self>, id: &str, change: Resources) -> Result<()> {
        let container = self.container(id).ok_or_else(|| Error::ContainerNotFound(id.into()))?;
        container.changeable()?;
        let state = container.state();
        if !matches!(state, ContainerState::Created | ContainerState::Running) {
            return container.require(ContainerState::Running, "change its limits");
        }
        let before = container.record().config.resources;
        if let Some(size) = self.record().size {
            size.check(&before, &change)?;
        }
        // A kubelet with a static CPU manager sends nothing else every ten seconds, and it is not for the guest.
        let inside = Resources { cpuset_cpus: String::new(), cpuset_mems: String::new(), ..change.clone() };
        if inside != Resources::default() {
            let limits = spec::limits(&inside, false)?;
            let resources_json = serde_json::to_vec(&limits).map_err(|e| Error::Internal(e.to_string()))?;
            let request = api::UpdateContainerRequest { container_id: id.into(), resources_json };
            let mut client = self.agent.client();
            self.agent.call("change the container's limits", client.update_container(request)).await?;
        }
        if merged(&before, change.clone()) != before {
            // It holds in the guest by now: a full disk only has it on record later.
            container.change(|record| record.config.resources = merged(&record.config.resources, change));
            self.attend();
        }
        self.settle_on_host().await;
        Ok(())
    }

    /// Changes the pod's own limits, outside the guest.
    ///
    /// # Errors
    /// The guest is not large enough.
    pub async fn update_resources(&self, overhead: Resources, resources: Resources) -> Result<()> {
        let record = self.record();
        let (state, size, before) = (record.state, record.size, record.config);
        if state != SandboxState::Ready {
            let thing = format!("sandbox {}", self.id);
            return Err(Error::State { thing, state: "not ready".into(), action: "change its limits" });
        }
        if let Some(size) = size {
            size.check(&before.resources, &resources)?;
        }
        let (overhead, resources) = (merged(&before.overhead, overhead), merged(&before.resources, resources));
        let cgroup = self.cgroup()?;
        if cgroup.exists() {
            cgroup.complete();
            cgroup.limit(&resources, &overhead)?;
        }
        self.update(|record| {
            record.config.overhead = overhead;
            record.config.resources = resources;
        })
        .await
    }
}

/// `before` with what `change` names.
fn merged(before: &Resources, change: Resources) -> Resources {
    let number = |old: i64, new: i64| if new == 0 { old } else { new };
    let text = |old: &str, new: String| if new.is_empty() { old.to_owned() } else { new };
    let mut hugepages = before.hugepages.clone();
    for (size, limit) in change.hugepages {
        match hugepages.iter_mut().find(|(known, _)| *known == size) {
            Some(known) => known.1 = limit,
            None => hugepages.push((size, limit)),
        }
    }
    let mut unified = before.unified.clone();
    unified.extend(change.unified);
    Resources {
        cpu_period: number(before.cpu_period, change.cpu_period),
        cpu_quota: number(before.cpu_quota, change.cpu_quota),
        cpu_shares: number(before.cpu_shares, change.cpu_shares),
        memory_limit: number(before.memory_limit, change.memory_limit),
        memory_swap_limit: number(before.memory_swap_limit, change.memory_swap_limit),
        oom_score_adj: number(before.oom_score_adj, change.oom_score_adj),
        cpuset_cpus: text(&before.cpuset_cpus, change.cpuset_cpus),
        cpuset_mems: text(&before.cpuset_mems, change.cpuset_mems),
        hugepages,
        unified,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_change_does_not_name_stays() {
        let before = Resources {
            cpu_quota: 5,
            memory_limit: 7,
            cpuset_cpus: "0".into(),
            hugepages: vec![("2MB".into(), 1)],
            unified: [("pids.max".to_owned(), "5".to_owned())].into(),
            ..Resources::default()
        };
        assert_eq!(merged(&before, Resources::default()), before);
        let change = Resources {
            memory_limit: 8,
            hugepages: vec![("2MB".into(), 2), ("1GB".into(), 3)],
            unified: [("memory.high".to_owned(), "1".to_owned())].into(),
            ..Resources::default()
        };
        let after = merged(&before, change);
        assert_eq!((after.cpu_quota, after.memory_limit, after.cpuset_cpus.as_str()), (5, 8, "0"));
        assert_eq!(after.hugepages, [("2MB".to_owned(), 2), ("1GB".to_owned(), 3)]);
        assert_eq!(after.unified.len(), 2);
    }
}
