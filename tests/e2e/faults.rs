//! What breaks, and what is left of it.

use nacelle_proto::runtime::v1 as cri;
use rustix::process::{Pid, Signal, kill_process};

use nacelle_tests::client::{limit, pod_config};
use nacelle_tests::daemon::Daemon;
use nacelle_tests::host;

#[tokio::test]
async fn a_missing_or_damaged_kernel_is_named_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let damaged = directory.path().join("damaged");
    std::fs::write(&damaged, b"\x7fELF but no more").unwrap();
    let absent = directory.path().join("absent");
    for path in [&absent, &damaged] {
        for key in ["kernel", "initramfs"] {
            if key == "initramfs" && path == &damaged {
                continue; // The guest's kernel finds out: see the next test.
            }
            let daemon = Daemon::start(&format!("guest.{key} = {path:?}")).await.unwrap();
            let error = daemon.client().await.run_pod(directory.path()).await.unwrap_err();
            assert!(error.message().contains(&*path.to_string_lossy()), "{key}: {}", error.message());
            assert_eq!(daemon.leftovers(), [""; 0], "{key} {path:?}");
        }
    }
}

#[tokio::test]
async fn a_guest_that_dies_in_boot_is_reported_with_its_last_lines() {
    let directory = tempfile::tempdir().unwrap();
    let initramfs = directory.path().join("initramfs");
    // A whole archive with nothing in it: there is no agent to start.
    let fields = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 11, 0].map(|field| format!("{field:08x}"));
    std::fs::write(&initramfs, format!("070701{}TRAILER!!!\0\0\0\0", fields.concat())).unwrap();
    let daemon = Daemon::start(&format!("guest.initramfs = {initramfs:?}")).await.unwrap();
    let error = daemon.client().await.run_pod(directory.path()).await.unwrap_err();
    assert!(error.message().contains("panic"), "{}", error.message());
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_guest_that_is_never_ready_is_given_up() {
    // The agent is looked for under a name that is not there, and the kernel waits
    // forever instead of ending the machine.
    let daemon = Daemon::start("[guest]\nboot_seconds = 2\ncmdline = \"rdinit=/nothing panic=0\"").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let error = daemon.client().await.run_pod(logs.path()).await.unwrap_err();
    assert!(error.message().contains("not ready within"), "{}", error.message());
    assert!(error.message().contains("console"), "{}", error.message());
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_killed_vmm_ends_its_pod_in_words_and_nothing_else() {
    let daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let (pod, other) = (client.run_pod(logs.path()).await.unwrap(), client.run_pod(logs.path()).await.unwrap());
    let id = client.create(&pod, "busybox", &["sh", "-c", "echo before; sleep 1000"]).await.unwrap();
    client.start(&id).await.unwrap();
    let log = client.status(&id).await.unwrap().log_path;
    let deadline = tokio::time::Instant::now() + limit(20);
    while nacelle_tests::client::log_lines(&log).unwrap().is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "no output");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let pid = client.vmm_pid(&pod).await.unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    client.wait_not_ready(&pod).await.unwrap();
    let status = client.wait_exit(&id).await.unwrap();
    assert_eq!(status.exit_code, 137);
    assert!(status.message.contains("signal 9"), "{}", status.message);
    assert_eq!(client.pod_status(&other).await.unwrap().state(), cri::PodSandboxState::SandboxReady);
    client.remove_pod(&pod).await.unwrap();
    client.remove_pod(&other).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
    assert_eq!(host::cgroups(&pod), [""; 0]);
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_no_pod() {
    let daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let call = client.run_pod_as(pod_config(logs.path()));
    assert!(tokio::time::timeout(limit(1) / 20, call).await.is_err(), "the pod was faster than the client");
    let deadline = tokio::time::Instant::now() + limit(60);
    loop {
        // Twice in a row, for the pod may be between its record and its processes.
        if daemon.there().is_empty() && client.pods().await.unwrap().is_empty() {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{:?}", daemon.there());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}
