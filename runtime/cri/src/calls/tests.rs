//! What the log says of calls on a runtime without pods.

use std::io::Write;
use std::sync::{Arc, Mutex};

use nacelle_proto::runtime::v1::image_service_server::ImageService;
use nacelle_proto::runtime::v1::runtime_service_server::RuntimeService;
use tracing_subscriber::EnvFilter;

use super::*;
use crate::runtime::tests::{images, runtime};

/// Where a test's log goes.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Written {
    /// The lines about calls.
    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().filter(|line| line.contains("nacelle::cri")).map(str::to_owned).collect()
    }
}

/// Logs what a filter lets through, for as long as the guard lives.
fn log(filter: &str) -> (Written, tracing::subscriber::DefaultGuard) {
    let written = Written::default();
    let writer = written.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .finish();
    (written, tracing::subscriber::set_default(subscriber))
}

fn request<T>(request: T) -> tonic::Request<T> {
    tonic::Request::new(request)
}

#[tokio::test]
async fn each_changing_call_is_a_line_and_reading_ones_are_details() {
    let (runtime, _directory) = runtime().await;
    let images = images(&runtime);
    let (written, _guard) = log("info");
    let metadata =
        cri::PodSandboxMetadata { name: "web".into(), namespace: "shop".into(), uid: "u".into(), attempt: 0 };
    // It lacks nothing but a handler.
    let run = cri::RunPodSandboxRequest {
        config: Some(cri::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }),
        runtime_handler: "other".into(),
    };
    RuntimeService::run_pod_sandbox(&runtime, request(run)).await.unwrap_err();
    let stop = cri::StopPodSandboxRequest { pod_sandbox_id: "f00d".into() };
    RuntimeService::stop_pod_sandbox(&runtime, request(stop)).await.unwrap();
    let spec = cri::ImageSpec { image: "no image".into(), ..Default::default() };
    let auth = cri::AuthConfig { username: "u".into(), password: "hunter2".into(), ..Default::default() };
    let pull = cri::PullImageRequest { image: Some(spec), auth: Some(auth), sandbox_config: None };
    ImageService::pull_image(&images, request(pull)).await.unwrap_err();
    RuntimeService::version(&runtime, request(cri::VersionRequest::default())).await.unwrap();
    let lines = written.lines();
    assert_eq!(lines.len(), 3, "{lines:#?}");
    let has = |line: &str, words: &[&str]| assert!(words.iter().all(|word| line.contains(word)), "{line}");
    let refused = "error=\"runtime_handler: no handler";
    has(&lines[0], &["INFO", "RunPodSandbox", "pod=\"shop/web\"", "ms=", "code=InvalidArgument", refused]);
    has(&lines[1], &["INFO", "StopPodSandbox", "sandbox=\"f00d\"", "code=Ok"]);
    assert!(!lines[1].contains("error"), "{}", lines[1]);
    has(&lines[2], &["INFO", "PullImage", "image=\"no image\"", "code=InvalidArgument"]);
    assert!(!lines[2].contains("hunter2"), "{}", lines[2]);

    let (written, _guard) = log("nacelle::cri=debug");
    RuntimeService::version(&runtime, request(cri::VersionRequest::default())).await.unwrap();
    assert!(written.lines()[0].contains("DEBUG") && written.lines()[0].contains("Version"), "{:?}", written.lines());
}

#[tokio::test]
async fn commands_are_named_by_their_program_alone_and_can_be_silenced() {
    let (runtime, _directory) = runtime().await;
    let exec = |container_id: &str| {
        let cmd = ["/bin/login", "--password", "hunter2"].map(str::to_owned).into();
        request(cri::ExecSyncRequest { container_id: container_id.into(), cmd, timeout: 1 })
    };
    let (written, guard) = log("info");
    RuntimeService::exec_sync(&runtime, exec("f00d")).await.unwrap_err();
    let lines = written.lines();
    assert!(lines[0].contains("nacelle::cri::exec: ExecSync"), "{lines:?}");
    assert!(lines[0].contains("program=\"/bin/login\"") && lines[0].contains("code=NotFound"), "{lines:?}");
    assert!(!lines[0].contains("hunter2"), "{lines:?}");
    drop(guard);
    let (written, _guard) = log("info,nacelle::cri::exec=warn");
    RuntimeService::exec_sync(&runtime, exec("f00d")).await.unwrap_err();
    let remove = cri::RemoveContainerRequest { container_id: "f00d".into() };
    RuntimeService::remove_container(&runtime, request(remove)).await.unwrap();
    assert_eq!(written.lines().len(), 1, "{:?}", written.lines());
}

#[tokio::test]
async fn what_a_client_writes_ends_no_line_and_is_cut() {
    let (runtime, _directory) = runtime().await;
    let (written, _guard) = log("info");
    let id = format!("x\nforged line \u{1b}[31m{}", "ü".repeat(100_000));
    let start = cri::StartContainerRequest { container_id: id };
    RuntimeService::start_container(&runtime, request(start)).await.unwrap_err();
    let lines = written.lines();
    assert_eq!(lines.len(), 1);
    assert!(lines[0].contains("forged") && !lines[0].contains('\u{1b}'), "{}", lines[0]);
    assert!(lines[0].len() < 2 * (WORD + ERROR), "{} bytes", lines[0].len());
}

#[tokio::test]
async fn a_call_whose_caller_goes_away_is_logged() {
    let (runtime, _directory) = runtime().await;
    let (written, _guard) = log("info");
    let start = cri::StartContainerRequest { container_id: "f00d".into() };
    drop(Line::begin("start_container", Kind::Change, &start, &runtime.manager));
    let lines = written.lines();
    assert!(lines[0].contains("code=Cancelled") && lines[0].contains("went away"), "{lines:?}");
}
