//! RunPodSandbox, from the call to its answer, against the start of QEMU's microvm.

use std::time::Instant;

use anyhow::Result;
use nacelle_tests::daemon::Daemon;

use crate::Setting;
use crate::boot::Guest;
use crate::report::Report;

/// Alternates both, after one round each that does not count.
pub async fn run(setting: &Setting) -> Result<Report> {
    let logs = tempfile::tempdir()?;
    let daemon = Daemon::start(&format!(
        "guest.kernel = {:?}\nguest.initramfs = {:?}",
        setting.kernel.display().to_string(),
        setting.initramfs.display().to_string()
    ))
    .await?;
    let client = daemon.client().await;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for round in 0..=setting.rounds {
        let begun = Instant::now();
        let pod = client.run_pod(logs.path()).await?;
        let a = begun.elapsed().as_secs_f64() * 1e3;
        client.remove_pod(&pod).await?;
        let b = Guest::qemu(setting)?.ready_after;
        if round > 0 {
            ours.push(a);
            peer.push(b);
        }
    }
    Ok(Report { name: "start".into(), unit: "ms".into(), ours, peer, peer_name: "QEMU microvm".into() })
}
