//! Container logs: the CRI's format, complete.

use nacelle_tests::client::{Client, log_lines};

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
    assert!(std::path::Path::new(&path).exists(), "{path}");
    let deadline = tokio::time::Instant::now() + nacelle_tests::client::limit(20);
    while log_lines(&path).unwrap().is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "nothing in the log of a running container");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    client.remove_pod(&pod).await.unwrap();
    assert!(std::path::Path::new(&path).exists(), "logs belong to the kubelet");
}
