//! The agent: the pod's containers and what they share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::container::Container;
use crate::devices::PciBus;
use crate::error::{Error, Result};
use crate::paths::Paths;
use crate::reaper::Reaper;
use crate::sandbox::Sandbox;
use crate::stdio::streams::Streams;
use crate::volumes::Volumes;

/// Everything the calls work on. Each call is a method, next to the thing it is about.
#[derive(Debug)]
pub struct Agent {
    /// Where things are.
    pub paths: Paths,
    /// Collects children.
    pub reaper: Arc<Reaper>,
    /// Devices.
    pub bus: PciBus,
    /// What the pod's containers share.
    pub sandbox: Sandbox,
    /// The host's directories and files.
    pub volumes: Volumes,
    containers: Mutex<HashMap<String, Arc<Container>>>,
}

impl Agent {
    /// An agent without containers.
    pub fn new(paths: Paths, reaper: Arc<Reaper>) -> Arc<Self> {
        let bus = PciBus::new(paths.sysfs.clone());
        Arc::new(Self {
            paths,
            reaper,
            bus,
            sandbox: Sandbox::default(),
            volumes: Volumes::default(),
            containers: Mutex::default(),
        })
    }

    /// The container of that name.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.table().get(id).cloned().ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    /// All containers, in no order.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.table().values().cloned().collect()
    }

    /// The streams of a process, or why there are none.
    pub fn streams(&self, container: &str, exec: &str) -> std::result::Result<Arc<Streams>, String> {
        let process = self.container(container).and_then(|container| container.find(exec));
        process.map(|process| process.streams.clone()).map_err(|error| error.to_string())
    }

    /// Enters a container under its name, which must be free.
    pub fn add_container(&self, container: &Arc<Container>) -> Result<()> {
        let mut table = self.table();
        if table.contains_key(&container.id) {
            return Err(Error::ContainerExists(container.id.clone()));
        }
        table.insert(container.id.clone(), container.clone());
        Ok(())
    }

    /// Frees a container's name.
    pub fn forget_container(&self, id: &str) {
        self.table().remove(id);
    }

    /// Runs what would block the agent on a thread of its own.
    pub async fn blocking<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T> + Send + 'static,
    {
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(error) => Err(Error::State(format!("the agent is going down: {error}"))),
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
