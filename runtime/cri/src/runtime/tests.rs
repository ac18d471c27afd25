//! Calls on a runtime without pods: what is wrong with a request is told before anything is
//! done, by the field's path.

use std::time::Duration;

use nacelle_sandbox::{CgroupDriver, GuestConfig, ManagerConfig, NetworkConfig};
use nacelle_streaming::{Options, Server, Timeouts};
use tonic::Code;

use super::*;

/// A runtime in a directory that ends with it.
pub(crate) async fn runtime() -> (Runtime, tempfile::TempDir) {
    let directory = tempfile::Builder::new().prefix("n").tempdir_in("/tmp").unwrap();
    let config = ManagerConfig {
        root: directory.path().join("root"),
        run: directory.path().join("r"),
        program: "/no/such/program".into(),
        guest: GuestConfig { scratch_mib: 16, ..GuestConfig::default() },
        handlers: Default::default(),
        image_volumes: nacelle_sandbox::ImageVolumes::default(),
        network: NetworkConfig::default(),
        cgroup_driver: CgroupDriver::default(),
        timeout_scale: 1.0,
    };
    let manager = Manager::open(config).await.unwrap();
    let images = ImageStore::open(&directory.path().join("images")).unwrap();
    let timeouts = Timeouts { handshake: Duration::from_secs(1), idle: Duration::from_secs(1) };
    let options = Options { address: ([127, 0, 0, 1], 0).into(), tls: None, timeouts };
    let door = Server::bind(options).await.unwrap().door();
    let health: Health = Arc::new(|| Box::pin(async { Ok(()) }));
    let handlers = vec![Handler { name: "kata".into() }];
    (Runtime::new(manager, images, handlers, "0".into(), health, door), directory)
}

/// The images of a runtime.
pub(crate) fn images(runtime: &Runtime) -> crate::Images {
    crate::Images::new(runtime.images.clone(), runtime.manager.clone(), &[])
}

/// What a call answered instead of succeeding.
macro_rules! refusal {
    ($runtime:ident.$call:ident($request:expr)) => {
        match Runtime::$call(&$runtime, $request).await {
            Ok(_) => panic!("{} succeeded", stringify!($call)),
            Err(status) => status,
        }
    };
}

#[tokio::test]
async fn every_call_names_the_field_that_is_missing_or_wrong() {
    let (runtime, _directory) = runtime().await;
    macro_rules! invalid {
        ($call:ident, $field:literal, $request:expr) => {
            let status = refusal!(runtime.$call($request));
            assert_eq!(status.code(), Code::InvalidArgument, "{}: {status}", stringify!($call));
            let message = status.message();
            assert!(message.starts_with(concat!($field, ": ")), "{}: {message}", stringify!($call));
        };
    }
    invalid!(run_pod_sandbox, "config", cri::RunPodSandboxRequest::default());
    let handler = cri::RunPodSandboxRequest { runtime_handler: "other".into(), ..Default::default() };
    invalid!(run_pod_sandbox, "runtime_handler", handler);
    invalid!(stop_pod_sandbox, "pod_sandbox_id", cri::StopPodSandboxRequest::default());
    invalid!(remove_pod_sandbox, "pod_sandbox_id", cri::RemovePodSandboxRequest::default());
    invalid!(pod_sandbox_status, "pod_sandbox_id", cri::PodSandboxStatusRequest::default());
    invalid!(pod_sandbox_stats, "pod_sandbox_id", cri::PodSandboxStatsRequest::default());
    invalid!(port_forward, "pod_sandbox_id", cri::PortForwardRequest::default());
    let ports = cri::PortForwardRequest { pod_sandbox_id: "p".into(), port: vec![80, 0] };
    invalid!(port_forward, "port", ports);
    invalid!(update_pod_sandbox_resources, "pod_sandbox_id", cri::UpdatePodSandboxResourcesRequest::default());
    let limits = || Some(cri::LinuxContainerResources { cpu_period: 1, ..Default::default() });
    let update =
        cri::UpdatePodSandboxResourcesRequest { pod_sandbox_id: "p".into(), resources: limits(), ..Default::default() };
    invalid!(update_pod_sandbox_resources, "resources.cpu_period", update);
    let update =
        cri::UpdatePodSandboxResourcesRequest { pod_sandbox_id: "p".into(), overhead: limits(), ..Default::default() };
    invalid!(update_pod_sandbox_resources, "overhead.cpu_period", update);

    invalid!(create_container, "pod_sandbox_id", cri::CreateContainerRequest::default());
    let create = cri::CreateContainerRequest { pod_sandbox_id: "p".into(), ..Default::default() };
    invalid!(create_container, "config", create.clone());
    let create = cri::CreateContainerRequest { config: Some(cri::ContainerConfig::default()), ..create };
    invalid!(create_container, "config.metadata", create);
    invalid!(start_container, "container_id", cri::StartContainerRequest::default());
    invalid!(stop_container, "container_id", cri::StopContainerRequest::default());
    invalid!(remove_container, "container_id", cri::RemoveContainerRequest::default());
    invalid!(container_status, "container_id", cri::ContainerStatusRequest::default());
    invalid!(container_stats, "container_id", cri::ContainerStatsRequest::default());
    invalid!(reopen_container_log, "container_id", cri::ReopenContainerLogRequest::default());
    invalid!(update_container_resources, "container_id", cri::UpdateContainerResourcesRequest::default());
    let update =
        cri::UpdateContainerResourcesRequest { container_id: "c".into(), linux: limits(), ..Default::default() };
    invalid!(update_container_resources, "linux.cpu_period", update);
    invalid!(exec_sync, "container_id", cri::ExecSyncRequest::default());
    invalid!(exec_sync, "cmd", cri::ExecSyncRequest { container_id: "c".into(), ..Default::default() });
    invalid!(exec, "container_id", cri::ExecRequest::default());
    invalid!(attach, "container_id", cri::AttachRequest::default());

    let state = Some(cri::PodSandboxStateValue { state: 7 });
    let filter = Some(cri::PodSandboxFilter { state, ..Default::default() });
    invalid!(list_pod_sandbox, "filter.state.state", cri::ListPodSandboxRequest { filter: filter.clone() });
    invalid!(stream_pod_sandboxes, "filter.state.state", cri::StreamPodSandboxesRequest { filter });
    let state = Some(cri::ContainerStateValue { state: -1 });
    let filter = Some(cri::ContainerFilter { state, ..Default::default() });
    invalid!(list_containers, "filter.state.state", cri::ListContainersRequest { filter: filter.clone() });
    invalid!(stream_containers, "filter.state.state", cri::StreamContainersRequest { filter });
    let network_config = Some(cri::NetworkConfig { pod_cidr: "x".into() });
    let runtime_config = Some(cri::RuntimeConfig { network_config });
    let update = cri::UpdateRuntimeConfigRequest { runtime_config };
    invalid!(update_runtime_config, "runtime_config.network_config.pod_cidr", update);
}

#[tokio::test]
async fn what_does_not_exist_is_not_found_or_gone_already() {
    let (runtime, _directory) = runtime().await;
    macro_rules! not_found {
        ($call:ident($request:expr)) => {
            let status = refusal!(runtime.$call($request));
            assert_eq!(status.code(), Code::NotFound, "{}: {status}", stringify!($call));
            assert!(status.message().contains("f00d"), "{}: {status}", stringify!($call));
        };
    }
    let id = || "f00d".to_owned();
    not_found!(pod_sandbox_status(cri::PodSandboxStatusRequest { pod_sandbox_id: id(), verbose: false }));
    not_found!(pod_sandbox_stats(cri::PodSandboxStatsRequest { pod_sandbox_id: id() }));
    not_found!(port_forward(cri::PortForwardRequest { pod_sandbox_id: id(), port: vec![80] }));
    not_found!(update_pod_sandbox_resources(cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: id(),
        ..Default::default()
    }));
    not_found!(start_container(cri::StartContainerRequest { container_id: id() }));
    not_found!(container_status(cri::ContainerStatusRequest { container_id: id(), verbose: false }));
    not_found!(container_stats(cri::ContainerStatsRequest { container_id: id() }));
    not_found!(reopen_container_log(cri::ReopenContainerLogRequest { container_id: id() }));
    not_found!(update_container_resources(cri::UpdateContainerResourcesRequest {
        container_id: id(),
        ..Default::default()
    }));
    not_found!(exec_sync(cri::ExecSyncRequest { container_id: id(), cmd: vec!["true".into()], timeout: 0 }));
    let cmd = vec!["true".into()];
    not_found!(exec(cri::ExecRequest { container_id: id(), cmd, stdout: true, ..Default::default() }));
    not_found!(attach(cri::AttachRequest { container_id: id(), stdout: true, ..Default::default() }));

    let stop = cri::StopContainerRequest { container_id: id(), timeout: 0 };
    runtime.stop_container(stop).await.unwrap();
    runtime.remove_container(cri::RemoveContainerRequest { container_id: id() }).await.unwrap();
    runtime.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id() }).await.unwrap();
    runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id() }).await.unwrap();
    let stats = runtime.list_container_stats(cri::ListContainerStatsRequest::default()).await.unwrap();
    assert_eq!(stats.stats, []);
}

#[tokio::test]
async fn the_handler_of_pods_without_a_class_is_listed() {
    let (runtime, _directory) = runtime().await;
    let status = Runtime::status(&runtime, cri::StatusRequest::default()).await.unwrap();
    let names: Vec<_> = status.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    assert_eq!(names, ["", "kata"]);
    assert!(status.runtime_handlers.iter().all(|handler| handler.features == status.runtime_handlers[0].features));
}

#[tokio::test(start_paused = true)]
async fn status_answers_in_two_seconds_whatever_hangs() {
    let (runtime, _directory) = runtime().await;
    let health: Health = Arc::new(|| Box::pin(std::future::pending()));
    let runtime = Runtime { health, ..runtime };
    let begun = tokio::time::Instant::now();
    let status = Runtime::status(&runtime, cri::StatusRequest { verbose: true }).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let ready = &status.status.unwrap().conditions[0];
    assert!(!ready.status && ready.message.contains("no answer within"), "{ready:?}");
}

#[tokio::test]
async fn one_disk_has_one_name_for_images_and_containers() {
    use nacelle_proto::runtime::v1::image_service_server::ImageService;
    let (runtime, _directory) = runtime().await;
    let images = images(&runtime);
    let usage = images.image_fs_info(tonic::Request::new(cri::ImageFsInfoRequest {})).await.unwrap().into_inner();
    let place = |found: &[cri::FilesystemUsage]| found[0].fs_id.clone().unwrap().mountpoint;
    assert_eq!(place(&usage.image_filesystems), place(&usage.container_filesystems));
}

#[tokio::test]
async fn a_checkpoint_is_refused_with_its_reason() {
    let (runtime, _directory) = runtime().await;
    let status = refusal!(runtime.checkpoint_container(cri::CheckpointContainerRequest::default()));
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().contains("volume"), "the remedy: {}", status.message());
}
