//! CreateContainer and StartContainer of a present image in a running pod, from the first call to
//! the second's answer, against `runc run` on the host. Both run the same program from a root
//! file system that lies there ready.

use std::time::Instant;

use anyhow::Result;
use nacelle_tests::client::Client;

use crate::report::Report;
use crate::runc::Runc;

/// Alternates both, after one round each that does not count.
pub async fn run(rounds: usize) -> Result<Report> {
    let logs = tempfile::tempdir()?;
    let client = Client::node().await;
    client.pull("busybox").await?;
    let pod = client.run_pod(logs.path()).await?;
    let mut runc = Runc::new()?;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let begun = Instant::now();
        let container = client.create(&pod, "busybox", &["sleep", "100000"]).await?;
        client.start(&container).await?;
        let a = begun.elapsed().as_secs_f64() * 1e3;
        client.remove(&container).await?;
        let begun = Instant::now();
        runc.start("peer")?;
        let b = begun.elapsed().as_secs_f64() * 1e3;
        runc.remove("peer")?;
        if round > 0 {
            ours.push(a);
            peer.push(b);
        }
    }
    client.remove_pod(&pod).await?;
    Ok(Report { name: "container".into(), unit: "ms".into(), ours, peer, peer_name: "runc run".into() })
}
