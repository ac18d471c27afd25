//! What there is to be: pods and containers as somebody wants them, and how a kubelet goes about it.
//!
//! A pod is brought to what is wanted step by step, each step asking first what is there if an answer was lost. That is
//! done once while something goes wrong, where it may fail, and again afterwards, where it may not.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, image, limit, log_lines, pod_config};

/// What every container does: it says that it was started, prints numbered lines, and counts them when it is told to end.
const SCRIPT: &str = "echo start >>/v/starts; trap 'echo end $i; exit 0' TERM; i=0
while :; do i=$((i+1)); echo line $i; [ $((i % 10)) -ne 0 ] || sleep 1; done";
/// The image of all containers.
pub const IMAGE: &str = "busybox";
/// What a container has to end, in seconds.
const GRACE: u64 = 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    Running,
    Ended,
    Gone,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    pub id: Option<String>,
    pub want: Want,
    config: cri::ContainerConfig,
    /// Whether it may be there without anybody having been told its id.
    asked: bool,
    log: PathBuf,
    /// What was its log before, the oldest first.
    rotated: Vec<PathBuf>,
    /// How often it is to have been rotated, and how often a new one was opened.
    rotations: usize,
    reopened: usize,
    volume: PathBuf,
    /// Lines in its log when that was last read.
    pub lines: usize,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    pub id: Option<String>,
    pub wanted: bool,
    config: cri::PodSandboxConfig,
    asked: bool,
    pub containers: Vec<Container>,
    directory: PathBuf,
}

impl Container {
    fn name(&self) -> &str {
        self.config.metadata.as_ref().map_or("", |metadata| &metadata.name)
    }

    fn has_disk(&self) -> bool {
        !self.config.devices.is_empty()
    }

    /// How often it was started.
    pub fn starts(&self) -> usize {
        fs::read_to_string(self.volume.join("starts")).map_or(0, |starts| starts.lines().count())
    }

    /// Its id, which was lost, or none if there is no such container.
    async fn find(&mut self, client: &Client, pod: &str) -> Result<()> {
        if self.id.is_some() || !self.asked {
            return Ok(());
        }
        let filter = cri::ContainerFilter { pod_sandbox_id: pod.into(), ..Default::default() };
        let request = cri::ListContainersRequest { filter: Some(filter) };
        let listed = client.runtime.clone().list_containers(request).await?.into_inner().containers;
        let name = self.name().to_owned();
        let ours = listed.into_iter().filter(|c| c.metadata.as_ref().is_some_and(|metadata| metadata.name == name));
        let ids: Vec<_> = ours.map(|container| container.id).collect();
        ensure!(ids.len() < 2, "the container {name} is there twice: {ids:?}");
        self.id = ids.into_iter().next();
        self.asked = self.id.is_some();
        Ok(())
    }

    /// Brings it to what is wanted, a step after the other.
    async fn drive(&mut self, client: &Client, pod: &str) -> Result<()> {
        self.find(client, pod).await?;
        if self.want == Want::Gone {
            if let Some(id) = &self.id {
                client.remove(id).await.context("RemoveContainer")?;
                self.asked = false;
            }
            return Ok(());
        }
        if self.id.is_none() {
            present(client).await?;
            self.asked = true;
            self.id = Some(client.create_as(pod, self.config.clone()).await.context("CreateContainer")?);
        }
        let Some(id) = &self.id else { bail!("no id") };
        let state = client.status(id).await.context("ContainerStatus")?.state();
        if state == cri::ContainerState::ContainerCreated {
            client.start(id).await.context("StartContainer")?;
        }
        if self.want == Want::Ended && client.status(id).await?.state() != cri::ContainerState::ContainerExited {
            client.stop(id, limit(GRACE).as_secs().try_into()?).await.context("StopContainer")?;
        }
        if self.want == Want::Running && self.reopened < self.rotations {
            let id = id.clone();
            self.rotate(client, id).await?;
        }
        Ok(())
    }

    /// Its log is to be rotated.
    pub fn want_rotation(&mut self) {
        self.rotations = self.rotated.len() + 1;
    }

    /// As a kubelet does it: renames the log, and has a new one opened. Until that is done, lines go to the one that was
    /// renamed.
    async fn rotate(&mut self, client: &Client, id: String) -> Result<()> {
        if self.rotated.len() < self.rotations {
            let place = self.log.with_extension(format!("log.{}", self.rotated.len()));
            fs::rename(&self.log, &place).with_context(|| format!("rename {}", self.log.display()))?;
            self.rotated.push(place);
        }
        let request = cri::ReopenContainerLogRequest { container_id: id };
        client.runtime.clone().reopen_container_log(request).await.context("ReopenContainerLog")?;
        ensure!(self.log.exists(), "{} is not there, although it was opened anew", self.log.display());
        self.reopened = self.rotated.len();
        Ok(())
    }

    /// What is wrong with it.
    pub async fn broken(&mut self, client: &Client) -> Vec<String> {
        let mut broken = Vec::new();
        let Some(id) = self.id.clone() else { return vec![format!("container {} has no id", self.name())] };
        let wanted = match self.want {
            Want::Running => cri::ContainerState::ContainerRunning,
            _ => cri::ContainerState::ContainerExited,
        };
        match client.status(&id).await {
            Ok(status) if status.state() == wanted => {}
            Ok(status) => broken.push(format!(
                "container {id} is {:?} and not {wanted:?}: {} {} {}",
                status.state(),
                status.exit_code,
                status.reason,
                status.message
            )),
            Err(error) => broken.push(format!("status of container {id}: {error}")),
        }
        if self.starts() != 1 {
            broken.push(format!("container {id} was started {} times", self.starts()));
        }
        match self.said() {
            Ok((lines, _)) if self.want == Want::Running && lines <= self.lines => {
                broken.push(format!("the log of {id} does not grow from {lines} lines"));
            }
            Ok((_, false)) if self.want == Want::Ended => broken.push(format!("the log of {id} lacks its end")),
            Ok(_) => {}
            Err(error) => broken.push(format!("log of {id}: {error:#}")),
        }
        broken
    }

    /// How many lines its log has, which have to be all, each once and in order; and whether it has said its end.
    pub fn said(&self) -> Result<(usize, bool)> {
        let (mut count, mut ended) = (0, false);
        let mut lines = Vec::new();
        for log in self.rotated.iter().chain([&self.log]).filter(|log| log.exists()) {
            lines.extend(log_lines(log)?);
        }
        for (stream, line) in &lines {
            ensure!(!ended, "{line:?} comes after the end");
            if let Some(end) = line.strip_prefix("end ") {
                ensure!(end.parse() == Ok(count), "it said {end} lines, and the log has {count}");
                ended = true;
            } else {
                count += 1;
                ensure!(stream == "stdout" && *line == format!("line {count}"), "{line:?} comes as line {count}");
            }
        }
        Ok((count, ended))
    }
}

/// Pulls the image of all containers where it is not: who removed the other name of it removed the image, as
/// RemoveImage has to.
async fn present(client: &Client) -> Result<()> {
    let spec = cri::ImageSpec { image: image(IMAGE), ..Default::default() };
    let request = cri::ImageStatusRequest { image: Some(spec), verbose: false };
    let found = client.images.clone().image_status(request).await.context("ImageStatus")?.into_inner().image;
    if found.is_none() {
        client.pull(IMAGE).await.context("PullImage")?;
    }
    Ok(())
}

impl Pod {
    /// One that is wanted, without containers.
    pub fn wanted(directory: &Path, cgroup: &str, number: usize) -> Result<Self> {
        let directory = directory.join(format!("pod{number}"));
        fs::create_dir(&directory)?;
        let mut config = pod_config(&directory);
        if let Some(linux) = &mut config.linux {
            linux.cgroup_parent = cgroup.into();
        }
        Ok(Self { id: None, wanted: true, config, asked: false, containers: Vec::new(), directory })
    }

    /// Another container is wanted in it, with an image as a volume or without, and a block volume if there is one.
    pub fn want_container(&mut self, number: usize, with_image: bool, disk: Option<cri::Device>) -> Result<()> {
        let volume = self.directory.join(format!("volume{number}"));
        fs::create_dir(&volume)?;
        let mut config = container_config(IMAGE, &["sh", "-c", SCRIPT]);
        config.mounts.push(cri::Mount {
            container_path: "/v".into(),
            host_path: volume.to_string_lossy().into_owned(),
            ..cri::Mount::default()
        });
        if with_image {
            config.mounts.push(cri::Mount {
                container_path: "/i".into(),
                image: Some(cri::ImageSpec { image: image(IMAGE), ..Default::default() }),
                readonly: true,
                ..cri::Mount::default()
            });
        }
        config.devices.extend(disk);
        let log = self.directory.join(&config.log_path);
        let container = Container {
            id: None,
            want: Want::Running,
            config,
            asked: false,
            log,
            rotated: Vec::new(),
            rotations: 0,
            reopened: 0,
            volume,
            lines: 0,
        };
        self.containers.push(container);
        Ok(())
    }

    /// Whether a container that is to run has a block volume.
    pub fn has_disk(&self) -> bool {
        self.containers.iter().any(|container| container.want == Want::Running && container.has_disk())
    }

    /// A container that runs, by a number.
    pub fn running(&self, pick: u64) -> Option<usize> {
        let wanted = |container: &&Container| container.want == Want::Running && container.id.is_some();
        let all: Vec<_> = self.containers.iter().enumerate().filter(|(_, c)| wanted(c)).map(|(at, _)| at).collect();
        let at = usize::try_from(pick).unwrap_or_default().checked_rem(all.len())?;
        all.get(at).copied()
    }

    fn uid(&self) -> &str {
        self.config.metadata.as_ref().map_or("", |metadata| &metadata.uid)
    }

    /// Its id, which was lost, or none if there is no such pod. One that did not come up is told of, too.
    async fn find(&mut self, client: &Client) -> Result<()> {
        if self.id.is_some() || !self.asked {
            return Ok(());
        }
        let uid = self.uid().to_owned();
        let listed = client.pods().await?.into_iter();
        let ours: Vec<_> = listed.filter(|pod| pod.metadata.as_ref().is_some_and(|m| m.uid == uid)).collect();
        ensure!(ours.len() < 2, "the pod {uid} is there twice: {ours:?}");
        match ours.first() {
            Some(pod) if pod.state() != cri::PodSandboxState::SandboxReady && self.wanted => {
                client.remove_pod(&pod.id).await.context("removal of a pod that did not start")?;
                self.asked = false;
            }
            Some(pod) => self.id = Some(pod.id.clone()),
            None => self.asked = false,
        }
        Ok(())
    }

    /// Brings it to what is wanted, a step after the other.
    pub async fn drive(&mut self, client: &Client) -> Result<()> {
        self.find(client).await?;
        if !self.wanted {
            if let Some(id) = &self.id {
                client.remove_pod(id).await.context("StopPodSandbox and RemovePodSandbox")?;
                self.asked = false;
            }
            return Ok(());
        }
        if self.id.is_none() {
            self.asked = true;
            self.id = Some(client.run_pod_as(self.config.clone()).await.context("RunPodSandbox")?);
        }
        let Some(id) = &self.id else { bail!("no id") };
        for container in &mut self.containers {
            container.drive(client, id).await?;
        }
        Ok(())
    }

    /// What has been done and is no more: whether it is gone, and its logs are as they have to be.
    pub fn settle(&mut self) -> Result<bool> {
        if self.wanted {
            for container in self.containers.iter().filter(|container| container.want == Want::Gone) {
                container.said().with_context(|| format!("log of the removed container {}", container.name()))?;
                ensure!(container.starts() < 2, "container {} was started twice", container.name());
            }
            self.containers.retain(|container| container.want != Want::Gone);
            return Ok(false);
        }
        for container in &self.containers {
            container.said().with_context(|| format!("log of {}, of a pod that is gone", container.name()))?;
        }
        Ok(true)
    }

    /// What is wrong with it.
    pub async fn broken(&mut self, client: &Client) -> Vec<String> {
        let Some(id) = self.id.clone() else { return vec![format!("pod {} has no id", self.uid())] };
        let mut broken = Vec::new();
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: true };
        match client.runtime.clone().pod_sandbox_status(request).await {
            Ok(answer) => {
                let answer = answer.into_inner();
                let info = answer.info.get("info").cloned().unwrap_or_default();
                if answer.status.is_none_or(|status| status.state() != cri::PodSandboxState::SandboxReady) {
                    broken.push(format!("pod {id} is not ready: {info}"));
                } else if !info.contains("\"notAdopted\":null") {
                    broken.push(format!("pod {id} is not taken over: {info}"));
                }
            }
            Err(error) => broken.push(format!("status of pod {id}: {error}")),
        }
        for container in &mut self.containers {
            broken.extend(container.broken(client).await);
        }
        if let Some(at) = self.running(0)
            && let Some(container) = self.containers.get(at)
            && let Some(id) = &container.id
            && broken.is_empty()
        {
            let script = if container.has_disk() { "wc -c </dev/xvda" } else { "echo 1048576" };
            match client.exec(id, &["sh", "-c", script]).await {
                Ok(answer) if answer.stdout == b"1048576\n" => {}
                answer => broken.push(format!("exec in {id}: {answer:?}")),
            }
        }
        broken
    }
}
