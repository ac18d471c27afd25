//! What happens to pods and containers, told to those who listen.

use nacelle_proto::runtime::v1 as cri;
use nacelle_proto::runtime::v1::ContainerEventType as Type;
use nacelle_tests::client::{Client, limit};
use nacelle_tests::daemon::Daemon;
use tokio::time::{Instant, timeout};
use tonic::Streaming;

async fn listen(client: &Client) -> Streaming<cri::ContainerEventResponse> {
    client.runtime.clone().get_container_events(cri::GetEventsRequest {}).await.unwrap().into_inner()
}

/// The next event.
async fn next(events: &mut Streaming<cri::ContainerEventResponse>) -> cri::ContainerEventResponse {
    let event = timeout(limit(30), events.message()).await.expect("an event in time");
    event.unwrap().expect("an event")
}

/// A pod with a container that ends by itself and one that is stopped, removed in the end.
async fn life(client: &Client) -> (String, [String; 2]) {
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let ends = client.create(&pod, "busybox", &["sh", "-c", "exit 3"]).await.unwrap();
    client.start(&ends).await.unwrap();
    client.wait_exit(&ends).await.unwrap();
    client.remove(&ends).await.unwrap();
    let stays = client.create(&pod, "busybox", &["sleep", "10000"]).await.unwrap();
    client.start(&stays).await.unwrap();
    client.remove_pod(&pod).await.unwrap();
    (pod, [ends, stays])
}

#[tokio::test]
async fn the_life_of_a_pod_is_told_in_order_with_its_state() {
    let daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let mut events = listen(&client).await;
    let (pod, [ends, stays]) = life(&client).await;
    let expected = [
        (&pod, Type::ContainerCreatedEvent),
        (&pod, Type::ContainerStartedEvent),
        (&ends, Type::ContainerCreatedEvent),
        (&ends, Type::ContainerStartedEvent),
        (&ends, Type::ContainerStoppedEvent),
        (&ends, Type::ContainerDeletedEvent),
        (&stays, Type::ContainerCreatedEvent),
        (&stays, Type::ContainerStartedEvent),
        (&stays, Type::ContainerStoppedEvent),
        (&pod, Type::ContainerStoppedEvent),
        (&stays, Type::ContainerDeletedEvent),
        (&pod, Type::ContainerDeletedEvent),
    ];
    let mut before = 0;
    for (id, kind) in expected {
        let event = next(&mut events).await;
        assert_eq!((&event.container_id, event.container_event_type()), (id, kind));
        assert!(event.created_at > before, "{} is not after {before}", event.created_at);
        before = event.created_at;
        let status = event.pod_sandbox_status.expect("the pod's state");
        assert_eq!((status.id.as_str(), status.metadata.is_some()), (pod.as_str(), true));
        let own = event.containers_statuses.iter().find(|status| status.id == *id).map(|status| status.state());
        use cri::ContainerState as C;
        let state = match kind {
            _ if *id == pod => None,
            Type::ContainerCreatedEvent => Some(C::ContainerCreated),
            Type::ContainerStartedEvent => Some(C::ContainerRunning),
            Type::ContainerStoppedEvent => Some(C::ContainerExited),
            Type::ContainerDeletedEvent => None,
        };
        assert_eq!(own, state, "{kind:?}");
        if kind == Type::ContainerStoppedEvent && *id == ends {
            assert_eq!(event.containers_statuses[0].exit_code, 3);
        }
        if *id == pod {
            let ready = matches!(kind, Type::ContainerCreatedEvent | Type::ContainerStartedEvent);
            assert_eq!(status.state() == cri::PodSandboxState::SandboxReady, ready, "{kind:?}");
        }
    }
}

// Its connections go on while it waits for the daemon.
#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_does_not_fetch_holds_up_neither_others_nor_the_end_of_the_daemon() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let other = daemon.client().await;
    let (_slow, mut quick) = (listen(&other).await, listen(&client).await);
    let (pod, _) = life(&client).await;
    loop {
        let event = next(&mut quick).await;
        if event.container_id == pod && event.container_event_type() == Type::ContainerDeletedEvent {
            break;
        }
    }
    let begun = Instant::now();
    daemon.terminate().unwrap();
    assert!(begun.elapsed() < limit(4), "took {:?}", begun.elapsed());
    assert!(quick.message().await.unwrap().is_none(), "the end of the daemon is the end of the events");
    assert!(!daemon.log().contains("did not end"), "{}", daemon.log());
}

#[tokio::test]
async fn a_pods_status_tells_of_its_containers() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let id = client.create(&pod, "busybox", &["sleep", "10000"]).await.unwrap();
    let status = async || {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: false };
        client.runtime.clone().pod_sandbox_status(request).await.unwrap().into_inner()
    };
    let before = status().await;
    client.start(&id).await.unwrap();
    let after = status().await;
    assert!(before.timestamp > 0 && after.timestamp > before.timestamp);
    let states = |status: &cri::PodSandboxStatusResponse| {
        status.containers_statuses.iter().map(|c| (c.id.clone(), c.state())).collect::<Vec<_>>()
    };
    assert_eq!(states(&before), [(id.clone(), cri::ContainerState::ContainerCreated)]);
    assert_eq!(states(&after), [(id.clone(), cri::ContainerState::ContainerRunning)]);
    assert_eq!(after.containers_statuses[0], client.status(&id).await.unwrap());
    client.remove_pod(&pod).await.unwrap();
}
