//! Images that verifiers are asked about.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use common::scripted::{image, serve};
use nacelle_image::{ErrorKind, ImageStore, Options, Verifiers};

// One test: a script that another thread's child has open for writing cannot be started.
#[tokio::test]
async fn verifiers_decide_what_is_pulled() {
    let served = image(b"x");
    let manifest = served.documents["/v2/app/manifests/latest"].1.clone();
    let asked: std::sync::Arc<std::sync::Mutex<Vec<String>>> = std::sync::Arc::default();
    let log = asked.clone();
    let address = serve(move |asked| {
        log.lock().unwrap().push(asked.path.clone());
        served.answer(asked)
    })
    .await;
    let reference = format!("{address}/app:latest");
    let (bin, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let verifier = |name: &str, script: &str| {
        let path = bin.path().join(name);
        fs::write(&path, format!("#!/bin/sh\ncd {}\n{script}\n", out.path().display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    let pull = async |bin_dir: &std::path::Path, max_verifiers: Option<usize>| {
        let directory = tempfile::tempdir().unwrap();
        let verifiers =
            Verifiers { bin_dir: bin_dir.to_owned(), max_verifiers, per_verifier_timeout: Duration::from_secs(5) };
        let options = Options { verifiers: Some(verifiers), ..Options::default() };
        let store = ImageStore::open_with(directory.path(), options).unwrap();
        let first = store.pull(&reference, None, |_| {}).await;
        if first.is_ok() {
            // What is here is judged again, for the judgement may have changed.
            fs::remove_file(out.path().join("arguments")).ok();
            store.pull(&reference, None, |_| {}).await.unwrap();
        }
        first
    };
    pull(bin.path(), None).await.unwrap();
    pull(&bin.path().join("missing"), None).await.unwrap();

    verifier("10-allows", "echo \"$@\" > arguments; cat > input");
    pull(bin.path(), None).await.unwrap();
    let digest = nacelle_image::Digest::of(&manifest);
    let arguments = fs::read_to_string(out.path().join("arguments")).unwrap();
    let expected =
        format!("-name {reference} -digest {digest} -stdin-media-type application/vnd.oci.descriptor.v1+json\n");
    assert_eq!(arguments, expected);
    let input: serde_json::Value = serde_json::from_slice(&fs::read(out.path().join("input")).unwrap()).unwrap();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    assert_eq!(input, serde_json::json!({"mediaType": media_type, "digest": digest, "size": manifest.len()}));

    let denies = verifier("20-denies", "echo 'no signature of ours'; echo details >&2; exit 3");
    asked.lock().unwrap().clear();
    let error = pull(bin.path(), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("20-denies: no signature of ours"), "{error}");
    assert!(!asked.lock().unwrap().iter().any(|path| path.contains("/blobs/")), "it was fetched all the same");
    // Only so many are asked.
    pull(bin.path(), Some(1)).await.unwrap();
    fs::remove_file(denies).unwrap();

    let slow = verifier("30-slow", "sleep 1000 & echo $! > child; wait");
    let begin = Instant::now();
    let error = pull(bin.path(), None).await.unwrap_err();
    assert!(error.to_string().contains("30-slow: it took longer than 5s"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(60));
    let child = fs::read_to_string(out.path().join("child")).unwrap();
    let state = fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "what it has started goes on: {state}");
    fs::remove_file(slow).unwrap();

    let broken = verifier("40-broken", "");
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o644)).unwrap();
    let error = pull(bin.path(), None).await.unwrap_err();
    assert!(error.to_string().contains("40-broken"), "{error}");
    fs::remove_file(broken).unwrap();
    let error = pull(&bin.path().join("10-allows"), None).await.unwrap_err();
    assert!(error.to_string().contains("cannot be listed"), "{error}");
}
