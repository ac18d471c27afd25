//! ExecSync of `true` in a pod, from the call to its answer, against `runc exec` of the same
//! in a container on the host. Both stand, with a sleeping process, before it begins.

use std::time::Instant;

use anyhow::{Result, bail};
use nacelle_tests::client::Client;

use crate::report::Report;
use crate::runc::Runc;

/// Alternates both, after two rounds each that do not count.
pub async fn run(rounds: usize) -> Result<Report> {
    let logs = tempfile::tempdir()?;
    let client = Client::node().await;
    client.pull("busybox").await?;
    let pod = client.run_pod(logs.path()).await?;
    let container = client.create(&pod, "busybox", &["sleep", "100000"]).await?;
    client.start(&container).await?;
    let mut runc = Runc::new()?;
    runc.start("peer")?;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for round in 0..rounds + 2 {
        let begun = Instant::now();
        let answer = client.exec(&container, &["true"]).await?;
        let a = begun.elapsed().as_secs_f64() * 1e3;
        if answer.exit_code != 0 {
            bail!("true failed in the pod: {answer:?}");
        }
        let begun = Instant::now();
        runc.exec("peer", &["true"])?;
        let b = begun.elapsed().as_secs_f64() * 1e3;
        if round >= 2 {
            ours.push(a);
            peer.push(b);
        }
    }
    client.remove_pod(&pod).await?;
    Ok(Report { name: "exec".into(), unit: "ms".into(), ours, peer, peer_name: "runc exec".into() })
}
