//! A pod's life, as the kubelet sees it.

use std::path::Path;

use nacelle_proto::runtime::v1 as cri;
use tonic::Code;

use nacelle_tests::client::{Client, container_config, pod_config};
use nacelle_tests::host;

use crate::contexts::of_pod;

#[tokio::test]
async fn version_status_and_configuration_answer() {
    let client = Client::node().await;
    let mut runtime = client.runtime.clone();
    let version = runtime.version(cri::VersionRequest::default()).await.unwrap().into_inner();
    assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("nacelle", "v1"));
    let status = runtime.status(cri::StatusRequest { verbose: true }).await.unwrap().into_inner();
    let conditions = status.status.unwrap().conditions;
    let condition = |name: &str| conditions.iter().find(|c| c.r#type == name).cloned().unwrap();
    assert!(condition("RuntimeReady").status, "{:?}", condition("RuntimeReady"));
    assert!(condition("NetworkReady").status, "{:?}", condition("NetworkReady"));
    assert!(status.runtime_handlers.iter().any(|handler| handler.name == "kata"));
    assert!(status.features.unwrap().mount_options);
    let config = runtime.runtime_config(cri::RuntimeConfigRequest {}).await.unwrap().into_inner();
    assert_eq!(config.linux.unwrap().cgroup_driver(), cri::CgroupDriver::Cgroupfs);
}

#[tokio::test]
async fn a_call_that_is_not_there_says_so() {
    let mut runtime = Client::node().await.runtime;
    let error = runtime.checkpoint_container(cri::CheckpointContainerRequest::default()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);
    let error = runtime.checkpoint_pod(cri::CheckpointPodRequest::default()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);
    let error = runtime.restore_pod(cri::RestorePodRequest::default()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);
}

#[tokio::test]
async fn an_unknown_handler_is_refused_by_name() {
    let mut runtime = Client::node().await.runtime;
    let logs = tempfile::tempdir().unwrap();
    let request = cri::RunPodSandboxRequest { config: Some(pod_config(logs.path())), runtime_handler: "gvisor".into() };
    let error = runtime.run_pod_sandbox(request).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("gvisor") && error.message().contains("kata"), "{}", error.message());
}

#[tokio::test]
async fn a_pod_comes_shows_itself_and_goes() {
    let client = Client::node().await;
    let logs = tempfile::tempdir().unwrap();
    let mut config = pod_config(logs.path());
    config.labels.insert("app".into(), "web".into());
    config.annotations.insert("note".into(), "kept".into());
    let metadata = config.metadata.clone();
    let id = client.run_pod_as(config.clone()).await.unwrap();
    assert_eq!(id.len(), 64);

    let status = client.pod_status(&id[..16]).await.expect("a truncated id will do");
    assert_eq!((status.state(), &status.metadata), (cri::PodSandboxState::SandboxReady, &metadata));
    assert!(status.created_at > 0);
    assert_eq!(status.annotations["note"], "kept");
    assert_eq!(status.runtime_handler, "kata");
    let filter =
        cri::PodSandboxFilter { label_selector: [("app".to_owned(), "web".to_owned())].into(), ..Default::default() };
    let mut runtime = client.runtime.clone();
    let listed =
        runtime.list_pod_sandbox(cri::ListPodSandboxRequest { filter: Some(filter) }).await.unwrap().into_inner();
    assert_eq!(listed.items.iter().map(|pod| &pod.id).collect::<Vec<_>>(), [&id]);

    let error = client.run_pod_as(config.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");

    let stop = cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() };
    runtime.stop_pod_sandbox(stop.clone()).await.unwrap();
    runtime.stop_pod_sandbox(stop).await.expect("stopping again is no error");
    assert_eq!(client.pod_status(&id).await.unwrap().state(), cri::PodSandboxState::SandboxNotready);
    client.remove_pod(&id).await.unwrap();
    client.remove_pod(&id).await.expect("removing again is no error");
    assert_eq!(client.pod_status(&id).await.unwrap_err().code(), Code::NotFound);

    assert_eq!(host::cgroups(&id), [""; 0]);
    let left = host::leftovers(Path::new("/var/lib/nacelle"), Path::new("/run/nacelle"));
    assert!(!left.iter().any(|thing| thing.contains(&id)), "{left:?}");

    // The name is free again.
    let again = client.run_pod_as(config).await.unwrap();
    client.remove_pod(&again).await.unwrap();
}

#[tokio::test]
async fn a_pod_that_is_removed_while_it_runs_takes_its_containers_along() {
    let client = Client::node().await;
    let logs = tempfile::tempdir().unwrap();
    client.pull("busybox").await.unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let container = client.create(&pod, "busybox", &["sleep", "1000"]).await.unwrap();
    client.start(&container).await.unwrap();
    let mut runtime = client.runtime.clone();
    runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    assert_eq!(client.status(&container).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(host::cgroups(&pod), [""; 0]);
}

#[tokio::test]
async fn the_pod_has_its_own_kernel_loopback_and_host_name() {
    let client = Client::node().await;
    let logs = tempfile::tempdir().unwrap();
    client.pull("busybox").await.unwrap();
    let mut config = pod_config(logs.path());
    config.hostname = "pod-of-its-own".into();
    config.dns_config = Some(cri::DnsConfig {
        servers: vec!["10.1.2.3".into()],
        searches: vec!["example.org".into()],
        options: vec!["ndots:5".into()],
    });
    let pod = client.run_pod_as(config).await.unwrap();
    let container = client.create(&pod, "busybox", &["sleep", "1000"]).await.unwrap();
    client.start(&container).await.unwrap();
    let text = |answer: cri::ExecSyncResponse| String::from_utf8(answer.stdout).unwrap();
    let release = text(client.exec(&container, &["uname", "-r"]).await.unwrap());
    assert_ne!(release.trim(), host::kernel_release());
    assert_eq!(text(client.exec(&container, &["hostname"]).await.unwrap()), "pod-of-its-own\n");
    let resolv = text(client.exec(&container, &["cat", "/etc/resolv.conf"]).await.unwrap());
    assert_eq!(resolv, "search example.org\nnameserver 10.1.2.3\noptions ndots:5\n");
    let ping = client.exec(&container, &["ping", "-c", "1", "-W", "30", "127.0.0.1"]).await.unwrap();
    assert_eq!(ping.exit_code, 0, "{ping:?}");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn what_a_guest_cannot_give_is_refused_at_once() {
    let client = Client::node().await;
    let logs = tempfile::tempdir().unwrap();
    let mut config = pod_config(logs.path());
    of_pod(&mut config).namespace_options.as_mut().unwrap().network = cri::NamespaceMode::Node.into();
    let error = client.run_pod_as(config).await.unwrap_err();
    assert!(error.message().contains("namespace_options.network"), "{}", error.message());
}

#[tokio::test]
async fn containers_of_a_stopped_pod_are_refused_with_the_reason() {
    let client = Client::node().await;
    let logs = tempfile::tempdir().unwrap();
    client.pull("busybox").await.unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let mut runtime = client.runtime.clone();
    runtime.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    let error = client.create_as(&pod, container_config("busybox", &["true"])).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    client.remove_pod(&pod).await.unwrap();
}
