//! Container logs: the CRI's format, complete.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, limit, log_lines};
use nacelle_tests::daemon::Daemon;
use tonic::Code;

#[tokio::test]
async fn both_streams_are_told_apart_and_partial_lines_marked() {
    let client = Client::node().await;
    let script = "echo one; echo two >&2; printf three";
    let (mut lines, code) = client.run_once("busybox", &["sh", "-c", script]).await.unwrap();
    lines.sort();
    let line = |stream: &str, content: &str| (stream.to_owned(), content.to_owned());
    assert_eq!(lines, [line("stderr", "two"), line("stdout", "one"), line("stdout", "three")]);
    assert_eq!(code, 0);
}

#[tokio::test]
async fn no_line_is_lost_or_repeated_at_exit() {
    let client = Client::node().await;
    let (lines, _) = client.run_once("busybox", &["seq", "1", "200000"]).await.unwrap();
    assert_eq!(lines.len(), 200_000);
    for (index, (stream, content)) in lines.iter().enumerate() {
        assert_eq!((stream.as_str(), content.parse().ok()), ("stdout", Some(index + 1)));
    }
}

#[tokio::test]
async fn a_long_line_is_cut_and_its_pieces_join_to_the_whole() {
    let client = Client::node().await;
    let script = "head -c 100000 /dev/zero | tr '\\0' x; echo; echo end";
    let (lines, _) = client.run_once("busybox", &["sh", "-c", script]).await.unwrap();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0].1, "x".repeat(100_000));
}

#[tokio::test]
async fn the_log_exists_when_start_returns_and_follows_the_container() {
    let client = Client::node().await;
    let logs = tempfile::tempdir().unwrap();
    client.pull("busybox").await.unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let id = client.create(&pod, "busybox", &["sh", "-c", "echo first; sleep 1000"]).await.unwrap();
    client.start(&id).await.unwrap();
    let path = client.status(&id).await.unwrap().log_path;
    assert!(Path::new(&path).exists(), "{path}");
    let deadline = tokio::time::Instant::now() + limit(20);
    while log_lines(&path).unwrap().is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "nothing in the log of a running container");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    client.remove_pod(&pod).await.unwrap();
    assert!(Path::new(&path).exists(), "logs belong to the kubelet");
}

/// A command that writes `count` numbered lines of 200 bytes each and a bit.
fn numbered(count: usize) -> String {
    format!("awk 'BEGIN {{ for (i = 1; i <= {count}; i++) printf \"%d %0200d\\n\", i, 0 }}'")
}

/// Waits until a log has this many bytes.
async fn grown(path: &Path, bytes: u64) {
    let deadline = tokio::time::Instant::now() + limit(60);
    while std::fs::metadata(path).map_or(0, |log| log.len()) < bytes {
        assert!(tokio::time::Instant::now() < deadline, "{} does not grow", path.display());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Asserts that the logs, one after the other, hold numbered lines, each once; returns how
/// many.
fn count_whole(logs: &[PathBuf]) -> usize {
    let mut count = 0;
    for log in logs {
        for (_, line) in log_lines(log).unwrap() {
            count += 1;
            let number: usize = line.split(' ').next().unwrap().parse().unwrap();
            assert_eq!(number, count, "in {}", log.display());
        }
    }
    count
}

async fn reopen(client: &Client, id: &str) -> Result<(), tonic::Status> {
    let request = cri::ReopenContainerLogRequest { container_id: id.into() };
    client.runtime.clone().reopen_container_log(request).await.map(drop)
}

/// As the kubelet does it: rename, then ask.
async fn rotate(client: &Client, id: &str, log: &Path, logs: &mut Vec<PathBuf>) {
    let rotated = log.with_extension(format!("log.{}", logs.len()));
    std::fs::rename(log, &rotated).unwrap();
    reopen(client, id).await.unwrap();
    assert!(log.exists(), "the new log is there when the call returns");
    logs.push(rotated);
}

#[tokio::test]
async fn a_log_that_is_rotated_while_it_grows_loses_and_repeats_nothing() {
    // On hardware: NACELLE_TEST_LOG_MIB=200.
    let mib: usize = std::env::var("NACELLE_TEST_LOG_MIB").map_or(6, |mib| mib.parse().unwrap());
    let count = (mib << 20) / 208;
    let client = Client::node().await;
    let directory = tempfile::tempdir().unwrap();
    client.pull("busybox").await.unwrap();
    let pod = client.run_pod(directory.path()).await.unwrap();
    let id = client.create(&pod, "busybox", &["sh", "-c", &numbered(count)]).await.unwrap();
    assert_eq!(reopen(&client, &id).await.unwrap_err().code(), Code::FailedPrecondition);
    client.start(&id).await.unwrap();
    let log = PathBuf::from(client.status(&id).await.unwrap().log_path);
    let mut logs = Vec::new();
    for _ in 0..4 {
        grown(&log, (mib as u64) << 17).await;
        rotate(&client, &id, &log, &mut logs).await;
    }
    reopen(&client, &id).await.expect("nothing was renamed, so nothing is to be done");
    let deadline = tokio::time::Instant::now() + limit(60 + mib as u64);
    while client.status(&id).await.unwrap().state() != cri::ContainerState::ContainerExited {
        assert!(tokio::time::Instant::now() < deadline, "it does not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    logs.push(log);
    assert_eq!(count_whole(&logs), count);
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_daemon_killed_around_a_rotation_loses_and_repeats_nothing() {
    // Until it is told to end.
    let script = "i=0; while [ ! -e /tmp/end ]; do
        awk -v i=$i 'BEGIN { for (j = 1; j <= 200; j++) printf \"%d %0200d\\n\", i + j, 0 }'
        i=$((i + 200)); usleep 50000; done; echo $((i + 1)) the last";
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let pod = client.run_pod(directory.path()).await.unwrap();
    let id = client.create(&pod, "busybox", &["sh", "-c", script]).await.unwrap();
    client.start(&id).await.unwrap();
    let log = PathBuf::from(client.status(&id).await.unwrap().log_path);
    let mut logs = Vec::new();
    grown(&log, 100_000).await;
    rotate(&client, &id, &log, &mut logs).await;
    grown(&log, 100_000).await;
    daemon.kill();
    daemon.restart().await.unwrap();
    // Killed between the rename and the call that follows it.
    grown(&log, 200_000).await;
    let rotated = log.with_extension("log.second");
    std::fs::rename(&log, &rotated).unwrap();
    daemon.kill();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    reopen(&client, &id).await.unwrap();
    logs.push(rotated);
    grown(&log, 100_000).await;
    daemon.kill();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    grown(&log, 200_000).await;
    client.exec(&id, &["touch", "/tmp/end"]).await.unwrap();
    assert_eq!(client.wait_exit(&id).await.unwrap().exit_code, 0);
    assert_eq!(log_lines(&log).unwrap().last().unwrap().1.split_once(' ').unwrap().1, "the last");
    logs.push(log);
    assert!(count_whole(&logs) > 1000);
    client.remove_pod(&pod).await.unwrap();
}
