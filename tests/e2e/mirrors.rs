//! Registries that are had from elsewhere, as `certs.d` says.

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, image};
use nacelle_tests::daemon::Daemon;

async fn pull(client: &Client, name: &str) -> Result<String, tonic::Status> {
    let spec = cri::ImageSpec { image: name.into(), ..Default::default() };
    let request = cri::PullImageRequest { image: Some(spec), ..Default::default() };
    client.images.clone().pull_image(request).await.map(|answer| answer.into_inner().image_ref)
}

async fn status(client: &Client, name: &str) -> cri::ImageStatusResponse {
    let spec = cri::ImageSpec { image: name.into(), ..Default::default() };
    let request = cri::ImageStatusRequest { image: Some(spec), verbose: true };
    client.images.clone().image_status(request).await.unwrap().into_inner()
}

#[tokio::test]
async fn an_image_of_an_unreachable_registry_comes_from_its_mirror_and_is_one_with_the_mirrors_own() {
    let certs = tempfile::tempdir().unwrap();
    let extra = format!(
        "[registry]\nconfig_path = [{:?}]\n[images]\npinned = [\"registry.example/busybox\"]\n",
        certs.path().display().to_string()
    );
    let daemon = Daemon::start(&extra).await.unwrap();
    let client = daemon.client().await;
    let configure = |mirror: &str| {
        let directory = certs.path().join("registry.example");
        std::fs::create_dir_all(&directory).unwrap();
        let text = format!("server = \"http://127.0.0.1:1\"\n[host.\"http://{mirror}\"]\n");
        std::fs::write(directory.join("hosts.toml"), text).unwrap();
    };
    configure("127.0.0.1:2");
    let error = pull(&client, "registry.example/busybox").await.unwrap_err();
    for words in ["registry.example/busybox:latest", "http://127.0.0.1:2", "http://127.0.0.1:1", "refused"] {
        assert!(error.message().contains(words), "{words}: {}", error.message());
    }
    // The running daemon takes the change.
    let own = image("busybox");
    let (registry, _) = own.rsplit_once('/').unwrap();
    configure(registry);
    let id = pull(&client, "registry.example/busybox").await.unwrap();
    assert_eq!(pull(&client, &own).await.unwrap(), id, "one id across registries");
    let found = status(&client, &id).await;
    let pulled = found.image.unwrap();
    assert_eq!(pulled.repo_tags, [format!("{own}:latest"), "registry.example/busybox:latest".into()]);
    assert_eq!(pulled.repo_digests.len(), 2);
    assert!(pulled.pinned);
    assert!(found.info["info"].contains("\"imageSpec\""), "{:?}", found.info);
    // By digest, too; and removing one name removes all.
    let by_digest = pulled.repo_digests.iter().find(|name| name.starts_with("registry.example")).unwrap();
    assert_eq!(pull(&client, by_digest).await.unwrap(), id);
    let spec = cri::ImageSpec { image: "registry.example/busybox:latest".into(), ..Default::default() };
    client.images.clone().remove_image(cri::RemoveImageRequest { image: Some(spec) }).await.unwrap();
    assert!(status(&client, &own).await.image.is_none());
}
