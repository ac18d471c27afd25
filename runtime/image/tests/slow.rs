//! Registries that give little, slowly or for ever: what they hold up, and for how long.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::noise;
use common::scripted::{Answer, Served, image, serve};
use nacelle_image::{ErrorKind, ImageStore, Options, Pace};
use tempfile::TempDir;

/// A registry that answers for its layer as `change` says.
async fn altered(served: Arc<Served>, change: impl Fn(&mut Answer) + Send + Sync + 'static) -> String {
    serve(move |asked| {
        let mut answer = served.answer(asked);
        if asked.path != served.layer_path() {
            return answer;
        }
        if let Some(range) = asked.headers.get("range") {
            let begin: usize = range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap();
            let total = answer.body.len();
            answer.body.drain(..begin);
            answer.status = 206;
            answer = answer.with("content-range", format!("bytes {begin}-{}/{total}", total - 1));
        }
        change(&mut answer);
        answer
    })
    .await
}

fn store(pace: Pace) -> (TempDir, ImageStore) {
    let directory = tempfile::tempdir().unwrap();
    let options = Options { pace, ..Options::default() };
    let store = ImageStore::open_with(directory.path(), options).unwrap();
    (directory, store)
}

#[tokio::test]
async fn a_byte_for_each_connection_is_no_progress() {
    let connections: Arc<Mutex<u32>> = Arc::default();
    let count = connections.clone();
    let address = altered(Arc::new(image(&noise(1, 1 << 20))), move |answer| {
        *count.lock().unwrap() += 1;
        answer.sent = Some(1);
    })
    .await;
    let (_directory, store) = store(Pace::default());
    let error = store.pull(&format!("{address}/app"), None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("it ended after") || error.to_string().contains("end of file"), "{error}");
    assert_eq!(*connections.lock().unwrap(), 4);
}

#[tokio::test]
async fn a_layer_that_stops_coming_ends_its_pull() {
    let address = altered(Arc::new(image(&noise(2, 1 << 20))), |answer| {
        answer.sent = Some(answer.body.len() / 2);
        answer.stall = true;
    })
    .await;
    let (_directory, store) = store(Pace { progress_timeout: Some(Duration::from_secs(2)), least_rate: 0 });
    let begin = Instant::now();
    let error = store.pull(&format!("{address}/app"), None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("nothing came for 2s"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_manifest_that_trickles_ends_its_pull() {
    let served = image(b"x");
    let address =
        serve(move |asked| Answer { trickle: Some(Duration::from_millis(100)), ..served.answer(asked) }).await;
    let (_directory, store) = store(Pace { progress_timeout: Some(Duration::from_secs(1)), least_rate: 0 });
    let error = store.pull(&format!("{address}/app"), None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("longer than 1s"), "{error}");
}

/// A registry whose layer trickles.
async fn trickling(served: Arc<Served>) -> String {
    altered(served, |answer| answer.trickle = Some(Duration::from_millis(500))).await
}

#[tokio::test]
async fn slow_registries_hold_up_nobody_else() {
    let (_directory, store) = store(Pace::default());
    let mut slow = Vec::new();
    for seed in 0..8 {
        let (store, address) = (store.clone(), trickling(Arc::new(image(&noise(10 + seed, 1 << 20)))).await);
        let (begun, mut halfway) = tokio::sync::mpsc::unbounded_channel();
        slow.push(tokio::spawn(async move {
            let report = move |progress: nacelle_image::Progress| {
                let _ = begun.send(progress.done);
            };
            store.pull(&format!("{address}/app"), None, report).await
        }));
        while halfway.recv().await.unwrap() == 0 {}
    }
    let address = altered(Arc::new(image(&noise(30, 1 << 20))), |_| {}).await;
    let reference = format!("{address}/app");
    let pull = store.pull(&reference, None, |_| {});
    tokio::time::timeout(Duration::from_secs(30), pull).await.unwrap().unwrap();
    assert!(slow.iter().all(|pull| !pull.is_finished()));
    slow.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn a_stranger_who_is_slow_with_a_layer_does_not_keep_it_from_others() {
    let served = Arc::new(image(&noise(40, 1 << 20)));
    let (_directory, store) = store(Pace::default());
    let (stranger, own) = (trickling(served.clone()).await, altered(served, |_| {}).await);
    let (begun, mut halfway) = tokio::sync::mpsc::unbounded_channel();
    let first = {
        let store = store.clone();
        tokio::spawn(async move {
            let report = move |progress: nacelle_image::Progress| {
                let _ = begun.send(progress.done);
            };
            store.pull(&format!("{stranger}/app"), None, report).await
        })
    };
    while halfway.recv().await.unwrap() == 0 {}
    let reference = format!("{own}/app");
    let second = store.pull(&reference, None, |_| {});
    let second = tokio::time::timeout(Duration::from_secs(30), second).await.unwrap().unwrap();
    // And what one has, the other need not wait for.
    let first = tokio::time::timeout(Duration::from_secs(30), first).await.unwrap().unwrap().unwrap();
    assert_eq!(first.id, second.id);
}
