//! RuntimeClass handlers whose guests differ.

use std::path::Path;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, pod_config};
use nacelle_tests::daemon::Daemon;
use tonic::{Code, Status};

const HANDLERS: &str = "default_handler = \"small\"\n[handlers.small]\nkind = \"guest\"\nmemory_mib = 144\n";
const LARGE: &str = "[handlers.large]\nkind = \"guest\"\nmemory_mib = 320\nmax_memory_mib = 512\nvcpus = 2\n\
                     scratch_mib = 64\ncloned = false\nannotations = [\"memory_mib\"]\n";

/// Runs a pod by a handler, with these annotations.
async fn run(client: &Client, logs: &Path, handler: &str, annotations: &[(&str, &str)]) -> Result<String, Status> {
    let mut config = pod_config(logs);
    let said = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    config.annotations.extend(said);
    let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.into() };
    Ok(client.runtime.clone().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
}

/// What the machine of a pod was made by.
fn machine(daemon: &Daemon, pod: &str) -> serde_json::Value {
    let path = daemon.path().join("r/pods").join(pod).join("vmm.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Its memory in MiB, its processors, and whether it went on from a saved one.
fn shape(daemon: &Daemon, pod: &str) -> (u64, u64, bool) {
    let machine = machine(daemon, pod);
    let number = |key: &str| machine[key].as_u64().unwrap();
    (number("memory_mib"), number("vcpus"), machine["start"].get("clone").is_some())
}

#[tokio::test]
async fn the_guests_of_a_handler_are_its_own() {
    let mut daemon = Daemon::configured(&format!("{HANDLERS}{LARGE}")).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();

    let status = client.runtime.clone().status(cri::StatusRequest::default()).await.unwrap().into_inner();
    let names: Vec<_> = status.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    assert_eq!(names, ["", "small", "large"], "the default first");
    let error = run(&client, logs.path(), "kata", &[]).await.unwrap_err();
    assert!(error.code() == Code::InvalidArgument && error.message().contains("small, large"), "{error}");

    let small = run(&client, logs.path(), "", &[]).await.unwrap();
    assert_eq!(client.pod_status(&small).await.unwrap().runtime_handler, "small");
    assert_eq!(shape(&daemon, &small), (144, 1, true), "{}", daemon.log());

    // However often: they are not cloned.
    let mut large = Vec::new();
    for _ in 0..2 {
        large.push(run(&client, logs.path(), "large", &[]).await.unwrap());
    }
    for pod in &large {
        assert_eq!(shape(&daemon, pod), (320, 2, false), "{}", daemon.log());
    }
    let pod = large.pop().unwrap();
    let id = client.create(&pod, "busybox", &["sleep", "1000"]).await.unwrap();
    client.start(&id).await.unwrap();
    let seen = client.shell(&id, "nproc; df -m / | tail -n 1 | awk '{print $2}'").await;
    let seen: Vec<u64> = seen.lines().map(|line| line.trim().parse().unwrap()).collect();
    assert!(seen[0] == 2 && (32..=64).contains(&seen[1]), "processors and MiB of the writable disk: {seen:?}");

    // A handler that is taken out of the configuration leaves its pods alone, and makes no more.
    let file = daemon.path().join("config.toml");
    let text = std::fs::read_to_string(&file).unwrap().replace(LARGE, "");
    std::fs::write(file, text).unwrap();
    daemon.kill();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert_eq!(client.shell(&id, "nproc").await.trim(), "2");
    assert_eq!(run(&client, logs.path(), "large", &[]).await.unwrap_err().code(), Code::InvalidArgument);
    for pod in large.iter().chain([&pod, &small]) {
        client.remove_pod(pod).await.unwrap();
    }
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_pod_says_of_its_guest_what_its_handler_lets_it() {
    let mut daemon = Daemon::configured(&format!("{HANDLERS}{LARGE}")).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let refused = [
        ("small", "guest.nacelle/memory_mib", "256", Code::InvalidArgument, "handlers.small.annotations"),
        ("large", "guest.nacelle/vcpus", "4", Code::InvalidArgument, "guest.nacelle/vcpus"),
        ("large", "guest.nacelle/memory_mib", "much", Code::InvalidArgument, "guest.nacelle/memory_mib"),
        ("large", "guest.nacelle/memory_mib", "513", Code::ResourceExhausted, "max_memory_mib"),
    ];
    for (handler, key, value, code, words) in refused {
        let error = run(&client, logs.path(), handler, &[(key, value)]).await.unwrap_err();
        assert!(error.code() == code && error.message().contains(words), "{handler} {key}={value}: {error}");
    }
    let pod = run(&client, logs.path(), "large", &[("guest.nacelle/memory_mib", "448")]).await.unwrap();
    assert_eq!(shape(&daemon, &pod), (448, 2, false));
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}
