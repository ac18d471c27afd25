//! Guests on a kernel without any of `guest-image/patches`: they save time, and nothing depends on them.

use std::path::Path;

use nacelle_tests::client::{Client, container_config, log_lines};
use nacelle_tests::daemon::Daemon;

#[tokio::test]
async fn a_pod_runs_on_a_kernel_without_our_patches() {
    let kernel = std::env::var("NACELLE_TEST_UNPATCHED")
        .expect("NACELLE_TEST_UNPATCHED names what guest-image/build unpatched makes, target/guest/vmlinux-unpatched");
    assert_ne!(std::fs::read(&kernel).unwrap(), std::fs::read("/usr/lib/nacelle/vmlinux").unwrap());
    let keys =
        format!("guest.kernel = {kernel:?}\nguest.template_directory = \"/run/unpatched-{}\"", std::process::id());
    let daemon = Daemon::start(&keys).await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    // The first is the template that all are cloned from.
    for _ in 0..2 {
        let pod = client.run_pod(logs.path()).await.unwrap();
        assert_eq!(written(&client, &pod).await, ["1"]);
        client.remove_pod(&pod).await.unwrap();
    }
    assert_eq!(daemon.leftovers(), [""; 0]);
    let _ = std::fs::remove_dir_all(Path::new("/run").join(format!("unpatched-{}", std::process::id())));
}

/// What a container writes that has used its disk and its processor.
async fn written(client: &Client, pod: &str) -> Vec<String> {
    let script = "dd if=/dev/zero of=/file bs=64k count=64 2>/dev/null && grep -c ^processor /proc/cpuinfo";
    let id = client.create_as(pod, container_config("busybox", &["sh", "-c", script])).await.unwrap();
    client.start(&id).await.unwrap();
    let status = client.wait_exit(&id).await.unwrap();
    log_lines(status.log_path).unwrap().into_iter().map(|line| line.1).collect()
}
