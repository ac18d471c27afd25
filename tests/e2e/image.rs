//! Images: from a real registry into a guest, and what a bad one gets.

use nacelle_proto::runtime::v1 as cri;
use tonic::Code;

use nacelle_tests::client::{Client, container_config, image, log_lines};
use nacelle_tests::daemon::Daemon;

async fn status(client: &Client, name: &str) -> Option<cri::Image> {
    let spec = cri::ImageSpec { image: name.into(), ..Default::default() };
    let request = cri::ImageStatusRequest { image: Some(spec), verbose: false };
    client.images.clone().image_status(request).await.unwrap().into_inner().image
}

#[tokio::test]
async fn an_image_is_pulled_listed_and_removed() {
    let daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    assert!(status(&client, &image("busybox")).await.is_none());
    let id = client.pull("busybox").await.unwrap();
    let found = status(&client, &image("busybox")).await.unwrap();
    assert_eq!(found.id, id);
    assert!(found.size > 100_000, "{}", found.size);
    assert_eq!(found.repo_tags, [format!("{}:latest", image("busybox"))]);
    assert_eq!(found.repo_digests.len(), 1);
    for name in [&id, &found.repo_digests[0], &found.repo_tags[0], &id["sha256:".len()..][..12].to_owned()] {
        assert_eq!(status(&client, name).await.unwrap().id, id, "{name}");
    }
    let usage = client.images.clone().image_fs_info(cri::ImageFsInfoRequest {}).await.unwrap().into_inner();
    assert!(usage.image_filesystems[0].used_bytes.unwrap().value > 100_000);
    assert_eq!(usage.image_filesystems[0].fs_id, usage.container_filesystems[0].fs_id, "both are on one disk");
    let spec = cri::ImageSpec { image: id.clone(), ..Default::default() };
    let request = cri::RemoveImageRequest { image: Some(spec) };
    client.images.clone().remove_image(request.clone()).await.unwrap();
    client.images.clone().remove_image(request).await.expect("removing again is no error");
    assert!(status(&client, &image("busybox")).await.is_none());
    let listed = client.images.clone().list_images(cri::ListImagesRequest::default()).await.unwrap();
    assert_eq!(listed.into_inner().images, []);
}

#[tokio::test]
async fn every_kind_of_file_in_every_layer_arrives_in_the_guest() {
    let client = Client::node().await;
    let (lines, code) = client.run_once("layers", &[]).await.unwrap();
    assert_eq!(code, 0, "{lines:#?}");
    assert!(lines.last().unwrap().1.ends_with("passed, 0 failed"), "{lines:#?}");
}

#[tokio::test]
async fn other_media_types_and_indexes_are_understood() {
    let client = Client::node().await;
    for name in ["busybox-docker", "busybox-multi"] {
        let (lines, code) = client.run_once(name, &["echo", "hello"]).await.unwrap();
        assert_eq!((lines, code), (vec![("stdout".into(), "hello".into())], 0), "{name}");
    }
}

#[tokio::test]
async fn a_hostile_image_is_refused_and_leaves_nothing() {
    let daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    let hostile = [
        "hostile-config-digest",
        "hostile-diff-id",
        "hostile-digest",
        "hostile-garbage",
        "hostile-hardlink",
        "hostile-missing",
        "hostile-short",
        "hostile-truncated",
        "hostile-truncated-tar",
        "hostile-whiteout",
    ];
    for name in hostile {
        let error = client.pull(name).await.expect_err(name);
        assert!(error.message().len() > 20, "{name}: {error}");
        assert_ne!(error.code(), Code::Ok);
        assert!(status(&client, &image(name)).await.is_none(), "{name}");
    }
    assert!(!std::path::Path::new("/tmp/nacelle-escaped").exists());
    // Sound layers of a refused image stay for a day; halves do not.
    let left = walk(&daemon.path().join("root/images/tmp"));
    assert!(left.is_empty(), "{left:?}");
    // The daemon is none the worse.
    client.pull("busybox").await.unwrap();
}

#[tokio::test]
async fn names_are_within_the_image_however_they_are_written() {
    let client = Client::node().await;
    let (lines, code) = client.run_once("names", &[]).await.unwrap();
    assert_eq!((lines, code), (vec![("stdout".into(), "fine".into())], 0));
    for escaped in ["/tmp/nacelle-escaped", "/tmp/nacelle-escaped-too"] {
        assert!(!std::path::Path::new(escaped).exists(), "{escaped}");
    }
}

/// Databases declare where their data is, and are run with a root that cannot be written to.
#[tokio::test]
async fn an_images_volumes_can_be_written_to_under_a_read_only_root() {
    let client = Client::node().await;
    client.pull("volumes").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let script = "set -e; id -u; stat -c %u:%g /data /data/content; cat /data/content; echo; \
        touch /data/x /not/there/x /link/linked/x; ls /real/linked; touch /x 2>/dev/null || echo read-only";
    let run = async |change: &dyn Fn(&mut cri::ContainerConfig)| {
        let mut config = container_config("volumes", &["sh", "-c", script]);
        change(&mut config);
        let container = client.create_as(&pod, config).await.unwrap();
        client.start(&container).await.unwrap();
        let status = client.wait_exit(&container).await.unwrap();
        let lines = log_lines(&status.log_path).unwrap();
        (lines.into_iter().map(|(_, line)| line).collect::<Vec<_>>(), status.exit_code)
    };
    let read_only = |config: &mut cri::ContainerConfig| {
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().readonly_rootfs = true;
    };
    let expected = ["0", "1234:2345", "1234:2345", "content", "x", "read-only"].map(str::to_owned).to_vec();
    assert_eq!(run(&read_only).await, (expected.clone(), 0));
    let (lines, code) = run(&|_| ()).await;
    assert_eq!((&lines[..], code), (&expected[..5], 0));
    // A number is a number, whatever the image calls it.
    let numbered = |config: &mut cri::ContainerConfig| {
        let context = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        context.run_as_user = Some(cri::Int64Value { value: 1000 });
    };
    assert_eq!(run(&numbered).await.0.first().map(String::as_str), Some("1000"));
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn an_unreachable_registry_and_an_unknown_image_are_named() {
    let client = Client::node().await;
    let error = client.pull("no-such-image").await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    assert!(error.message().contains("no-such-image"), "{}", error.message());
    let spec = cri::ImageSpec { image: "127.0.0.1:1/busybox".into(), ..Default::default() };
    let request = cri::PullImageRequest { image: Some(spec), ..Default::default() };
    let error = client.images.clone().pull_image(request).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert!(error.message().contains("127.0.0.1:1"), "{}", error.message());
}

fn walk(directory: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        found.push(entry.path().display().to_string());
        found.extend(walk(&entry.path()));
    }
    found
}
