//! What registries answer, and what is made of it: their words, their waits, and where they lead.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use common::scripted::{Answer, image, serve};
use common::{Compression, Layout, Registry, Tls, files, run};
use nacelle_image::{Credentials, ErrorKind};
use serde_json::json;

#[tokio::test]
async fn a_registry_says_itself_what_is_wrong() {
    let said = |code: &str, message: &str| json!({"errors": [{"code": code, "message": message}]}).to_string();
    let cases = [
        (401, said("UNAUTHORIZED", "authentication required"), "authentication required", ErrorKind::Unauthorized),
        (403, "Your IP is not on the allow list\n".to_owned(), "not on the allow list", ErrorKind::Unauthorized),
        (404, said("NAME_UNKNOWN", "repository was archived"), "repository was archived", ErrorKind::NotFound),
        (418, said("TEAPOT", "short and stout"), "short and stout", ErrorKind::Unavailable),
        (429, said("TOOMANYREQUESTS", "You have reached your pull rate limit"), "rate limit", ErrorKind::Unavailable),
        (503, said("UNAVAILABLE", "maintenance until noon"), "maintenance until noon", ErrorKind::Unavailable),
    ];
    let (_directory, store) = common::store();
    for (status, body, words, kind) in cases {
        // Longer than anybody waits, so that it is asked once.
        let asked: Arc<Mutex<u32>> = Arc::default();
        let count = asked.clone();
        let address = serve(move |_| {
            *count.lock().unwrap() += 1;
            let answer = Answer::new(status, body.clone()).with("retry-after", "3600");
            if status == 401 { answer.with("www-authenticate", "Basic realm=\"x\"") } else { answer }
        })
        .await;
        let wrong = Credentials::Basic { username: "user".into(), password: "guess".into() };
        let error = store.pull(&format!("{address}/app"), Some(wrong.into()), |_| {}).await.unwrap_err();
        let message = error.to_string();
        assert_eq!(error.kind(), kind, "{message}");
        assert!(message.contains(words) && message.contains(&status.to_string()), "{message}");
        assert!(!message.contains("check the registry's name"), "{message}");
        assert!(status < 429 || message.contains("3600 s"), "{message}");
        assert_eq!(*asked.lock().unwrap(), if status == 401 { 2 } else { 1 }, "{message}");
    }
}

#[tokio::test]
async fn a_registry_is_left_alone_as_long_as_it_wants() {
    let served = image(b"x");
    let first = Mutex::new(None::<Instant>);
    let address = serve(move |asked| {
        let mut first = first.lock().unwrap();
        match *first {
            None => {
                *first = Some(Instant::now());
                Answer::new(429, "").with("retry-after", "2")
            }
            Some(begin) if begin.elapsed().as_millis() < 1990 => Answer::new(400, "too early"),
            Some(_) => served.answer(asked),
        }
    })
    .await;
    let (_directory, store) = common::store();
    store.pull(&format!("{address}/app"), None, |_| {}).await.unwrap();
}

#[tokio::test]
async fn a_redirect_that_wants_a_token_gets_one_without_credentials() {
    let served = Arc::new(image(b"x"));
    let behind = served.clone();
    let own: Arc<Mutex<String>> = Arc::default();
    let address_of = own.clone();
    // As a registry of many regions has it: each is one of its own, and has a token server.
    let region = serve(move |asked| {
        let authorization = asked.headers.get("authorization").map(String::as_str);
        if asked.path.starts_with("/token") {
            assert_eq!(authorization, None, "credentials went elsewhere");
            return Answer::new(200, json!({"token": "regional"}).to_string());
        }
        assert_ne!(authorization, Some("Basic dXNlcjpwYXNz"), "credentials went elsewhere");
        if authorization == Some("Bearer regional") {
            return behind.answer(asked);
        }
        let realm = address_of.lock().unwrap().clone();
        Answer::new(401, "").with("www-authenticate", format!("Bearer realm=\"http://{realm}/token\",service=\"r\""))
    })
    .await;
    own.lock().unwrap().clone_from(&region);
    let front = serve(move |asked| {
        if asked.headers.get("authorization").map(String::as_str) != Some("Basic dXNlcjpwYXNz") {
            return Answer::new(401, "").with("www-authenticate", "Basic realm=\"x\"");
        }
        Answer::new(307, "").with("location", format!("http://{region}{}", asked.path))
    })
    .await;
    let (_directory, store) = common::store();
    let credentials = Credentials::Basic { username: "user".into(), password: "pass".into() };
    store.pull(&format!("{front}/app"), Some(credentials.into()), |_| {}).await.unwrap();
}

#[tokio::test]
async fn a_redirect_that_wants_a_password_does_not_get_it() {
    let elsewhere = serve(|asked| {
        assert!(!asked.headers.contains_key("authorization"));
        Answer::new(401, "").with("www-authenticate", "Basic realm=\"x\"")
    })
    .await;
    let front =
        serve(move |asked| Answer::new(307, "").with("location", format!("http://{elsewhere}{}", asked.path))).await;
    let (_directory, store) = common::store();
    let credentials = Credentials::Basic { username: "user".into(), password: "pass".into() };
    let error = store.pull(&format!("{front}/app"), Some(credentials.into()), |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
}

#[tokio::test]
async fn tls_on_loopback_is_spoken_and_verified_without_being_configured() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    run(Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=registry.test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout"])
        .arg(path("key"))
        .arg("-out")
        .arg(path("certificate")));
    let tls = Tls { certificate: path("certificate"), key: path("key"), clients: None };
    let registry = Registry::start_with(false, Some(&tls));
    let (_directory, store) = common::store();
    let error = store.pull(&registry.reference("app"), None, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    let log = fs::read_to_string(registry.directory.path().join("log")).unwrap();
    assert!(!log.contains("GET /v2/app"), "it was asked without its certificate being verified: {log}");

    // And plain HTTP where that is all there is: a registry that says so, and one that hangs up.
    let plain = Registry::start();
    let mut layout = Layout::default();
    layout.image("app", "amd64", &[(files(&[("f", b"x")]), Compression::Gzip)]);
    plain.push(&layout, "app", "app", &[]);
    store.pull(&plain.reference("app"), None, |_| {}).await.unwrap();
    let served = image(b"x");
    let address = serve(move |asked| served.answer(asked)).await;
    store.pull(&format!("{address}/app"), None, |_| {}).await.unwrap();
}
