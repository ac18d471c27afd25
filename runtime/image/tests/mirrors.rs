//! Mirrors as their directories configure them, with a real registry behind and scripted ones before it.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use common::scripted::{Answer, image, serve};
use common::{Compression, Layout, Registry, Tls, files, run};
use nacelle_image::{Credentials, ErrorKind, ImageStore, Login, Mirrors, Options};
use serde_json::json;
use tempfile::TempDir;

/// Nobody listens here.
const DEAD: &str = "http://127.0.0.1:1";

/// A store, and the directory in which its registries are configured.
struct Site {
    store: ImageStore,
    certs: TempDir,
    _directory: TempDir,
}

impl Site {
    fn new() -> Self {
        let (certs, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mirrors = Mirrors::new(vec![certs.path().into()]);
        let options = Options { endpoints: Arc::new(move |host| mirrors.endpoints(host)), ..Options::default() };
        let store = ImageStore::open_with(directory.path(), options).unwrap();
        Self { store, certs, _directory: directory }
    }

    fn configure(&self, host: &str, text: &str) {
        let directory = self.certs.path().join(host);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("hosts.toml"), text).unwrap();
    }
}

fn push(registry: &Registry, name: &str, content: &[u8]) -> common::Pushed {
    let mut layout = Layout::default();
    let pushed = layout.image("app", "amd64", &[(files(&[("f", content)]), Compression::Gzip)]);
    registry.push(&layout, "app", name, &[]);
    pushed
}

#[tokio::test]
async fn docker_hub_is_had_from_a_mirror_under_its_own_names() {
    let registry = Registry::start();
    let pushed = push(&registry, "library/busybox", b"x");
    let site = Site::new();
    site.configure("docker.io", &format!("server = \"{DEAD}\"\n[host.\"http://{}\"]\n", registry.address));
    let image = site.store.pull("busybox", None, |_| {}).await.unwrap();
    assert_eq!(image.id, pushed.config.to_string());
    assert_eq!(image.repo_tags, ["docker.io/library/busybox:latest"]);
    let digest = format!("docker.io/library/busybox@{}", pushed.manifest);
    assert_eq!(image.repo_digests, [digest.as_str()]);
    assert!(registry.requests("/v2/library/busybox/manifests/latest?ns=docker.io") > 0);
    site.store.remove(&image.id).await.unwrap();
    // By digest, under a name with both, and from the default directory.
    fs::rename(site.certs.path().join("docker.io"), site.certs.path().join("_default")).unwrap();
    let image = site.store.pull(&format!("busybox:1@{}", pushed.manifest), None, |_| {}).await.unwrap();
    assert_eq!((image.repo_tags.len(), image.repo_digests), (0, vec![digest]));
}

#[tokio::test]
async fn each_endpoint_is_tried_in_order_and_named_with_its_reason() {
    let registry = Registry::start();
    let site = Site::new();
    let dead_and_empty =
        format!("server = \"http://127.0.0.1:2\"\n[host.\"{DEAD}\"]\n[host.\"http://{}\"]\n", registry.address);
    site.configure("registry.test_5000_", &dead_and_empty);
    let error = site.store.pull("registry.test:5000/app:1", None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let message = error.to_string();
    let places = ["127.0.0.1:1:", &registry.address, "does not exist", "127.0.0.1:2:", "refused"];
    for words in places {
        assert!(message.contains(words), "{words}: {message}");
    }
    assert!(message.find(DEAD) < message.find(&registry.address), "{message}");
    // A change counts from the next pull on: the image is there now, behind the dead mirror.
    push(&registry, "app:1", b"x");
    site.store.pull("registry.test:5000/app:1", None, |_| {}).await.unwrap();
    site.configure("registry.test_5000_", "server = 5");
    let error = site.store.pull("registry.test:5000/app:1", None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    assert!(error.to_string().contains("registry.test_5000_/hosts.toml"), "{error}");
}

#[tokio::test]
async fn credentials_reach_the_server_they_are_for() {
    let registry = Registry::start_protected();
    push(&registry, "app", b"x");
    let site = Site::new();
    site.configure("registry.test", &format!("server = \"{DEAD}\"\n[host.\"http://{}\"]\n", registry.address));
    let credentials = Credentials::Basic { username: "user".into(), password: "secret".into() };
    let login = |server: &str| Some(Login { credentials: credentials.clone(), server: Some(server.into()) });
    for login in [None, login("registry.test"), login("https://elsewhere.test")] {
        let error = site.store.pull("registry.test/app", login, |_| {}).await.unwrap_err();
        assert!(error.to_string().contains("denies access"), "{error}");
    }
    site.store.pull("registry.test/app", login(&registry.address), |_| {}).await.unwrap();
    site.store.pull("registry.test/app", Some(credentials.clone().into()), |_| {}).await.unwrap();
}

/// A certificate for 127.0.0.1 that is its own authority, and its key.
fn certificate(directory: &Path, name: &str) {
    run(Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", &format!("/CN={name}"), "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout"])
        .arg(directory.join(format!("{name}.key")))
        .arg("-out")
        .arg(directory.join(format!("{name}.cert"))));
}

#[tokio::test]
async fn certificates_of_both_sides_are_those_of_the_directory() {
    let tls = tempfile::tempdir().unwrap();
    for name in ["server", "client"] {
        certificate(tls.path(), name);
    }
    let path = |name: &str| tls.path().join(name);
    let server = Tls { certificate: path("server.cert"), key: path("server.key"), clients: Some(path("client.cert")) };
    let plain = Registry::start();
    push(&plain, "app", b"x");
    // skopeo has no certificate to show: the storage is filled by another registry.
    let registry = Registry::start_with(false, Some(&server));
    fs::remove_dir_all(registry.directory.path().join("storage")).unwrap();
    run(Command::new("cp").arg("-a").arg(plain.directory.path().join("storage")).arg(registry.directory.path()));

    let site = Site::new();
    let pull = async |settings: &str| {
        site.configure("registry.test", &format!("server = \"https://{}\"\n{settings}\n", registry.address));
        for name in ["server.cert", "client.cert", "client.key"] {
            fs::copy(path(name), site.certs.path().join("registry.test").join(name)).unwrap();
        }
        site.store.pull("registry.test/app", None, |_| {}).await
    };
    assert!(pull("").await.is_err());
    assert!(pull("ca = \"server.cert\"").await.is_err());
    let pair = "client = [[\"client.cert\", \"client.key\"]]";
    assert!(pull(pair).await.is_err());
    pull(&format!("ca = [\"server.cert\"]\n{pair}")).await.unwrap();
    pull(&format!("skip_verify = true\n{pair}")).await.unwrap();
}

#[tokio::test]
async fn what_a_mirror_lacks_comes_from_the_next() {
    let served = Arc::new(image(b"x"));
    let (half, whole) = (served.clone(), served.clone());
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = seen.clone();
    // Knows the manifest, but not the layer.
    let mirror = serve(move |asked| {
        assert!(asked.path.ends_with("?ns=registry.test"), "{}", asked.path);
        if asked.path.contains(&half.layer_path()) { Answer::new(404, "") } else { half.answer(asked) }
    })
    .await;
    let server = serve(move |asked| {
        log.lock().unwrap().push(asked.path.clone());
        whole.answer(asked)
    })
    .await;
    let site = Site::new();
    site.configure("registry.test", &format!("server = \"http://{server}\"\n[host.\"http://{mirror}\"]\n"));
    site.store.pull("registry.test/app", None, |_| {}).await.unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.iter().any(|path| path.contains(&served.layer_path())), "{seen:?}");
    assert!(!seen.iter().any(|path| path.contains("/manifests/")), "{seen:?}");
}

#[tokio::test]
async fn a_mirror_that_may_not_resolve_only_delivers() {
    let served = Arc::new(image(b"x"));
    let (content, names) = (served.clone(), served.clone());
    let mirror = serve(move |asked| {
        assert!(!asked.path.contains("/manifests/"), "{}", asked.path);
        content.answer(asked)
    })
    .await;
    let server = serve(move |asked| {
        assert!(asked.path.contains("/manifests/"), "{}", asked.path);
        names.answer(asked)
    })
    .await;
    let site = Site::new();
    let text = format!("server = \"http://{server}\"\n[host.\"http://{mirror}\"]\ncapabilities = [\"pull\"]\n");
    site.configure("registry.test", &text);
    site.store.pull("registry.test/app", None, |_| {}).await.unwrap();
}

#[tokio::test]
async fn headers_and_another_path_are_the_mirrors_own() {
    let served = Arc::new(image(b"x"));
    let storage_of = served.clone();
    let storage = serve(move |asked| {
        assert!(!asked.headers.contains_key("x-key"));
        storage_of.answer(asked)
    })
    .await;
    let mirror = serve(move |asked| {
        assert_eq!(asked.headers.get("x-key").map(String::as_str), Some("value"));
        let path = asked.path.strip_prefix("/cache/hub/").unwrap().split('?').next().unwrap().to_owned();
        Answer::new(307, "").with("location", format!("http://{storage}/v2/{path}"))
    })
    .await;
    let site = Site::new();
    let host = format!("http://{mirror}/cache/hub");
    let text = format!(
        "server = \"{DEAD}\"\n[host.\"{host}\"]\noverride_path = true\n[host.\"{host}\".header]\nx-key = \"value\"\n"
    );
    site.configure("registry.test", &text);
    site.store.pull("registry.test/app", None, |_| {}).await.unwrap();
}

#[tokio::test]
async fn an_identity_token_is_exchanged_for_a_token() {
    let served = Arc::new(image(b"x"));
    let realm: Arc<Mutex<String>> = Arc::default();
    let own = realm.clone();
    let address = serve(move |asked| {
        if asked.path == "/token" {
            assert_eq!(asked.method, "POST");
            return Answer::new(200, json!({"access_token": "good"}).to_string());
        }
        if asked.headers.get("authorization").map(String::as_str) == Some("Bearer good") {
            return served.answer(asked);
        }
        let realm = own.lock().unwrap().clone();
        Answer::new(401, "").with("www-authenticate", format!("Bearer realm=\"{realm}\",service=\"reg\""))
    })
    .await;
    *realm.lock().unwrap() = format!("http://{address}/token");
    let site = Site::new();
    let login = Login::from(Credentials::Refresh { token: "identity".into() });
    site.store.pull(&format!("{address}/app"), Some(login), |_| {}).await.unwrap();
}
