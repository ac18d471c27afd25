//! A CRI client that says what it does in a line each.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use nacelle_proto::runtime::v1 as cri;
use nacelle_proto::runtime::v1::image_service_client::ImageServiceClient;
use nacelle_proto::runtime::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// A time limit for a test, multiplied by NACELLE_TIMEOUT_SCALE.
pub fn limit(seconds: u64) -> Duration {
    let scale = std::env::var("NACELLE_TIMEOUT_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1.0);
    Duration::from_secs(seconds).mul_f64(scale)
}

/// The registry's name for a test image.
pub fn image(name: &str) -> String {
    let registry = std::env::var("NACELLE_TEST_REGISTRY").expect("NACELLE_TEST_REGISTRY is set by hack/node");
    format!("{registry}/{name}")
}

/// The CRI of one daemon.
#[derive(Clone)]
pub struct Client {
    /// The RuntimeService.
    pub runtime: RuntimeServiceClient<Channel>,
    /// The ImageService.
    pub images: ImageServiceClient<Channel>,
}

impl Client {
    /// The node's daemon.
    pub async fn node() -> Self {
        let endpoint = std::env::var("CONTAINER_RUNTIME_ENDPOINT").expect("run with hack/node");
        Self::connect(Path::new(endpoint.strip_prefix("unix://").expect("a unix socket"))).await.expect("connect")
    }

    /// The daemon at a socket.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let socket = PathBuf::from(socket);
        let channel = Endpoint::from_static("http://node")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            images: ImageServiceClient::new(channel),
        })
    }

    /// Pulls a test image and returns its id.
    pub async fn pull(&self, name: &str) -> Result<String, tonic::Status> {
        let spec = cri::ImageSpec { image: image(name), ..Default::default() };
        let request = cri::PullImageRequest { image: Some(spec), ..Default::default() };
        self.images.clone().pull_image(request).await.map(|answer| answer.into_inner().image_ref)
    }

    /// Runs a pod with a name of its own and logs in `logs`.
    pub async fn run_pod(&self, logs: &Path) -> Result<String, tonic::Status> {
        self.run_pod_as(pod_config(logs)).await
    }

    /// Runs this pod.
    pub async fn run_pod_as(&self, config: cri::PodSandboxConfig) -> Result<String, tonic::Status> {
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: "kata".into() };
        self.runtime.clone().run_pod_sandbox(request).await.map(|answer| answer.into_inner().pod_sandbox_id)
    }

    /// Stops and removes a pod.
    pub async fn remove_pod(&self, id: &str) -> Result<(), tonic::Status> {
        let mut runtime = self.runtime.clone();
        runtime.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id.into() }).await?;
        runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id.into() }).await.map(drop)
    }

    /// Creates a container that runs `command`, from an image that was pulled.
    pub async fn create(&self, pod: &str, image: &str, command: &[&str]) -> Result<String, tonic::Status> {
        self.create_as(pod, container_config(image, command)).await
    }

    /// Creates this container.
    pub async fn create_as(&self, pod: &str, config: cri::ContainerConfig) -> Result<String, tonic::Status> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config),
            sandbox_config: Some(cri::PodSandboxConfig::default()),
        };
        self.runtime.clone().create_container(request).await.map(|answer| answer.into_inner().container_id)
    }

    /// Starts a container.
    pub async fn start(&self, id: &str) -> Result<(), tonic::Status> {
        self.runtime.clone().start_container(cri::StartContainerRequest { container_id: id.into() }).await.map(drop)
    }

    /// Stops a container with this many seconds of grace.
    pub async fn stop(&self, id: &str, timeout: i64) -> Result<(), tonic::Status> {
        let request = cri::StopContainerRequest { container_id: id.into(), timeout };
        self.runtime.clone().stop_container(request).await.map(drop)
    }

    /// Removes a container.
    pub async fn remove(&self, id: &str) -> Result<(), tonic::Status> {
        self.runtime.clone().remove_container(cri::RemoveContainerRequest { container_id: id.into() }).await.map(drop)
    }

    /// A container's state.
    pub async fn status(&self, id: &str) -> Result<cri::ContainerStatus, tonic::Status> {
        let request = cri::ContainerStatusRequest { container_id: id.into(), verbose: false };
        let answer = self.runtime.clone().container_status(request).await?.into_inner();
        answer.status.ok_or_else(|| tonic::Status::internal("no status in the answer"))
    }

    /// A pod's state.
    pub async fn pod_status(&self, id: &str) -> Result<cri::PodSandboxStatus, tonic::Status> {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: false };
        let answer = self.runtime.clone().pod_sandbox_status(request).await?.into_inner();
        answer.status.ok_or_else(|| tonic::Status::internal("no status in the answer"))
    }

    /// Process id of a pod's VMM, from the verbose status.
    pub async fn vmm_pid(&self, pod: &str) -> Result<i32> {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.into(), verbose: true };
        let answer = self.runtime.clone().pod_sandbox_status(request).await?.into_inner();
        let info = answer.info.get("info").context("verbose info")?;
        let pid = info.split("\"pid\":").nth(1).context("a pid")?;
        Ok(pid.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default().parse()?)
    }

    /// What a container uses.
    pub async fn stats(&self, id: &str) -> Result<cri::ContainerStats, tonic::Status> {
        let request = cri::ContainerStatsRequest { container_id: id.into() };
        let answer = self.runtime.clone().container_stats(request).await?.into_inner();
        answer.stats.ok_or_else(|| tonic::Status::internal("no stats in the answer"))
    }

    /// What a pod uses.
    pub async fn pod_stats(&self, id: &str) -> Result<cri::PodSandboxStats, tonic::Status> {
        let request = cri::PodSandboxStatsRequest { pod_sandbox_id: id.into() };
        let answer = self.runtime.clone().pod_sandbox_stats(request).await?.into_inner();
        answer.stats.ok_or_else(|| tonic::Status::internal("no stats in the answer"))
    }

    /// All pods' ids.
    pub async fn pods(&self) -> Result<Vec<cri::PodSandbox>, tonic::Status> {
        let request = cri::ListPodSandboxRequest { filter: None };
        self.runtime.clone().list_pod_sandbox(request).await.map(|answer| answer.into_inner().items)
    }

    /// Runs a command in a container.
    pub async fn exec(&self, id: &str, command: &[&str]) -> Result<cri::ExecSyncResponse, tonic::Status> {
        self.exec_for(id, command, 0).await
    }

    /// Runs a command in a container for so many seconds at most.
    pub async fn exec_for(
        &self,
        id: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<cri::ExecSyncResponse, tonic::Status> {
        let cmd = command.iter().map(ToString::to_string).collect();
        let request = cri::ExecSyncRequest { container_id: id.into(), cmd, timeout };
        self.runtime.clone().exec_sync(request).await.map(tonic::Response::into_inner)
    }

    /// Runs a shell's script in a container, which must succeed; what it said.
    pub async fn shell(&self, id: &str, script: &str) -> String {
        let answer = self.exec(id, &["sh", "-c", script]).await.expect("the call to work");
        let (stdout, stderr) = (String::from_utf8_lossy(&answer.stdout), String::from_utf8_lossy(&answer.stderr));
        assert_eq!(answer.exit_code, 0, "{script}: {stdout} {stderr}");
        stdout.trim().to_owned()
    }

    /// Waits until a container has ended.
    pub async fn wait_exit(&self, id: &str) -> Result<cri::ContainerStatus> {
        let deadline = tokio::time::Instant::now() + limit(60);
        loop {
            let status = self.status(id).await?;
            if status.state() == cri::ContainerState::ContainerExited {
                return Ok(status);
            }
            if tokio::time::Instant::now() > deadline {
                bail!("container {id} is still {:?}", status.state());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a pod is no longer ready.
    pub async fn wait_not_ready(&self, id: &str) -> Result<()> {
        let deadline = tokio::time::Instant::now() + limit(30);
        while self.pod_status(id).await?.state() == cri::PodSandboxState::SandboxReady {
            if tokio::time::Instant::now() > deadline {
                bail!("pod {id} is still ready");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Runs a command in a pod of its own and returns its log's lines (`stream`, `content`)
    /// and its exit code.
    pub async fn run_once(&self, image: &str, command: &[&str]) -> Result<(Vec<(String, String)>, i32)> {
        let logs = tempfile::tempdir()?;
        self.pull(image).await?;
        let pod = self.run_pod(logs.path()).await?;
        let container = self.create(&pod, image, command).await?;
        self.start(&container).await?;
        let status = self.wait_exit(&container).await?;
        let lines = log_lines(&status.log_path)?;
        self.remove_pod(&pod).await?;
        Ok((lines, status.exit_code))
    }
}

/// A number that no other caller gets.
fn unique() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A pod with a name of its own.
pub fn pod_config(logs: &Path) -> cri::PodSandboxConfig {
    let number = unique();
    let metadata = cri::PodSandboxMetadata {
        name: format!("pod-{number}"),
        uid: format!("uid-{}-{number}", std::process::id()),
        namespace: "default".into(),
        attempt: 0,
    };
    let namespaces =
        cri::NamespaceOption { pid: cri::NamespaceMode::Container.into(), ..cri::NamespaceOption::default() };
    let security = cri::LinuxSandboxSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
    cri::PodSandboxConfig {
        metadata: Some(metadata),
        log_directory: logs.to_string_lossy().into_owned(),
        linux: Some(cri::LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() }),
        ..Default::default()
    }
}

/// A container with a name of its own that runs `command`, or the image's own.
pub fn container_config(name: &str, command: &[&str]) -> cri::ContainerConfig {
    let number = unique();
    let namespaces =
        cri::NamespaceOption { pid: cri::NamespaceMode::Container.into(), ..cri::NamespaceOption::default() };
    let security = cri::LinuxContainerSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: format!("c-{number}"), attempt: 0 }),
        image: Some(cri::ImageSpec { image: image(name), ..Default::default() }),
        command: command.iter().map(ToString::to_string).collect(),
        log_path: format!("c-{number}/0.log"),
        linux: Some(cri::LinuxContainerConfig { security_context: Some(security), ..Default::default() }),
        ..Default::default()
    }
}

/// A log's lines: stream and content; partial lines are joined.
pub fn log_lines(path: impl AsRef<Path>) -> Result<Vec<(String, String)>> {
    let path = path.as_ref();
    let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let mut lines: Vec<(String, String)> = Vec::new();
    let mut open = false;
    for line in String::from_utf8_lossy(&text).lines() {
        let parts: Vec<_> = line.splitn(4, ' ').collect();
        let [time, stream, tag, content] = parts[..] else { bail!("bad log line {line:?}") };
        if time.len() != 30 || !time.ends_with('Z') {
            bail!("bad time in log line {line:?}");
        }
        match lines.last_mut() {
            Some((last, joined)) if open && last == stream => joined.push_str(content),
            _ => lines.push((stream.into(), content.into())),
        }
        open = tag == "P";
    }
    Ok(lines)
}
