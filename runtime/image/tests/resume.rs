//! What a pull that failed leaves for the next one, and for how long.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use common::scripted::{Served, image, serve};
use common::{Compression, Layout, Registry, disk, files, listing, noise, run};
use nacelle_image::{Digest, ErrorKind, ImageStore, Options};

const SIZE: usize = 3 << 20;

/// A registry that gives half of the layer at first and then nothing, and all that is asked for later. The ranges that
/// it was asked for are in the list.
async fn halting(served: Arc<Served>, asked_for: Arc<Mutex<Vec<u64>>>) -> String {
    serve(move |asked| {
        let mut answer = served.answer(asked);
        if asked.path != served.layer_path() {
            return answer;
        }
        let range = asked.headers.get("range").map(|range| range[6..range.len() - 1].parse().unwrap());
        let begin = range.unwrap_or(0);
        let mut asked_for = asked_for.lock().unwrap();
        asked_for.push(begin);
        if range.is_some() {
            let total = answer.body.len();
            answer.body.drain(..begin as usize);
            answer.status = 206;
            answer = answer.with("content-range", format!("bytes {begin}-{}/{total}", total - 1));
        }
        if asked_for.len() == 1 {
            answer.sent = Some(answer.body.len() / 2);
            answer.stall = true;
        }
        answer
    })
    .await
}

/// Pulls until half of the layer is here, then goes away.
async fn give_up_halfway(store: &ImageStore, reference: &str) {
    let (begun, mut halfway) = tokio::sync::mpsc::unbounded_channel();
    let progress = move |progress: nacelle_image::Progress| {
        if progress.done >= (SIZE / 2) as u64 {
            let _ = begun.send(());
        }
    };
    tokio::select! {
        result = store.pull(reference, None, progress) => panic!("{result:?}"),
        _ = halfway.recv() => {}
    }
}

#[tokio::test]
async fn an_interrupted_layer_is_gone_on_with() {
    for restart in [false, true] {
        let served = Arc::new(image(&noise(1, SIZE)));
        let asked_for: Arc<Mutex<Vec<u64>>> = Arc::default();
        let address = halting(served.clone(), asked_for.clone()).await;
        let (directory, mut store) = common::store();
        let reference = format!("{address}/app");
        give_up_halfway(&store, &reference).await;
        // Its thread has what is under way still to write.
        while !listing(directory.path(), "tmp").is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(listing(directory.path(), "partial"), [served.layer.hex()]);
        assert!(store.usage().unwrap().bytes > (SIZE / 3) as u64, "it is not told");
        if restart {
            drop(store);
            store = ImageStore::open(directory.path()).unwrap();
        }
        let resumed = store.pull(&reference, None, |_| {}).await.unwrap();
        let begin = asked_for.lock().unwrap()[1];
        assert!(begin > (SIZE / 3) as u64, "it began at {begin}");
        assert_eq!(asked_for.lock().unwrap().len(), 2);
        assert_eq!(listing(directory.path(), "partial"), [""; 0]);
        let (_directory, other) = common::store();
        assert!(disk(&resumed) == disk(&other.pull(&reference, None, |_| {}).await.unwrap()));
    }
}

#[tokio::test]
async fn what_was_wrong_with_an_interrupted_layer_does_not_stay() {
    let served = Arc::new(image(&noise(2, SIZE)));
    let asked_for: Arc<Mutex<Vec<u64>>> = Arc::new(Mutex::new(vec![0]));
    let address = halting(served.clone(), asked_for.clone()).await;
    let (directory, store) = common::store();
    // As a stranger may send it, or a crash leave it.
    fs::create_dir(directory.path().join("partial")).unwrap();
    fs::write(directory.path().join("partial").join(served.layer.hex()), vec![0; SIZE / 2]).unwrap();
    store.pull(&format!("{address}/app"), None, |_| {}).await.unwrap();
    assert_eq!(*asked_for.lock().unwrap(), [0, (SIZE / 2) as u64, 0]);
    assert_eq!(listing(directory.path(), "partial"), [""; 0]);
}

/// A store whose pulls have had the first layer when they come to the second.
fn one_by_one(root: &Path) -> ImageStore {
    ImageStore::open_with(root, Options { downloads: 1, ..Options::default() }).unwrap()
}

/// An image whose second layer the registry has lost, and one that is whole.
fn half_and_whole(size: usize) -> (Registry, Digest) {
    let registry = Registry::start();
    let mut layout = Layout::default();
    let layer = |seed| (files(&[("f", &noise(seed, size))]), Compression::Gzip);
    let half = layout.image("half", "amd64", &[layer(3), (files(&[("g", b"lost")]), Compression::Gzip)]);
    registry.push(&layout, "half", "half", &[]);
    layout.image("whole", "amd64", &[layer(4)]);
    registry.push(&layout, "whole", "whole", &[]);
    fs::remove_file(registry.blob(&half.layers[1])).unwrap();
    (registry, half.layers[0])
}

#[tokio::test]
async fn layers_of_a_pull_that_failed_stay_a_day() {
    let (registry, first) = half_and_whole(500_000);
    let directory = tempfile::tempdir().unwrap();
    let mut store = one_by_one(directory.path());
    let downloads = || registry.requests(&format!("/v2/half/blobs/{first}"));
    for restart in [false, true] {
        if restart {
            drop(store);
            store = ImageStore::open(directory.path()).unwrap();
        }
        let error = store.pull(&registry.reference("half"), None, |_| {}).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        let whole = store.pull(&registry.reference("whole"), None, |_| {}).await.unwrap();
        assert_eq!(listing(directory.path(), "layers").len(), 2);
        // What is removed on purpose takes its own with it, and nothing else.
        store.remove(&whole.id).await.unwrap();
        let left = listing(directory.path(), "layers");
        assert_eq!((left.len(), downloads()), (1, 1));
    }
    let record = directory.path().join("layers").join(&listing(directory.path(), "layers")[0]).join("layer.json");
    let yesterday = SystemTime::now() - Duration::from_secs(24 * 3600 + 60);
    File::options().write(true).open(record).unwrap().set_modified(yesterday).unwrap();
    fs::create_dir_all(directory.path().join("partial")).unwrap();
    let old = directory.path().join("partial").join(Digest::of(b"old").hex());
    File::create(&old).unwrap().set_modified(yesterday).unwrap();
    store.pull(&registry.reference("whole"), None, |_| {}).await.unwrap();
    assert_eq!(listing(directory.path(), "layers").len(), 1);
    assert!(!old.exists());
}

#[tokio::test]
async fn what_nobody_needs_is_first_to_go_when_space_is_short() {
    let (registry, _) = half_and_whole(2_500_000);
    let mounted = tempfile::tempdir().unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "none"]).arg(mounted.path()));
    let root = mounted.path().join("images");
    let store = one_by_one(&root);
    let work = async {
        store.pull(&registry.reference("half"), None, |_| {}).await.unwrap_err();
        let kept = listing(&root, "layers").len();
        let whole = store.pull(&registry.reference("whole"), None, |_| {}).await;
        (kept, whole.map(|_| listing(&root, "layers").len()))
    };
    let (kept, left) = work.await;
    drop(store);
    run(Command::new("umount").arg("--lazy").arg(mounted.path()));
    assert_eq!(kept, 1);
    assert_eq!(left.unwrap(), 1);
}
