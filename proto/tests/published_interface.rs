//! `runtime.v1` must be the published interface to the last name and number: a client that
//! disagrees with us on one of them loses data without any error.
//!
//! Both our `.proto` and the one that the `k8s-cri` crate carries are compiled to
//! descriptors and written out as one line an item. What cri-api 0.37 has beyond that
//! crate's older copy is listed here, so that the two sides must agree exactly.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto};

/// Items of cri-api 0.37 that the crate's copy lacks.
const ADDED: &[&str] = &[
    "CheckpointPodRequest.OptionsEntry.key = 1: string",
    "CheckpointPodRequest.OptionsEntry.value = 2: string",
    "CheckpointPodRequest.container_ids = 3: repeated string",
    "CheckpointPodRequest.options = 4: repeated CheckpointPodRequest.OptionsEntry",
    "CheckpointPodRequest.output_path = 2: string",
    "CheckpointPodRequest.pod_sandbox_id = 1: string",
    "ContainerConfig.stop_signal = 18: Signal",
    "ContainerStats.io = 6: IoUsage",
    "ContainerStatus.stop_signal = 19: Signal",
    "CpuUsage.psi = 4: PsiStats",
    "ImageService.StreamImages(StreamImagesRequest) -> stream StreamImagesResponse",
    "ImageSpec.image_ref = 20: string",
    "IoUsage.psi = 2: PsiStats",
    "IoUsage.timestamp = 1: int64",
    "KeyValue.value = 2: bytes",
    "LinuxPodSandboxStats.io = 6: IoUsage",
    "MemoryUsage.psi = 8: PsiStats",
    "Mount.image_sub_path = 10: string",
    "Mount.mount_options = 11: repeated string",
    "PsiData.Avg10 = 2: double",
    "PsiData.Avg300 = 4: double",
    "PsiData.Avg60 = 3: double",
    "PsiData.Total = 1: uint64",
    "PsiStats.Full = 1: PsiData",
    "PsiStats.Some = 2: PsiData",
    "RestorePodRequest.OptionsEntry.key = 1: string",
    "RestorePodRequest.OptionsEntry.value = 2: string",
    "RestorePodRequest.checkpoint_path = 1: string",
    "RestorePodRequest.config = 2: PodSandboxConfig",
    "RestorePodRequest.container_configs = 5: repeated ContainerConfig",
    "RestorePodRequest.options = 4: repeated RestorePodRequest.OptionsEntry",
    "RestorePodRequest.runtime_handler = 3: string",
    "RestorePodResponse.pod_sandbox_id = 1: string",
    "RestorePodResponse.restored_containers = 2: repeated RestoredContainer",
    "RestoredContainer.container_id = 2: string",
    "RestoredContainer.name = 1: string",
    "RuntimeFeatures.mount_options = 3: bool",
    "RuntimeFeatures.user_namespaces_host_network = 2: bool",
    "RuntimeService.CheckpointPod(CheckpointPodRequest) -> CheckpointPodResponse",
    "RuntimeService.RestorePod(RestorePodRequest) -> RestorePodResponse",
    "RuntimeService.StreamContainerStats(StreamContainerStatsRequest) -> stream StreamContainerStatsResponse",
    "RuntimeService.StreamContainers(StreamContainersRequest) -> stream StreamContainersResponse",
    "RuntimeService.StreamPodSandboxMetrics(StreamPodSandboxMetricsRequest) -> stream StreamPodSandboxMetricsResponse",
    "RuntimeService.StreamPodSandboxStats(StreamPodSandboxStatsRequest) -> stream StreamPodSandboxStatsResponse",
    "RuntimeService.StreamPodSandboxes(StreamPodSandboxesRequest) -> stream StreamPodSandboxesResponse",
    "RuntimeService.UpdatePodSandboxResources(UpdatePodSandboxResourcesRequest) -> UpdatePodSandboxResourcesResponse",
    "StreamContainerStatsRequest.filter = 1: ContainerStatsFilter",
    "StreamContainerStatsResponse.container_stats = 1: repeated ContainerStats",
    "StreamContainersRequest.filter = 1: ContainerFilter",
    "StreamContainersResponse.containers = 1: repeated Container",
    "StreamImagesRequest.filter = 1: ImageFilter",
    "StreamImagesResponse.images = 1: repeated Image",
    "StreamPodSandboxMetricsResponse.pod_sandbox_metrics = 1: repeated PodSandboxMetrics",
    "StreamPodSandboxStatsRequest.filter = 1: PodSandboxStatsFilter",
    "StreamPodSandboxStatsResponse.pod_sandbox_stats = 1: repeated PodSandboxStats",
    "StreamPodSandboxesRequest.filter = 1: PodSandboxFilter",
    "StreamPodSandboxesResponse.pod_sandboxes = 1: repeated PodSandbox",
    "UpdatePodSandboxResourcesRequest.overhead = 2: LinuxContainerResources",
    "UpdatePodSandboxResourcesRequest.pod_sandbox_id = 1: string",
    "UpdatePodSandboxResourcesRequest.resources = 3: LinuxContainerResources",
    "enum Signal.SIGNAL_RUNTIME_DEFAULT = 0",
    "enum Signal.SIGNAL_SIGABRT = 1",
    "enum Signal.SIGNAL_SIGALRM = 2",
    "enum Signal.SIGNAL_SIGBUS = 3",
    "enum Signal.SIGNAL_SIGCHLD = 4",
    "enum Signal.SIGNAL_SIGCLD = 5",
    "enum Signal.SIGNAL_SIGCONT = 6",
    "enum Signal.SIGNAL_SIGFPE = 7",
    "enum Signal.SIGNAL_SIGHUP = 8",
    "enum Signal.SIGNAL_SIGILL = 9",
    "enum Signal.SIGNAL_SIGINT = 10",
    "enum Signal.SIGNAL_SIGIO = 11",
    "enum Signal.SIGNAL_SIGIOT = 12",
    "enum Signal.SIGNAL_SIGKILL = 13",
    "enum Signal.SIGNAL_SIGPIPE = 14",
    "enum Signal.SIGNAL_SIGPOLL = 15",
    "enum Signal.SIGNAL_SIGPROF = 16",
    "enum Signal.SIGNAL_SIGPWR = 17",
    "enum Signal.SIGNAL_SIGQUIT = 18",
    "enum Signal.SIGNAL_SIGRTMAX = 65",
    "enum Signal.SIGNAL_SIGRTMAXMINUS1 = 64",
    "enum Signal.SIGNAL_SIGRTMAXMINUS10 = 55",
    "enum Signal.SIGNAL_SIGRTMAXMINUS11 = 54",
    "enum Signal.SIGNAL_SIGRTMAXMINUS12 = 53",
    "enum Signal.SIGNAL_SIGRTMAXMINUS13 = 52",
    "enum Signal.SIGNAL_SIGRTMAXMINUS14 = 51",
    "enum Signal.SIGNAL_SIGRTMAXMINUS2 = 63",
    "enum Signal.SIGNAL_SIGRTMAXMINUS3 = 62",
    "enum Signal.SIGNAL_SIGRTMAXMINUS4 = 61",
    "enum Signal.SIGNAL_SIGRTMAXMINUS5 = 60",
    "enum Signal.SIGNAL_SIGRTMAXMINUS6 = 59",
    "enum Signal.SIGNAL_SIGRTMAXMINUS7 = 58",
    "enum Signal.SIGNAL_SIGRTMAXMINUS8 = 57",
    "enum Signal.SIGNAL_SIGRTMAXMINUS9 = 56",
    "enum Signal.SIGNAL_SIGRTMIN = 35",
    "enum Signal.SIGNAL_SIGRTMINPLUS1 = 36",
    "enum Signal.SIGNAL_SIGRTMINPLUS10 = 45",
    "enum Signal.SIGNAL_SIGRTMINPLUS11 = 46",
    "enum Signal.SIGNAL_SIGRTMINPLUS12 = 47",
    "enum Signal.SIGNAL_SIGRTMINPLUS13 = 48",
    "enum Signal.SIGNAL_SIGRTMINPLUS14 = 49",
    "enum Signal.SIGNAL_SIGRTMINPLUS15 = 50",
    "enum Signal.SIGNAL_SIGRTMINPLUS2 = 37",
    "enum Signal.SIGNAL_SIGRTMINPLUS3 = 38",
    "enum Signal.SIGNAL_SIGRTMINPLUS4 = 39",
    "enum Signal.SIGNAL_SIGRTMINPLUS5 = 40",
    "enum Signal.SIGNAL_SIGRTMINPLUS6 = 41",
    "enum Signal.SIGNAL_SIGRTMINPLUS7 = 42",
    "enum Signal.SIGNAL_SIGRTMINPLUS8 = 43",
    "enum Signal.SIGNAL_SIGRTMINPLUS9 = 44",
    "enum Signal.SIGNAL_SIGSEGV = 19",
    "enum Signal.SIGNAL_SIGSTKFLT = 20",
    "enum Signal.SIGNAL_SIGSTOP = 21",
    "enum Signal.SIGNAL_SIGSYS = 22",
    "enum Signal.SIGNAL_SIGTERM = 23",
    "enum Signal.SIGNAL_SIGTRAP = 24",
    "enum Signal.SIGNAL_SIGTSTP = 25",
    "enum Signal.SIGNAL_SIGTTIN = 26",
    "enum Signal.SIGNAL_SIGTTOU = 27",
    "enum Signal.SIGNAL_SIGURG = 28",
    "enum Signal.SIGNAL_SIGUSR1 = 29",
    "enum Signal.SIGNAL_SIGUSR2 = 30",
    "enum Signal.SIGNAL_SIGVTALRM = 31",
    "enum Signal.SIGNAL_SIGWINCH = 32",
    "enum Signal.SIGNAL_SIGXCPU = 33",
    "enum Signal.SIGNAL_SIGXFSZ = 34",
    "message CheckpointPodRequest",
    "message CheckpointPodRequest.OptionsEntry",
    "message CheckpointPodResponse",
    "message IoUsage",
    "message PsiData",
    "message PsiStats",
    "message RestorePodRequest",
    "message RestorePodRequest.OptionsEntry",
    "message RestorePodResponse",
    "message RestoredContainer",
    "message StreamContainerStatsRequest",
    "message StreamContainerStatsResponse",
    "message StreamContainersRequest",
    "message StreamContainersResponse",
    "message StreamImagesRequest",
    "message StreamImagesResponse",
    "message StreamPodSandboxMetricsRequest",
    "message StreamPodSandboxMetricsResponse",
    "message StreamPodSandboxStatsRequest",
    "message StreamPodSandboxStatsResponse",
    "message StreamPodSandboxesRequest",
    "message StreamPodSandboxesResponse",
    "message UpdatePodSandboxResourcesRequest",
    "message UpdatePodSandboxResourcesResponse",
];

/// Items of the crate's copy that cri-api 0.37 has changed; their new form is in [`ADDED`].
const CHANGED: &[&str] = &["KeyValue.value = 2: string"];

#[test]
fn every_item_is_as_published() {
    let ours = items(&ours());
    let published = items(&published());
    let missing: Vec<_> = published.difference(&ours).map(String::as_str).collect();
    let extra: Vec<_> = ours.difference(&published).map(String::as_str).collect();
    assert_eq!(missing, sorted(CHANGED), "published, but not ours (left) must be the changed items (right)");
    assert_eq!(extra, sorted(ADDED), "ours, but not published (left) must be the added items (right)");
}

#[test]
fn the_services_have_37_and_6_calls() {
    let calls: Vec<_> = ours().service.iter().map(|s| (s.name().to_owned(), s.method.len())).collect();
    assert_eq!(calls, [("RuntimeService".to_owned(), 37), ("ImageService".to_owned(), 6)]);
}

#[test]
fn only_the_list_variants_and_events_stream() {
    let file = ours();
    for method in file.service.iter().flat_map(|s| &s.method) {
        let name = method.name();
        assert!(!method.client_streaming(), "{name} must not take a stream");
        let streams = name.starts_with("Stream") || name == "GetContainerEvents";
        assert_eq!(method.server_streaming(), streams, "{name}");
    }
}

/// Both sides of both protocols are generated; this fails to compile otherwise.
#[test]
fn client_and_server_are_generated() {
    use nacelle_proto::agent::v1::{agent_client::AgentClient, agent_server};
    use nacelle_proto::runtime::v1::{image_service_client::ImageServiceClient, image_service_server};
    use nacelle_proto::runtime::v1::{runtime_service_client::RuntimeServiceClient, runtime_service_server};
    use tonic::server::NamedService;
    use tonic::transport::Channel;

    fn name_of<T>() -> &'static str
    where
        T: NamedService,
    {
        T::NAME
    }
    fn is_clone<T: Clone>() {}

    is_clone::<RuntimeServiceClient<Channel>>();
    is_clone::<ImageServiceClient<Channel>>();
    is_clone::<AgentClient<Channel>>();
    assert_eq!(name_of::<runtime_service_server::RuntimeServiceServer<()>>(), "runtime.v1.RuntimeService");
    assert_eq!(name_of::<image_service_server::ImageServiceServer<()>>(), "runtime.v1.ImageService");
    assert_eq!(name_of::<agent_server::AgentServer<()>>(), "nacelle.agent.v1.Agent");
}

fn ours() -> FileDescriptorProto {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    compile("runtime/v1/api.proto", &root)
}

fn published() -> FileDescriptorProto {
    compile("v1.proto", &k8s_cri_source().join("proto"))
}

fn compile(file: &str, root: &Path) -> FileDescriptorProto {
    let set = protox::compile([file], [root]).unwrap_or_else(|e| panic!("compile {file} in {}: {e}", root.display()));
    set.file.into_iter().find(|f| f.package() == "runtime.v1").expect("a file of package runtime.v1")
}

/// Where cargo keeps the source of `k8s-cri`; cargo downloads it if need be.
fn k8s_cri_source() -> PathBuf {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--format-version", "1", "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .output()
        .expect("run cargo metadata");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata's JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let package = packages.iter().find(|p| p["name"] == "k8s-cri").expect("k8s-cri in the workspace's dependencies");
    let manifest = Path::new(package["manifest_path"].as_str().expect("manifest_path"));
    manifest.parent().expect("a directory").to_owned()
}

fn sorted<'a>(list: &[&'a str]) -> Vec<&'a str> {
    let set: BTreeSet<_> = list.iter().copied().collect();
    assert_eq!(set.len(), list.len(), "an item is listed twice");
    set.into_iter().collect()
}

/// One line for every message, field, enum value and call.
fn items(file: &FileDescriptorProto) -> BTreeSet<String> {
    let mut lines = Vec::new();
    for message in &file.message_type {
        describe_message("", message, &mut lines);
    }
    for enumeration in &file.enum_type {
        describe_enum("", enumeration, &mut lines);
    }
    for service in &file.service {
        for method in &service.method {
            lines.push(format!(
                "{}.{}({}) -> {}{}",
                service.name(),
                method.name(),
                local(method.input_type()),
                if method.server_streaming() { "stream " } else { "" },
                local(method.output_type()),
            ));
        }
    }
    lines.into_iter().collect()
}

fn describe_message(scope: &str, message: &DescriptorProto, lines: &mut Vec<String>) {
    let name = format!("{scope}{}", message.name());
    lines.push(format!("message {name}"));
    for field in &message.field {
        lines.push(format!("{name}.{} = {}: {}", field.name(), field.number(), describe_type(field)));
    }
    let scope = format!("{name}.");
    for nested in &message.nested_type {
        describe_message(&scope, nested, lines);
    }
    for enumeration in &message.enum_type {
        describe_enum(&scope, enumeration, lines);
    }
}

fn describe_enum(scope: &str, enumeration: &EnumDescriptorProto, lines: &mut Vec<String>) {
    for value in &enumeration.value {
        lines.push(format!("enum {scope}{}.{} = {}", enumeration.name(), value.name(), value.number()));
    }
}

fn describe_type(field: &FieldDescriptorProto) -> String {
    let label = match (field.label(), field.proto3_optional()) {
        (Label::Repeated, _) => "repeated ",
        (Label::Required, _) => "required ",
        (Label::Optional, true) => "optional ",
        (Label::Optional, false) => "",
    };
    match field.r#type() {
        Type::Message | Type::Enum | Type::Group => format!("{label}{}", local(field.type_name())),
        scalar => format!("{label}{}", scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase()),
    }
}

/// A type's name without this package's.
fn local(type_name: &str) -> &str {
    type_name.strip_prefix(".runtime.v1.").unwrap_or(type_name)
}
