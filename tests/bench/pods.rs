//! Twenty pods at once, from the first call to the last answer, for each pod, against one pod
//! that starts alone: a ratio above 1 means that pods are in each other's way.

use std::time::Instant;

use anyhow::Result;
use nacelle_tests::client::Client;
use tokio::task::JoinSet;

use crate::report::Report;

/// How many.
const PODS: u32 = 20;

/// Alternates both, after one pod that does not count.
pub async fn run(rounds: usize) -> Result<Report> {
    let logs = tempfile::tempdir()?;
    let client = Client::node().await;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    let pod = client.run_pod(logs.path()).await?;
    client.remove_pod(&pod).await?;
    for _ in 0..rounds {
        let begun = Instant::now();
        let mut starts = JoinSet::new();
        for number in 0..PODS {
            let (client, logs) = (client.clone(), logs.path().join(number.to_string()));
            starts.spawn(async move { client.run_pod(&logs).await });
        }
        let mut pods = Vec::new();
        while let Some(pod) = starts.join_next().await {
            pods.push(pod??);
        }
        ours.push(begun.elapsed().as_secs_f64() * 1e3 / f64::from(PODS));
        for pod in pods {
            client.remove_pod(&pod).await?;
        }
        let begun = Instant::now();
        let pod = client.run_pod(logs.path()).await?;
        peer.push(begun.elapsed().as_secs_f64() * 1e3);
        client.remove_pod(&pod).await?;
    }
    Ok(Report { name: "pods".into(), unit: "ms".into(), ours, peer, peer_name: "one pod alone".into() })
}
