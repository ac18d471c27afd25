//! The end of a container.

use std::fs;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::rootfs::RootFs;
use super::{Container, Phase};
use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::patience::scaled;

/// How long killed processes may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

impl Agent {
    /// Removes a container, whatever it is doing; answers the PCI slots it let go of. One
    /// that does not exist has none.
    pub async fn remove_container(self: &Arc<Self>, id: &str) -> Result<Vec<u32>> {
        let Ok(container) = self.container(id) else { return Ok(Vec::new()) };
        // First of all, so that no call in progress on it takes longer than it must.
        container.begin_removal();
        self.kill_container(&container).await?;
        let _order = container.order.clone().write_owned().await;
        match self.container(id) {
            Ok(same) if Arc::ptr_eq(&same, &container) => {}
            // Another removal was faster.
            _ => return Ok(Vec::new()),
        }
        self.tear_down(&container).await?;
        self.forget_container(id);
        Ok(container.slots.clone())
    }

    /// Undoes a container, however far its creation came. May be repeated.
    pub(super) async fn tear_down(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        self.kill_container(container).await?;
        if let Ok(init) = container.init()
            && timeout(scaled(PATIENCE), init.process.wait()).await.is_err()
        {
            let seconds = scaled(PATIENCE).as_secs();
            return Err(Error::Timeout(format!("container {} has not ended {seconds} s after SIGKILL", container.id)));
        }
        let agent = self.clone();
        let container = container.clone();
        self.blocking(move || agent.clean_up(&container)).await
    }

    async fn kill_container(&self, container: &Arc<Container>) -> Result<()> {
        let container = container.clone();
        self.blocking(move || container.kill()).await
    }

    /// Everything after the last process. Blocks.
    fn clean_up(&self, container: &Container) -> Result<()> {
        container.cgroup.remove()?;
        let state = self.paths.state().join(&container.id);
        match fs::remove_dir_all(&state) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::path("remove the directory", state)(error));
            }
            _ => {}
        }
        let root = RootFs::new(&self.paths, &container.id);
        root.unmount()?;
        self.unmount_sources(&container.id)?;
        for slot in &container.slots {
            self.bus.remove(*slot)?;
        }
        root.remove()
    }
}

impl Container {
    fn begin_removal(&self) {
        let mut state = self.lock();
        // A creation in progress cleans up after itself.
        if state.phase != Phase::Creating {
            state.phase = Phase::Removing;
        }
    }
}
