//! Containers: start, end, exec, and how each is told.

use nacelle_proto::runtime::v1 as cri;
use tempfile::TempDir;
use tonic::Code;

use nacelle_tests::client::{Client, container_config, image};

/// A pod with busybox pulled, and where its logs are.
async fn pod() -> (Client, String, TempDir) {
    let client = Client::node().await;
    let logs = tempfile::tempdir().unwrap();
    client.pull("busybox").await.unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    (client, pod, logs)
}

#[tokio::test]
async fn a_container_goes_through_its_states() {
    let (client, pod, _logs) = pod().await;
    let mut config = container_config("busybox", &["sh", "-c", "exit 7"]);
    config.labels.insert("tier".into(), "back".into());
    let id = client.create_as(&pod, config.clone()).await.unwrap();
    let created = client.status(&id).await.unwrap();
    assert_eq!(created.state(), cri::ContainerState::ContainerCreated);
    assert!(created.created_at > 0 && created.started_at == 0 && created.finished_at == 0);
    // What the kubelet shows as imageID: where the image can be had again.
    let pulled = client.pull("busybox").await.unwrap();
    assert!(created.image_ref.starts_with(&format!("{}@sha256:", image("busybox"))), "{}", created.image_ref);
    assert_eq!((created.image_id, created.image.unwrap().image), (pulled.clone(), image("busybox")));
    // And as a kubelet makes it.
    let mut by_id = container_config("busybox", &["true"]);
    by_id.image =
        Some(cri::ImageSpec { image: pulled, user_specified_image: "busybox:x".into(), ..Default::default() });
    let by_id = client.create_as(&pod, by_id).await.unwrap();
    let shown = client.status(&by_id).await.unwrap();
    assert_eq!((shown.image.unwrap().image, shown.image_ref), ("busybox:x".into(), created.image_ref));
    client.remove(&by_id).await.unwrap();
    let error = client.create_as(&pod, config).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");

    client.start(&id).await.unwrap();
    let ended = client.wait_exit(&id).await.unwrap();
    assert_eq!((ended.exit_code, ended.reason.as_str()), (7, "Error"));
    assert!(ended.started_at >= ended.created_at && ended.finished_at >= ended.started_at);
    let error = client.start(&id).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");

    let filter = cri::ContainerFilter {
        pod_sandbox_id: pod.clone(),
        state: Some(cri::ContainerStateValue { state: cri::ContainerState::ContainerExited.into() }),
        label_selector: [("tier".to_owned(), "back".to_owned())].into(),
        ..Default::default()
    };
    let request = cri::ListContainersRequest { filter: Some(filter) };
    let listed = client.runtime.clone().list_containers(request).await.unwrap().into_inner().containers;
    assert_eq!(listed.iter().map(|c| c.id.as_str()).collect::<Vec<_>>(), [id.as_str()]);

    client.remove(&id).await.unwrap();
    client.remove(&id).await.expect("removing again is no error");
    assert_eq!(client.status(&id).await.unwrap_err().code(), Code::NotFound);
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_command_that_is_not_in_the_image_fails_at_start_with_its_path() {
    let (client, pod, _logs) = pod().await;
    let id = client.create(&pod, "busybox", &["/no/such/program"]).await.expect("create does not look at it");
    let error = client.start(&id).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("/no/such/program"), "{}", error.message());
    let status = client.status(&id).await.unwrap();
    assert_eq!(status.state(), cri::ContainerState::ContainerExited);
    assert_ne!(status.exit_code, 0);
    // The pod is none the worse.
    let id = client.create(&pod, "busybox", &["true"]).await.unwrap();
    client.start(&id).await.unwrap();
    assert_eq!(client.wait_exit(&id).await.unwrap().exit_code, 0);
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn an_image_that_was_not_pulled_is_not_found() {
    let (client, pod, _logs) = pod().await;
    let mut config = container_config("busybox", &["true"]);
    config.image.as_mut().unwrap().image = image("never-pulled");
    let error = client.create_as(&pod, config).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    assert!(error.message().contains("never-pulled"), "{}", error.message());
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn stop_asks_first_and_kills_after_the_grace_period() {
    let (client, pod, _logs) = pod().await;
    let polite = ["sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 1 & wait $!; done"];
    let deaf = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"];
    for (command, grace, code) in [(&polite[..], 60, 3), (&deaf[..], 1, 137), (&deaf[..], 0, 137)] {
        let id = client.create(&pod, "busybox", command).await.unwrap();
        client.start(&id).await.unwrap();
        let log = client.status(&id).await.unwrap().log_path;
        while nacelle_tests::client::log_lines(&log).unwrap().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        client.stop(&id, grace).await.unwrap();
        let status = client.status(&id).await.unwrap();
        assert_eq!((status.state(), status.exit_code), (cri::ContainerState::ContainerExited, code), "grace {grace}");
        client.stop(&id, grace).await.expect("stopping again is no error");
    }
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn exec_returns_both_streams_and_the_exit_code() {
    let (client, pod, _logs) = pod().await;
    let id = client.create(&pod, "busybox", &["sleep", "1000"]).await.unwrap();
    let error = client.exec(&id, &["true"]).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    client.start(&id).await.unwrap();
    let answer = client.exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 42"]).await.unwrap();
    assert_eq!((&answer.stdout[..], &answer.stderr[..], answer.exit_code), (&b"out\n"[..], &b"err\n"[..], 42));
    let big = client.exec(&id, &["sh", "-c", "seq 1 100000"]).await.unwrap();
    let expected: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(big.stdout == expected.as_bytes(), "{} bytes instead of {}", big.stdout.len(), expected.len());
    let error = client.exec(&id, &["/no/such/program"]).await.unwrap_err();
    assert!(error.message().contains("/no/such/program"), "{}", error.message());
    // A client takes 16 KiB of headers, in which a status comes.
    let error = client.exec(&id, &[&format!("/{}", "x".repeat(16 << 10))]).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("/xxx") && error.message().contains("bytes left out"), "{}", error.message());
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn output_that_does_not_fit_into_an_answer_is_cut_and_said_to_be() {
    let (client, pod, _logs) = pod().await;
    let id = client.create(&pod, "busybox", &["sleep", "1000"]).await.unwrap();
    client.start(&id).await.unwrap();
    let answer = client.exec(&id, &["sh", "-c", "head -c 17000000 /dev/zero; echo error >&2; exit 3"]).await.unwrap();
    assert_eq!(answer.exit_code, 3);
    // What the kubelet takes in one message, with what is around the two.
    assert!(answer.stdout.len() + answer.stderr.len() + 32 <= 16 << 20, "{} bytes", answer.stdout.len());
    let said = String::from_utf8_lossy(&answer.stderr);
    let left = 17_000_000 - answer.stdout.len();
    assert!(said.starts_with("error\n") && said.contains(&format!("{left} bytes of output left out")), "{said}");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn an_exec_that_takes_too_long_is_killed_in_the_guest() {
    let (client, pod, _logs) = pod().await;
    let id = client.create(&pod, "busybox", &["sleep", "1000"]).await.unwrap();
    client.start(&id).await.unwrap();
    let error = client.exec_for(&id, &["sleep", "4711"], 2).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    assert!(error.message().contains("timed out"), "{error}");
    let deadline = tokio::time::Instant::now() + nacelle_tests::client::limit(20);
    loop {
        let processes = client.exec(&id, &["ps"]).await.unwrap().stdout;
        if !String::from_utf8_lossy(&processes).contains("sleep 4711") {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "the command still runs");
    }
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn containers_of_a_pod_do_not_see_each_others_processes_or_files() {
    let (client, pod, _logs) = pod().await;
    let first = client.create(&pod, "busybox", &["sleep", "1001"]).await.unwrap();
    let second = client.create(&pod, "busybox", &["sleep", "1002"]).await.unwrap();
    client.start(&first).await.unwrap();
    client.start(&second).await.unwrap();
    client.exec(&first, &["sh", "-c", "echo secret > /tmp/file"]).await.unwrap();
    assert_ne!(client.exec(&second, &["cat", "/tmp/file"]).await.unwrap().exit_code, 0);
    let processes = client.exec(&second, &["ps"]).await.unwrap().stdout;
    assert!(!String::from_utf8_lossy(&processes).contains("1001"));
    client.remove(&first).await.unwrap();
    assert_eq!(client.exec(&second, &["true"]).await.unwrap().exit_code, 0);
    client.remove_pod(&pod).await.unwrap();
}
