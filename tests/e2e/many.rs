//! Many pods at once.

use nacelle_tests::client::Client;
use nacelle_tests::daemon::Daemon;

#[tokio::test]
async fn twenty_pods_at_once_start_and_stop_with_nothing_lost_and_nothing_left() {
    let daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..20 {
        let (client, logs) = (client.clone(), logs.path().join(number.to_string()));
        tasks.spawn(async move { (number, one(&client, &logs, number).await) });
    }
    while let Some(done) = tasks.join_next().await {
        let (number, said) = done.unwrap();
        assert_eq!(said.unwrap(), format!("pod {number}"));
    }
    assert_eq!(client.pods().await.unwrap(), []);
    assert_eq!(daemon.leftovers(), [""; 0]);
}

async fn one(client: &Client, logs: &std::path::Path, number: u32) -> anyhow::Result<String> {
    let pod = client.run_pod(logs).await?;
    let command = format!("echo pod {number}");
    let id = client.create(&pod, "busybox", &["sh", "-c", &command]).await?;
    client.start(&id).await?;
    let status = client.wait_exit(&id).await?;
    let lines = nacelle_tests::client::log_lines(status.log_path)?;
    client.remove_pod(&pod).await?;
    Ok(lines.into_iter().map(|line| line.1).collect())
}
