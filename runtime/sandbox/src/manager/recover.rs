//! What is done about what a daemon finds when it starts: in the background, pod by pod, none waiting for another.

use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::task::JoinSet;

use super::Manager;
use crate::cgroup::Cgroup;
use crate::layout::PodPaths;
use crate::model::SandboxState;
use crate::record::{self, SandboxRecord, Unusable};
use crate::sandbox::{network_pod, remove_directory};
use crate::{Error, Result, recovery, scratch};

/// How often records that cannot be read are looked at again, before the configuration's factor.
const AGAIN: Duration = Duration::from_secs(10);

impl Manager {
    /// Takes over the pods that run, and removes what nobody owns. Comes back when everything was tried once; what failed
    /// is tried again in the background.
    pub async fn recover(&self) {
        let mut tasks = JoinSet::new();
        for sandbox in self.all_sandboxes() {
            sandbox.attend();
        }
        let (unowned, templates) =
            std::mem::take(&mut *self.shared.unowned.lock().unwrap_or_else(PoisonError::into_inner));
        let orphans = unowned.len();
        for id in unowned {
            let manager = self.clone();
            tasks.spawn(async move { manager.remove_unowned(&id).await });
        }
        for name in templates {
            let paths = self.shared.layout.pod(&name);
            let limit = self.shared.config.call_deadline();
            tasks.spawn(async move {
                let removed = tokio::task::spawn_blocking(move || {
                    recovery::end_vmm(&paths, limit)?;
                    remove_all(&paths)
                });
                if let Ok(Err(error)) = removed.await {
                    tracing::warn!(target: "nacelle::recovery", template = name, %error, "a half-made template is left");
                }
            });
        }
        let manager = self.clone();
        tasks.spawn(async move { manager.make_scratch_template().await });
        while tasks.join_next().await.is_some() {}
        let pods = self.all_sandboxes().len();
        if pods > 0 || orphans > 0 {
            tracing::info!(target: "nacelle::recovery", pods, orphans, "pods on record are taken over");
        }
        self.look_again();
    }

    /// The disks that all pods' are copied from. Without it now, the first pod makes it.
    async fn make_scratch_template(&self) {
        let directory = self.shared.config.root.join("templates");
        let sizes: BTreeSet<_> = self.shared.config.guests().map(|guest| guest.scratch_mib).collect();
        let made = tokio::task::spawn_blocking(move || {
            sizes.into_iter().try_for_each(|mib| scratch::template(&directory, mib).map(drop))
        })
        .await;
        if let Ok(Err(error)) = made {
            tracing::warn!(%error, "no disk to copy for pods yet");
        }
    }

    /// Removes what is there of a pod that nobody knows.
    async fn remove_unowned(&self, id: &str) {
        let paths = self.shared.layout.pod(id);
        match self.try_remove_unowned(&paths, id).await {
            Ok(()) => {
                tracing::info!(target: "nacelle::recovery", sandbox = id, "half made or half removed by the last daemon: removed");
            }
            Err(error) => self.keep_unowned(paths, id, &error),
        }
    }

    async fn try_remove_unowned(&self, paths: &PodPaths, id: &str) -> Result<()> {
        let limit = self.shared.config.call_deadline();
        let (own, name) = (paths.clone(), id.to_owned());
        let record = tokio::task::spawn_blocking(move || {
            recovery::end_vmm(&own, limit)?;
            let record = record::read::<SandboxRecord>(&own.record(), &name).ok();
            if let Some(process) = record.as_ref().and_then(|record| record.vmm.as_ref()) {
                recovery::end_process(process, limit)?;
            }
            Ok::<_, Error>(record)
        });
        let record = record.await.map_err(|e| Error::Internal(e.to_string()))??;
        let config = record.map(|record| record.config).unwrap_or_default();
        let parent = config.cgroup_parent.clone();
        Cgroup::named(&parent, id)?.remove_within(limit).await?;
        let pod = network_pod(id, &config);
        self.shared.means.network.detach(pod, paths.network()).await?;
        let paths = paths.clone();
        tokio::task::spawn_blocking(move || remove_all(&paths)).await.map_err(|e| Error::Internal(e.to_string()))?
    }

    /// What cannot be removed is listed as a pod that has ended: to be stopped, which tries it again.
    fn keep_unowned(&self, paths: PodPaths, id: &str, error: &Error) {
        tracing::error!(target: "nacelle::recovery", sandbox = id, %error, "half made by the last daemon, and not removed: to be stopped");
        let Ok(mut record) = record::read::<SandboxRecord>(&paths.record(), id) else { return };
        record.state = SandboxState::NotReady;
        record.message = format!("half made by the last daemon, and not all of it could be removed: {error}");
        let sandbox = crate::sandbox::Sandbox::new(self.shared.means.clone(), paths, record);
        self.enter(sandbox.clone());
        sandbox.attend();
    }

    /// Looks at records again that could not be read: one day they can be, and then their pods are as any others.
    fn look_again(&self) {
        let unreadable = |manager: &Self| -> Vec<_> {
            let all = manager.all_sandboxes().into_iter();
            all.filter(|sandbox| matches!(sandbox.why_kept(), Some(Unusable::Unreadable(_)))).collect()
        };
        if unreadable(self).is_empty() {
            return;
        }
        let manager = self.clone();
        tokio::spawn(async move {
            let pause = AGAIN.mul_f64(manager.shared.config.timeout_scale.min(10.0));
            loop {
                tokio::time::sleep(pause).await;
                let kept = unreadable(&manager);
                if kept.is_empty() {
                    return;
                }
                for sandbox in kept {
                    let (means, paths) = (manager.shared.means.clone(), manager.shared.layout.pod(&sandbox.id));
                    let id = sandbox.id.clone();
                    let again = tokio::task::spawn_blocking(move || recovery::look_at(&means, paths, &id)).await;
                    if let Ok(Ok(Some(sandbox))) = again
                        && !matches!(sandbox.why_kept(), Some(Unusable::Unreadable(_)))
                    {
                        tracing::info!(target: "nacelle::recovery", sandbox = sandbox.id, "its record can be read again");
                        manager.enter(sandbox.clone());
                        sandbox.attend();
                    }
                }
            }
        });
    }
}

/// Removes a pod's directories. Blocks.
fn remove_all(paths: &PodPaths) -> Result<()> {
    [&paths.run, &paths.root].into_iter().try_for_each(|path| remove_directory(path))
}
