//! Lists: as a whole, by filters, in pieces.

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{container_config, pod_config};
use nacelle_tests::daemon::Daemon;
use tonic::Code;

/// All messages of a call that answers in pieces.
macro_rules! pieces {
    ($client:ident.$call:ident($request:expr).$field:ident) => {{
        let mut stream = $client.runtime.clone().$call($request).await.unwrap().into_inner();
        let mut pieces = Vec::new();
        while let Some(piece) = stream.message().await.unwrap() {
            pieces.push(piece.$field);
        }
        pieces
    }};
}

#[tokio::test]
async fn a_list_in_pieces_is_the_same_list() {
    let daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    let mut runtime = client.runtime.clone();
    let none = pieces!(client.stream_containers(cri::StreamContainersRequest::default()).containers);
    assert_eq!(none.len(), 0, "nothing is no message");
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let mut config = pod_config(logs.path());
    config.labels.insert("app".into(), "lists".into());
    let pod = client.run_pod_as(config).await.unwrap();
    let mut ids = Vec::new();
    for number in 0..3 {
        let mut config = container_config("busybox", &["sleep", "10000"]);
        // Two do not fit into one piece.
        config.annotations.insert("note".into(), "x".repeat(700 << 10));
        config.labels.insert("number".into(), number.to_string());
        ids.push(client.create_as(&pod, config).await.unwrap());
    }
    client.start(&ids[1]).await.unwrap();

    let list = cri::ListContainersRequest::default();
    let whole = runtime.list_containers(list).await.unwrap().into_inner().containers;
    let parts = pieces!(client.stream_containers(cri::StreamContainersRequest::default()).containers);
    assert_eq!((whole.len(), parts.len()), (3, 3));
    assert_eq!(parts.concat(), whole);
    let running = cri::ContainerStateValue { state: cri::ContainerState::ContainerRunning.into() };
    let selector = |label: &str| [("number".to_owned(), label.to_owned())].into();
    for (filter, expected) in [
        (cri::ContainerFilter { state: Some(running), ..Default::default() }, vec![&ids[1]]),
        (cri::ContainerFilter { label_selector: selector("2"), ..Default::default() }, vec![&ids[2]]),
        (cri::ContainerFilter { id: ids[0][..12].into(), ..Default::default() }, vec![&ids[0]]),
        (cri::ContainerFilter { pod_sandbox_id: "f00d".into(), ..Default::default() }, vec![]),
    ] {
        let request = cri::StreamContainersRequest { filter: Some(filter.clone()) };
        let parts = pieces!(client.stream_containers(request).containers).concat();
        assert_eq!(parts.iter().map(|container| &container.id).collect::<Vec<_>>(), expected, "{filter:?}");
        let whole = runtime.list_containers(cri::ListContainersRequest { filter: Some(filter) }).await.unwrap();
        assert_eq!(whole.into_inner().containers, parts);
    }

    let whole = runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    let parts = pieces!(client.stream_pod_sandboxes(cri::StreamPodSandboxesRequest::default()).pod_sandboxes);
    assert_eq!(parts, [whole]);
    let wrong = cri::PodSandboxFilter { state: Some(cri::PodSandboxStateValue { state: 9 }), ..Default::default() };
    let error = runtime.stream_pod_sandboxes(cri::StreamPodSandboxesRequest { filter: Some(wrong) }).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().starts_with("filter.state.state: "), "{error}");

    let stats = pieces!(client.stream_container_stats(cri::StreamContainerStatsRequest::default()).container_stats);
    let stats = stats.concat();
    assert_eq!(stats.len(), 1, "one runs");
    assert_eq!(stats[0].attributes.as_ref().unwrap().id, ids[1]);
    let stats =
        pieces!(client.stream_pod_sandbox_stats(cri::StreamPodSandboxStatsRequest::default()).pod_sandbox_stats);
    let stats = stats.concat();
    assert_eq!((stats.len(), stats[0].attributes.as_ref().unwrap().id.as_str()), (1, pod.as_str()));
    let request = cri::StreamPodSandboxMetricsRequest::default();
    let metrics = pieces!(client.stream_pod_sandbox_metrics(request).pod_sandbox_metrics).concat();
    assert_eq!((metrics.len(), metrics[0].container_metrics.len()), (1, 1));

    let mut images = client.images.clone();
    let whole = images.list_images(cri::ListImagesRequest::default()).await.unwrap().into_inner().images;
    let mut stream = images.stream_images(cri::StreamImagesRequest::default()).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().images, whole);
    assert_eq!(stream.message().await.unwrap(), None);
    client.remove_pod(&pod).await.unwrap();
}
