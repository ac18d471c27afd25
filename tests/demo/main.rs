//! The demo: one pod through the CRI, step by step, each result checked, each step timed.
//! Run by `hack/demo` on a node.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, log_lines};
use nacelle_tests::host;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let image = std::env::args().nth(1).unwrap_or_else(|| "busybox".into());
    let before = host::inventory();
    let mut demo = Demo { client: Client::node().await, image };
    demo.play().await?;
    let left: Vec<_> = host::inventory().into_iter().filter(|thing| !before.contains(thing)).collect();
    ensure!(left.is_empty(), "left behind: {left:#?}");
    println!("Nothing is left: no process, network namespace, tap, mount, cgroup or file.");
    Ok(())
}

struct Demo {
    client: Client,
    image: String,
}

/// Runs a step, prints what it was and how long it took.
async fn step<T>(what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let begun = Instant::now();
    let result = work.await.with_context(|| what.to_owned())?;
    println!("{:>8.1} ms  {what}", begun.elapsed().as_secs_f64() * 1e3);
    Ok(result)
}

impl Demo {
    async fn play(&mut self) -> Result<()> {
        let client = self.client.clone();
        let logs = tempfile::tempdir()?;
        let version = step("Version", async {
            Ok(client.runtime.clone().version(cri::VersionRequest::default()).await?.into_inner())
        })
        .await?;
        println!(
            "             {} {}, CRI {}",
            version.runtime_name, version.runtime_version, version.runtime_api_version
        );
        let id = step(&format!("PullImage {}", self.image), async { Ok(client.pull(&self.image).await?) }).await?;
        println!("             {id}");
        let pod = step("RunPodSandbox (handler kata)", async { Ok(client.run_pod(logs.path()).await?) }).await?;
        let container = step("CreateContainer", async {
            let script = "echo hello from $(uname -sr); echo and an error >&2; exec sleep 1000";
            Ok(client.create_as(&pod, container_config(&self.image, &["sh", "-c", script])).await?)
        })
        .await?;
        step("StartContainer", async { Ok(client.start(&container).await?) }).await?;
        let path = client.status(&container).await?.log_path;
        let lines = step("the container's log", async {
            let deadline = tokio::time::Instant::now() + nacelle_tests::client::limit(20);
            loop {
                let lines = log_lines(&path)?;
                if lines.len() >= 2 {
                    return Ok(lines);
                }
                ensure!(tokio::time::Instant::now() < deadline, "only {lines:?} in {path}");
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        })
        .await?;
        for (stream, line) in &lines {
            println!("             {stream}: {line}");
        }
        let answer = step("ExecSync uname -r", async { Ok(client.exec(&container, &["uname", "-r"]).await?) }).await?;
        let guest = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
        ensure!(answer.exit_code == 0 && !guest.is_empty(), "uname in the container: {answer:?}");
        let host = host::kernel_release();
        ensure!(guest != host, "the container runs on the host's kernel {host}");
        println!("             kernel of the container {guest}, of the host {host}");
        let status = step("ContainerStatus", async { Ok(client.status(&container).await?) }).await?;
        ensure!(status.state() == cri::ContainerState::ContainerRunning, "{status:?}");
        step("StopContainer", async { Ok(client.stop(&container, 0).await?) }).await?;
        let status = client.status(&container).await?;
        ensure!(status.state() == cri::ContainerState::ContainerExited && status.exit_code == 137, "{status:?}");
        step("RemoveContainer", async { Ok(client.remove(&container).await?) }).await?;
        let stop = cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() };
        step("StopPodSandbox", async { Ok(client.runtime.clone().stop_pod_sandbox(stop).await?) }).await?;
        ensure!(client.pod_status(&pod).await?.state() == cri::PodSandboxState::SandboxNotready, "still ready");
        let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.clone() };
        step("RemovePodSandbox", async { Ok(client.runtime.clone().remove_pod_sandbox(remove).await?) }).await?;
        if let Some(pod) = client.pods().await?.first() {
            bail!("pod {} is still listed", pod.id);
        }
        let left = host::leftovers(Path::new("/var/lib/nacelle"), Path::new("/run/nacelle"));
        ensure!(left.is_empty(), "left of the pod: {left:#?}");
        Ok(())
    }
}
