//! Calls that come at once, wrongly, or not to an end; guests that do not answer.

use std::time::Duration;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, limit, pod_config};
use nacelle_tests::daemon::Daemon;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;
use tonic::Code;

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// Waits until a container is shown in a state.
async fn wait_state(client: &Client, id: &str, state: cri::ContainerState) {
    let deadline = Instant::now() + limit(30);
    while client.status(id).await.unwrap().state() != state {
        assert!(Instant::now() < deadline, "{id} does not become {state:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What the verbose status says of a pod.
async fn info(client: &Client, pod: &str) -> String {
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.into(), verbose: true };
    let answer = client.runtime.clone().pod_sandbox_status(request).await.unwrap().into_inner();
    answer.info["info"].clone()
}

/// What happens next to a container, and how it is shown then.
async fn next_event(
    events: &mut tonic::Streaming<cri::ContainerEventResponse>,
    id: &str,
) -> (cri::ContainerEventType, cri::ContainerState) {
    let next = async {
        loop {
            let event = events.message().await.unwrap().expect("another event");
            if event.container_id == id {
                let shown = event.containers_statuses.iter().find(|status| status.id == id).unwrap();
                return (event.container_event_type(), shown.state());
            }
        }
    };
    tokio::time::timeout(limit(60), next).await.expect("it is told")
}

#[tokio::test]
async fn a_guest_that_stops_answering_costs_its_calls_and_nothing_else() {
    let daemon = Daemon::start("[guest]\ncall_seconds = 1\nunknown_seconds = 3").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let (stuck, other) = (client.run_pod(logs.path()).await.unwrap(), client.run_pod(logs.path()).await.unwrap());
    let id = client.create(&stuck, "busybox", &["sleep", "1000"]).await.unwrap();
    let fine = client.create(&other, "busybox", &["sleep", "1000"]).await.unwrap();
    client.start(&id).await.unwrap();
    client.start(&fine).await.unwrap();
    let vmm = client.vmm_pid(&stuck).await.unwrap();
    let mut runtime = client.runtime.clone();
    let mut events = runtime.get_container_events(cri::GetEventsRequest {}).await.unwrap().into_inner();
    assert!(info(&client, &stuck).await.contains("\"answers\":true"));
    signal(vmm, Signal::STOP);

    let call = tokio::spawn({
        let (client, id) = (client.clone(), id.clone());
        async move { client.exec(&id, &["true"]).await }
    });
    // The other pod does not wait for it.
    let begun = Instant::now();
    assert_eq!(client.exec(&fine, &["true"]).await.unwrap().exit_code, 0);
    assert!(!call.is_finished(), "the other pod took {:?}", begun.elapsed());
    let error = call.await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    // A moment's silence is shown, and is no reason to kill and restart the containers.
    let silent = info(&client, &stuck).await;
    assert!(silent.contains("\"answers\":false") && silent.contains("\"silentSince\":\"20"), "{silent}");
    assert_eq!(client.status(&id).await.unwrap().state(), cri::ContainerState::ContainerRunning);
    // A long one is.
    let unknown = next_event(&mut events, &id).await;
    assert_eq!(unknown, (cri::ContainerEventType::ContainerStoppedEvent, cri::ContainerState::ContainerUnknown));
    assert_eq!(client.status(&id).await.unwrap().state(), cri::ContainerState::ContainerUnknown);
    assert_eq!(client.status(&fine).await.unwrap().state(), cri::ContainerState::ContainerRunning);
    assert_eq!(client.pods().await.unwrap().len(), 2, "nothing is removed");

    signal(vmm, Signal::CONT);
    let back = next_event(&mut events, &id).await;
    assert_eq!(back, (cri::ContainerEventType::ContainerStartedEvent, cri::ContainerState::ContainerRunning));
    assert_eq!(client.status(&id).await.unwrap().state(), cri::ContainerState::ContainerRunning);
    let calls = daemon.log();
    let line = calls.lines().find(|line| line.contains("ExecSync") && line.contains("DeadlineExceeded")).unwrap();
    assert!(line.contains(&id) && line.contains(&stuck) && line.contains("pod=\"default/pod-"), "{line}");

    signal(vmm, Signal::STOP);
    let error = client.remove(&id).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    signal(vmm, Signal::CONT);
    // What it was asked meanwhile may have reached it or not: the removal is repeated.
    client.remove(&id).await.unwrap();

    let id = client.create(&stuck, "busybox", &["sleep", "1000"]).await.unwrap();
    client.start(&id).await.unwrap();
    signal(vmm, Signal::STOP);
    client.remove_pod(&stuck).await.expect("a pod whose guest does not answer can be removed");
    client.remove_pod(&other).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn calls_on_one_pod_are_ordered_and_a_long_stop_keeps_none_waiting() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let deaf = client.create(&pod, "busybox", &["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]);
    let deaf = deaf.await.unwrap();
    client.start(&deaf).await.unwrap();
    let log = client.status(&deaf).await.unwrap().log_path;
    while nacelle_tests::client::log_lines(&log).unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let stop = tokio::spawn({
        let (client, deaf) = (client.clone(), deaf.clone());
        async move { client.stop(&deaf, 3600).await }
    });
    // The same name several times at once: one gets it.
    let config = container_config("busybox", &["sleep", "1000"]);
    let (a, b, c) = tokio::join!(
        client.create_as(&pod, config.clone()),
        client.create_as(&pod, config.clone()),
        client.create_as(&pod, config)
    );
    let (made, refused): (Vec<_>, Vec<_>) = [a, b, c].into_iter().partition(Result::is_ok);
    assert_eq!((made.len(), refused.len()), (1, 2));
    assert!(refused.into_iter().all(|error| error.unwrap_err().code() == Code::AlreadyExists));
    let id = made.into_iter().next().unwrap().unwrap();
    // A start and removals at once: whatever comes first, it is gone at the end.
    let (started, first, second) = tokio::join!(client.start(&id), client.remove(&id), client.remove(&id));
    first.unwrap();
    second.unwrap();
    if let Err(error) = started {
        assert!(matches!(error.code(), Code::NotFound | Code::FailedPrecondition), "{error}");
    }
    assert_eq!(client.status(&id).await.unwrap_err().code(), Code::NotFound);
    assert!(!stop.is_finished());
    // A client that goes away does not make the stop kill early; another may.
    stop.abort();
    wait_state(&client, &deaf, cri::ContainerState::ContainerRunning).await;
    client.stop(&deaf[..12], 0).await.expect("a truncated id will do");
    assert_eq!(client.status(&deaf).await.unwrap().exit_code, 137);
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_client_that_goes_away_in_the_middle_leaves_nothing() {
    let daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let config = pod_config(logs.path());
    let call = tokio::spawn({
        let (client, config) = (client.clone(), config.clone());
        async move { client.run_pod_as(config).await }
    });
    // As soon as there is something to leave behind.
    let deadline = Instant::now() + limit(30);
    while daemon.there().is_empty() {
        assert!(Instant::now() < deadline && !call.is_finished());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    call.abort();
    while !daemon.there().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", daemon.there());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(client.pods().await.unwrap(), []);
    let pod = client.run_pod_as(config).await.expect("its name is free again");

    let call = tokio::spawn({
        let (client, pod) = (client.clone(), pod.clone());
        async move { client.create(&pod, "busybox", &["sleep", "1000"]).await }
    });
    // As soon as it is on record.
    let records = daemon.path().join("root/pods").join(&pod).join("containers");
    while std::fs::read_dir(&records).map_or(0, Iterator::count) == 0 && !call.is_finished() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    call.abort();
    let _ = call.await;
    // The next call waits for what is left of that one.
    let id = client.create(&pod, "busybox", &["sleep", "1000"]).await.unwrap();
    client.start(&id).await.unwrap();
    let deadline = Instant::now() + limit(30);
    loop {
        let request = cri::ListContainersRequest { filter: None };
        let listed = client.runtime.clone().list_containers(request).await.unwrap().into_inner().containers;
        if listed.len() == 1 {
            assert_eq!(listed[0].id, id);
            break;
        }
        assert!(Instant::now() < deadline, "{} containers", listed.len());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn ids_that_are_missing_or_unknown_get_the_status_that_clients_expect() {
    let mut runtime = Client::node().await.runtime;
    macro_rules! code {
        ($call:ident, $request:expr) => {
            runtime.$call($request).await.map(drop).map_err(|status| status.code())
        };
    }
    let unknown = || "f00dfeed".to_owned();
    for (id, expected) in [(String::new(), Code::InvalidArgument), (unknown(), Code::NotFound)] {
        let pod = || cri::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false };
        let container = || cri::ContainerStatusRequest { container_id: id.clone(), verbose: false };
        assert_eq!(code!(pod_sandbox_status, pod()), Err(expected));
        assert_eq!(code!(container_status, container()), Err(expected));
        assert_eq!(code!(start_container, cri::StartContainerRequest { container_id: id.clone() }), Err(expected));
        let exec = cri::ExecSyncRequest { container_id: id.clone(), cmd: vec!["true".into()], timeout: 1 };
        assert_eq!(code!(exec_sync, exec), Err(expected));
        let update = cri::UpdateContainerResourcesRequest { container_id: id.clone(), ..Default::default() };
        assert_eq!(code!(update_container_resources, update), Err(expected));
        let update = cri::UpdatePodSandboxResourcesRequest { pod_sandbox_id: id.clone(), ..Default::default() };
        assert_eq!(code!(update_pod_sandbox_resources, update), Err(expected));
    }
    assert_eq!(code!(stop_pod_sandbox, cri::StopPodSandboxRequest { pod_sandbox_id: unknown() }), Ok(()));
    assert_eq!(code!(remove_pod_sandbox, cri::RemovePodSandboxRequest { pod_sandbox_id: unknown() }), Ok(()));
    assert_eq!(code!(stop_container, cri::StopContainerRequest { container_id: unknown(), timeout: 0 }), Ok(()));
    assert_eq!(code!(remove_container, cri::RemoveContainerRequest { container_id: unknown() }), Ok(()));
    assert_eq!(code!(run_pod_sandbox, cri::RunPodSandboxRequest::default()), Err(Code::InvalidArgument));
    let create = cri::CreateContainerRequest { pod_sandbox_id: unknown(), ..Default::default() };
    let error = runtime.create_container(create).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().starts_with("config: "), "{}", error.message());
}
