//! Registries that misbehave, or want what Debian's cannot: scripted by the test.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{files, listing, noise};
use nacelle_image::{Credentials, Digest, Endpoint, ErrorKind, ImageStore, Limits, Options};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A request: path and query, and headers in lower case.
struct Asked {
    path: String,
    headers: HashMap<String, String>,
}

/// An answer: status, headers, body, and how much of the body is sent before the connection breaks.
#[derive(Clone)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    sent: Option<usize>,
    stall: bool,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), sent: None, stall: false }
    }

    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

/// A server that answers as `script` says. Returns its address.
async fn serve(script: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let script = Arc::new(script);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let script = script.clone();
            tokio::spawn(async move { answer(stream, &*script).await });
        }
    });
    address
}

async fn answer(mut stream: TcpStream, script: &(dyn Fn(&Asked) -> Answer + Send + Sync)) -> Option<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).await.ok()?;
        if count == 0 {
            return None;
        }
        request.extend_from_slice(&buffer[..count]);
    }
    let text = String::from_utf8(request).ok()?;
    let mut lines = text.lines();
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers =
        lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let answer = script(&Asked { path, headers: headers.collect() });
    let mut head =
        format!("HTTP/1.1 {} x\r\nconnection: close\r\ncontent-length: {}\r\n", answer.status, answer.body.len());
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all((head + "\r\n").as_bytes()).await.ok()?;
    stream.write_all(&answer.body[..answer.sent.unwrap_or(answer.body.len())]).await.ok()?;
    stream.flush().await.ok()?;
    if answer.stall {
        let mut buffer = [0; 1];
        let _ = stream.read(&mut buffer).await;
    }
    Some(())
}

/// The documents of a one-layer image by their paths under `/v2/app/`.
struct Served {
    documents: HashMap<String, (String, Vec<u8>)>,
    layer: Digest,
}

fn image(content: &[u8]) -> Served {
    let archive = files(&[("file", content)]);
    let layer = Digest::of(&archive);
    let config =
        json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer]}}).to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(config.as_bytes()), "size": config.len(),
        },
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": archive.len()}],
    })
    .to_string();
    let manifest_type = "application/vnd.oci.image.manifest.v1+json".to_owned();
    let blob_type = "application/octet-stream".to_owned();
    let documents = HashMap::from([
        ("/v2/app/manifests/latest".to_owned(), (manifest_type, manifest.into_bytes())),
        (format!("/v2/app/blobs/{}", Digest::of(config.as_bytes())), (blob_type.clone(), config.into_bytes())),
        (format!("/v2/app/blobs/{layer}"), (blob_type, archive)),
    ]);
    Served { documents, layer }
}

impl Served {
    fn answer(&self, asked: &Asked) -> Answer {
        match self.documents.get(&asked.path) {
            Some((media_type, body)) => Answer::new(200, body.clone()).with("content-type", media_type),
            None => Answer::new(404, ""),
        }
    }

    fn layer_path(&self) -> String {
        format!("/v2/app/blobs/{}", self.layer)
    }
}

#[tokio::test]
async fn a_token_is_fetched_with_the_credentials_and_renewed() {
    let served = image(b"x");
    let tokens: Arc<Mutex<u32>> = Arc::default();
    let realm: Arc<Mutex<String>> = Arc::default();
    let (count, own) = (tokens.clone(), realm.clone());
    let address = serve(move |asked| {
        if asked.path.starts_with("/token") {
            assert_eq!(asked.path, "/token?service=reg&scope=repository%3Aapp%3Apull");
            if asked.headers.get("authorization").map(String::as_str) != Some("Basic dXNlcjpwYXNz") {
                return Answer::new(401, "");
            }
            *count.lock().unwrap() += 1;
            return Answer::new(200, json!({"token": format!("token-{}", count.lock().unwrap())}).to_string());
        }
        // A token is good for one request, so that the second is met with a challenge again.
        let mut current = count.lock().unwrap();
        let good = format!("Bearer token-{current}");
        if *current % 2 == 1 && asked.headers.get("authorization") == Some(&good) {
            *current += 1;
            return served.answer(asked);
        }
        *current += *current % 2;
        let realm = own.lock().unwrap().clone();
        Answer::new(401, "").with("www-authenticate", format!("Bearer realm=\"{realm}\",service=\"reg\""))
    })
    .await;
    *realm.lock().unwrap() = format!("http://{address}/token");
    let (_directory, store) = common::store();
    let reference = format!("{address}/app");
    let error = store.pull(&reference, None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    let credentials = Credentials::Basic { username: "user".into(), password: "pass".into() };
    store.pull(&reference, Some(credentials), |_| {}).await.unwrap();
    assert!(*tokens.lock().unwrap() >= 5);
}

#[tokio::test]
async fn credentials_do_not_follow_elsewhere() {
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let served = Arc::new(image(b"x"));
    let (log, store_of) = (seen.clone(), served.clone());
    // Another port is another host.
    let storage = serve(move |asked| {
        assert!(!asked.headers.contains_key("authorization"));
        log.lock().unwrap().push(asked.path.clone());
        store_of.answer(asked)
    })
    .await;
    let target = storage.clone();
    let address = serve(move |asked| {
        if asked.headers.get("authorization").map(String::as_str) != Some("Basic dXNlcjpwYXNz") {
            return Answer::new(401, "").with("www-authenticate", "Basic realm=\"x\"");
        }
        if asked.path.contains("/blobs/") {
            return Answer::new(307, "").with("location", format!("http://{target}{}", asked.path));
        }
        served.answer(asked)
    })
    .await;
    let (_directory, store) = common::store();
    let credentials = Credentials::Basic { username: "user".into(), password: "pass".into() };
    store.pull(&format!("{address}/app"), Some(credentials), |_| {}).await.unwrap();
    assert_eq!(seen.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn plain_http_is_not_followed_off_this_host() {
    let address = serve(|asked| Answer::new(302, "").with("location", format!("http://192.0.2.1{}", asked.path))).await;
    let (_directory, store) = common::store();
    let error = store.pull(&format!("{address}/app"), None, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("plain HTTP"), "{error}");
    let challenge = "Bearer realm=\"http://192.0.2.1/token\",service=\"x\"";
    let address = serve(move |_| Answer::new(401, "").with("www-authenticate", challenge)).await;
    let error = store.pull(&format!("{address}/app"), None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert!(error.to_string().contains("does not use HTTPS"), "{error}");
}

#[tokio::test]
async fn a_broken_download_is_resumed() {
    for ranges in [true, false] {
        let served = Arc::new(image(&noise(3, 1 << 20)));
        let asked_for: Arc<Mutex<Vec<Option<String>>>> = Arc::default();
        let (log, scripted) = (asked_for.clone(), served.clone());
        let address = serve(move |asked| {
            let mut answer = scripted.answer(asked);
            if asked.path != scripted.layer_path() {
                return answer;
            }
            let range = asked.headers.get("range").cloned();
            let mut log = log.lock().unwrap();
            log.push(range.clone());
            if let (Some(range), true) = (range, ranges) {
                let begin: usize = range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap();
                let total = answer.body.len();
                answer.body.drain(..begin);
                answer.status = 206;
                answer = answer.with("content-range", format!("bytes {begin}-{}/{total}", total - 1));
            }
            // Twice it breaks in the middle.
            if log.len() <= 2 {
                answer.sent = Some(answer.body.len() / 2);
            }
            answer
        })
        .await;
        let (_directory, store) = common::store();
        store.pull(&format!("{address}/app"), None, |_| {}).await.unwrap();
        let asked_for = asked_for.lock().unwrap();
        assert_eq!(asked_for.len(), 3, "{asked_for:?}");
        assert_eq!(asked_for[0], None);
        assert!(asked_for[2].is_some());
    }
}

#[tokio::test]
async fn a_failing_server_is_asked_again() {
    let served = image(b"x");
    let left = Mutex::new(2);
    let address = serve(move |asked| {
        let mut left = left.lock().unwrap();
        if *left > 0 {
            *left -= 1;
            return Answer::new(503, "");
        }
        served.answer(asked)
    })
    .await;
    let (_directory, store) = common::store();
    store.pull(&format!("{address}/app"), None, |_| {}).await.unwrap();
}

#[tokio::test]
async fn endless_manifests_are_not_taken() {
    let address = serve(|_| Answer::new(200, vec![b' '; 100_000])).await;
    let directory = tempfile::tempdir().unwrap();
    let options = Options { limits: Limits { manifest_bytes: 50_000, ..Limits::default() }, ..Options::default() };
    let store = ImageStore::open_with(directory.path(), options).unwrap();
    let error = store.pull(&format!("{address}/app"), None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
}

#[tokio::test]
async fn a_pull_that_is_dropped_leaves_nothing() {
    let served = Arc::new(image(&noise(5, 2 << 20)));
    let scripted = served.clone();
    let address = serve(move |asked| {
        let mut answer = scripted.answer(asked);
        if asked.path == scripted.layer_path() {
            answer.sent = Some(1 << 20);
            answer.stall = true;
        }
        answer
    })
    .await;
    let (directory, store) = common::store();
    let reference = format!("{address}/app");
    let (begun, mut halfway) = tokio::sync::mpsc::unbounded_channel();
    {
        let progress = move |progress: nacelle_image::Progress| {
            if progress.done > 500_000 {
                let _ = begun.send(());
            }
        };
        let pull = store.pull(&reference, None, progress);
        tokio::select! {
            result = pull => panic!("{result:?}"),
            _ = halfway.recv() => {}
        }
    }
    for _ in 0..100 {
        if listing(directory.path(), "tmp").is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for place in ["tmp", "layers", "images"] {
        assert_eq!(listing(directory.path(), place), [""; 0], "{place}");
    }
}

#[tokio::test]
async fn the_next_endpoint_is_tried() {
    let empty = serve(|_| Answer::new(404, "")).await;
    let served = image(b"x");
    let full = serve(move |asked| served.answer(asked)).await;
    let directory = tempfile::tempdir().unwrap();
    let endpoints = move |host: &str| {
        assert_eq!(host, "registry.test");
        let endpoint = |address: &str| Endpoint { url: format!("http://{address}"), authorities: Vec::new() };
        vec![endpoint(&empty), endpoint(&full)]
    };
    let options = Options { endpoints: Arc::new(endpoints), ..Options::default() };
    let store = ImageStore::open_with(directory.path(), options).unwrap();
    let image = store.pull("registry.test/app", None, |_| {}).await.unwrap();
    assert_eq!(image.repo_tags, ["registry.test/app:latest"]);
}
