//! A container that kills the agent's helper, which builds containers and processes, in the guest.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config};

use crate::pods::IMAGE;

/// With what the shell itself has, to be as fast as what it looks for; the nul bytes of arguments are none to `read`.
const SCRIPT: &str = "while [ ! -e /v/stop ]; do for p in /proc/[0-9]*; do read -r c <$p/cmdline
case $c in /inithelper*) kill -9 ${p#/proc/} && echo $p >>/v/killed ;; esac; done; done 2>/dev/null";

/// It runs until it is ended.
#[derive(Debug)]
pub struct Killer {
    container: String,
    volume: PathBuf,
}

impl Killer {
    /// Starts one in a pod. It sees the guest's processes, as a container of a pod with `hostPID` does.
    pub async fn start(client: &Client, pod: &str, volume: PathBuf) -> Result<Self> {
        fs::create_dir(&volume)?;
        let mut config = container_config(IMAGE, &["sh", "-c", SCRIPT]);
        if let Some(security) = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut()) {
            security.namespace_options.get_or_insert_default().pid = cri::NamespaceMode::Node.into();
        }
        config.mounts.push(cri::Mount {
            container_path: "/v".into(),
            host_path: volume.to_string_lossy().into_owned(),
            ..cri::Mount::default()
        });
        let container = client.create_as(pod, config).await.context("create what kills the helper")?;
        client.start(&container).await.context("start what kills the helper")?;
        Ok(Self { container, volume })
    }

    /// Ends it; whether it has killed anything.
    pub async fn end(&self, client: &Client) -> Result<bool> {
        fs::write(self.volume.join("stop"), "")?;
        client.remove(&self.container).await.context("remove what kills the helper")?;
        Ok(Path::new(&self.volume).join("killed").exists())
    }
}
