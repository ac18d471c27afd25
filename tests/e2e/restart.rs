//! The daemon ends at any moment: pods live on, nothing is lost, nothing is left.

use std::time::Duration;

use nacelle_proto::runtime::v1 as cri;

use nacelle_tests::client::{limit, log_lines};
use nacelle_tests::daemon::Daemon;

#[tokio::test]
async fn a_killed_daemon_takes_its_pods_up_again_with_every_line_of_their_logs() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let script =
        "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo line $i; [ $((i % 100)) -ne 0 ] || usleep 20000; done; exit 5";
    let talker = client.create(&pod, "busybox", &["sh", "-c", script]).await.unwrap();
    let sleeper = client.create(&pod, "busybox", &["sleep", "1000"]).await.unwrap();
    let idle = client.create(&pod, "busybox", &["true"]).await.unwrap();
    client.start(&talker).await.unwrap();
    client.start(&sleeper).await.unwrap();
    let log = client.status(&talker).await.unwrap().log_path;
    let deadline = tokio::time::Instant::now() + limit(30);
    while log_lines(&log).unwrap().len() < 200 {
        assert!(tokio::time::Instant::now() < deadline, "no output");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    daemon.kill();
    daemon.restart().await.unwrap();

    let client = daemon.client().await;
    assert_eq!(client.pod_status(&pod).await.unwrap().state(), cri::PodSandboxState::SandboxReady);
    assert_eq!(client.status(&sleeper).await.unwrap().state(), cri::ContainerState::ContainerRunning);
    assert_eq!(client.exec(&sleeper, &["echo", "alive"]).await.unwrap().stdout, b"alive\n");
    client.start(&idle).await.expect("a container that was only created starts");
    assert_eq!(client.wait_exit(&idle).await.unwrap().exit_code, 0);
    assert_eq!(client.wait_exit(&talker).await.unwrap().exit_code, 5);
    let lines: Vec<_> = log_lines(&log).unwrap().into_iter().map(|line| line.1).collect();
    let expected: Vec<_> = (1..=3000).map(|n| format!("line {n}")).collect();
    assert!(
        lines == expected,
        "{} lines, first difference at {:?}",
        lines.len(),
        lines.iter().zip(&expected).position(|(a, b)| a != b)
    );
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_daemon_that_ends_in_good_order_leaves_its_pods_running() {
    let mut daemon = Daemon::start("").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = daemon.client().await.run_pod(logs.path()).await.unwrap();
    daemon.terminate().unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert_eq!(client.pod_status(&pod).await.unwrap().state(), cri::PodSandboxState::SandboxReady);
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn what_ended_without_a_daemon_is_told_afterwards() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let id = client.create(&pod, "busybox", &["sleep", "1000"]).await.unwrap();
    client.start(&id).await.unwrap();
    let vmm = rustix::process::Pid::from_raw(client.vmm_pid(&pod).await.unwrap()).unwrap();
    daemon.kill();
    rustix::process::kill_process(vmm, rustix::process::Signal::KILL).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert_eq!(client.pod_status(&pod).await.unwrap().state(), cri::PodSandboxState::SandboxNotready);
    let status = client.status(&id).await.unwrap();
    assert_eq!((status.state(), status.exit_code), (cri::ContainerState::ContainerExited, 137));
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_daemon_killed_at_any_moment_of_a_pods_start_leaves_nothing_behind() {
    let mut daemon = Daemon::start("").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    for round in 0..6_u32 {
        let client = daemon.client().await;
        let call = client.run_pod(logs.path());
        let moment = limit(1) / 60 * round;
        let answer = tokio::time::timeout(moment, call).await;
        daemon.kill();
        daemon.restart().await.unwrap();
        let client = daemon.client().await;
        for pod in client.pods().await.unwrap() {
            // Ready before it was killed: then it is a pod like any other.
            client.remove_pod(&pod.id).await.unwrap();
        }
        assert_eq!(daemon.leftovers(), [""; 0], "killed after {moment:?}, answer {answer:?}");
    }
}
