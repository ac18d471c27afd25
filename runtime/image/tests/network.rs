//! Registries that misbehave, or want what Debian's cannot: scripted by the test.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::scripted::{Answer, image, serve};
use common::{listing, noise};
use nacelle_image::{Credentials, Endpoint, ErrorKind, ImageStore, Limits, Options};
use serde_json::json;

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
    store.pull(&reference, Some(credentials.into()), |_| {}).await.unwrap();
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
    store.pull(&format!("{address}/app"), Some(credentials.into()), |_| {}).await.unwrap();
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
        let endpoint = |address: &str| Endpoint::new(format!("http://{address}"));
        Ok(vec![endpoint(&empty), endpoint(&full)])
    };
    let options = Options { endpoints: Arc::new(endpoints), ..Options::default() };
    let store = ImageStore::open_with(directory.path(), options).unwrap();
    let image = store.pull("registry.test/app", None, |_| {}).await.unwrap();
    assert_eq!(image.repo_tags, ["registry.test/app:latest"]);
}
