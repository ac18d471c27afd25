//! From the start of a daemon to its first answer: with twenty pods that run, one of them silent, against a daemon without
//! pods. The pods are there in both cases: what they cost the host by themselves is not the daemon's.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::limit;
use nacelle_tests::daemon::Daemon;
use rustix::process::{Pid, Signal, kill_process};

use crate::report::Report;

/// How many.
const PODS: usize = 20;
/// How long guests whose daemon was killed have for noticing it, before the factor of an emulated host: with one processor
/// there, they would be measured, too.
const QUIET: Duration = Duration::from_millis(200);

/// Alternates both, after one round that does not count.
pub async fn run(rounds: usize) -> Result<Report> {
    let logs = tempfile::tempdir()?;
    let (mut full, mut empty) = (Daemon::start("").await?, Daemon::start("").await?);
    let client = full.client().await;
    // Both have the same images.
    client.pull("busybox").await?;
    empty.client().await.pull("busybox").await?;
    let mut pods = Vec::new();
    for number in 0..PODS {
        let pod = client.run_pod(&logs.path().join(number.to_string())).await?;
        let container = client.create(&pod, "busybox", &["sleep", "100000"]).await?;
        client.start(&container).await?;
        pods.push(pod);
    }
    let silent = pods.pop().context("a pod")?;
    let vmm = Pid::from_raw(client.vmm_pid(&silent).await?).context("a process id")?;
    kill_process(vmm, Signal::STOP)?;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let a = first_answer(&mut full).await?;
        settled(&full, &pods).await?;
        let b = first_answer(&mut empty).await?;
        if round > 0 {
            ours.push(a);
            peer.push(b);
        }
    }
    kill_process(vmm, Signal::CONT)?;
    Ok(Report { name: "restart".into(), unit: "ms".into(), ours, peer, peer_name: "without pods".into() })
}

/// Kills a daemon and starts it again; how long it took to answer.
async fn first_answer(daemon: &mut Daemon) -> Result<f64> {
    daemon.kill();
    tokio::time::sleep(QUIET.mul_f64(limit(1).as_secs_f64())).await;
    let begun = Instant::now();
    daemon.launch(Path::new("nacelle"), &[])?;
    while !daemon.answers().await {
        if begun.elapsed() > limit(60) {
            bail!("the daemon does not answer: {}", daemon.log());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

/// Waits until all pods are taken over but the silent one, which is listed with the others.
async fn settled(daemon: &Daemon, pods: &[String]) -> Result<()> {
    let client = daemon.client().await;
    let listed = client.pods().await?;
    if listed.len() != PODS || listed.iter().any(|pod| pod.state() != cri::PodSandboxState::SandboxReady) {
        bail!("not all pods are ready after the restart: {listed:?}");
    }
    let begun = Instant::now();
    for pod in pods {
        loop {
            let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: true };
            let answer = client.runtime.clone().pod_sandbox_status(request).await?.into_inner();
            if answer.info.get("info").is_some_and(|info| info.contains("\"notAdopted\":null")) {
                break;
            }
            if begun.elapsed() > limit(60) {
                bail!("pod {pod} is not taken over: {}", daemon.log());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}
