//! What the store keeps: what it cannot read now, what another version wrote, and what others put there.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use common::filled::{change, contents, filled, ids, parts, pull};
use common::listing;
use nacelle_image::ImageStore;

#[tokio::test]
async fn what_cannot_be_read_now_is_kept_and_found_again() {
    let (registry, directory, images) = filled().await;
    let root = directory.path();
    let [image, layer] = [parts(&images[0])[0].join("image.json"), parts(&images[0])[2].join("layer.json")];
    let shared = parts(&images[0])[1].join("layer.json");
    assert!(parts(&images[1]).contains(&shared.parent().unwrap().to_owned()), "the test's images share no layer");
    let away = root.join("away");
    for (file, remaining) in [(image, &images[1..]), (layer, &images[1..]), (shared, &images[..0])] {
        // Reading a directory fails as a broken disk does.
        fs::rename(&file, &away).unwrap();
        fs::create_dir(&file).unwrap();
        let store = ImageStore::open(root).unwrap();
        assert_eq!(ids(&store.list()), ids(remaining), "{file:?}");
        // Also with nothing left that needs its layers, as far as one can see.
        for image in remaining {
            store.remove(&image.id).await.unwrap();
        }
        assert_eq!(listing(root, "layers").len(), 3, "{file:?}");
        fs::remove_dir(&file).unwrap();
        fs::rename(&away, &file).unwrap();
        change(&store).await;
        assert_eq!(ids(&store.list()), ids(&images[..images.len() - remaining.len()]), "{file:?}");
        if !remaining.is_empty() {
            pull(&store, &registry, "one").await;
            pull(&store, &registry, "two").await;
        }
        assert_eq!(store.list().len(), images.len());
    }
}

#[tokio::test]
async fn what_can_be_read_again_is_found_although_nothing_changes() {
    let (_registry, directory, images) = filled().await;
    let (place, away) = (directory.path().join("layers"), directory.path().join("away"));
    fs::rename(&place, &away).unwrap();
    File::create(&place).unwrap();
    let store = ImageStore::open(directory.path()).unwrap();
    assert_eq!(store.list(), []);
    fs::remove_file(&place).unwrap();
    fs::rename(&away, &place).unwrap();
    let found = async {
        while store.list() != images {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), found).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_read_now_is_pulled_anew_beside_it() {
    let (registry, directory, images) = filled().await;
    let record = parts(&images[0])[1].join("layer.json");
    fs::rename(&record, directory.path().join("away")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &record, 0o600.into()).unwrap();
    let store = ImageStore::open(directory.path()).unwrap();
    assert_eq!(store.list(), []);
    let again = [pull(&store, &registry, "one").await, pull(&store, &registry, "two").await];
    assert_eq!(store.list().len(), 2);
    for image in &again {
        assert!(common::disk(image) == common::disk(images.iter().find(|old| old.id == image.id).unwrap()));
        assert!(!parts(image).contains(&record.parent().unwrap().to_owned()));
    }
    drop(store);
    // It was not broken after all: one of the two is enough.
    fs::remove_file(&record).unwrap();
    fs::rename(directory.path().join("away"), &record).unwrap();
    let store = ImageStore::open(directory.path()).unwrap();
    assert_eq!(store.list().len(), 2);
    assert_eq!(listing(directory.path(), "layers").len(), 3);
    for image in store.list() {
        store.remove(&image.id).await.unwrap();
    }
    assert_eq!(listing(directory.path(), "layers"), [""; 0]);
}

#[tokio::test]
async fn references_that_cannot_be_read_now_are_joined_with_those_since() {
    let (registry, directory, images) = filled().await;
    let (file, away) = (directory.path().join("references.json"), directory.path().join("away"));
    fs::rename(&file, &away).unwrap();
    fs::create_dir(&file).unwrap();
    let store = ImageStore::open(directory.path()).unwrap();
    assert_eq!(ids(&store.list()), ids(&images));
    assert!(store.list().iter().all(|image| image.repo_tags.is_empty()));
    let three = pull(&store, &registry, "three").await;
    store.remove(&images[0].id).await.unwrap();
    drop(store);
    let store = ImageStore::open(directory.path()).unwrap();
    assert_eq!(store.get(&registry.reference("three")), Some(three.clone()));
    assert_eq!(store.list().len(), 2);
    fs::remove_dir(&file).unwrap();
    fs::rename(&away, &file).unwrap();
    change(&store).await;
    let mut expected = vec![images[1].clone(), three];
    expected.sort_by(|a, b| a.id.cmp(&b.id));
    assert_eq!(store.list(), expected);
    drop(store);
    assert_eq!(listing(directory.path(), ""), ["images", "layers", "lock", "manifests", "references.json", "tmp"]);
    assert_eq!(ImageStore::open(directory.path()).unwrap().list(), expected);
}

#[tokio::test]
async fn images_outlive_the_loss_of_their_names() {
    let (registry, directory, images) = filled().await;
    fs::write(directory.path().join("references.json"), "{\"version\":1,\"refer").unwrap();
    for _ in 0..2 {
        let store = ImageStore::open(directory.path()).unwrap();
        assert_eq!(store.list().len(), 2);
        pull(&store, &registry, "three").await;
        store.remove(&registry.reference("three")).await.unwrap();
    }
    let store = ImageStore::open(directory.path()).unwrap();
    assert!(store.list().iter().all(|image| image.repo_tags.is_empty() && image.repo_digests.is_empty()));
    pull(&store, &registry, "one").await;
    pull(&store, &registry, "two").await;
    // They are the same, so even the time is.
    assert_eq!(store.list(), images);
    for image in images {
        store.remove(&image.id).await.unwrap();
    }
    for place in ["images", "layers"] {
        assert_eq!(listing(directory.path(), place), [""; 0], "{place}");
    }
}

#[tokio::test]
async fn what_a_newer_version_wrote_is_left_to_it() {
    let (registry, directory, images) = filled().await;
    let root = directory.path();
    let records = |from: &str, to: &str| {
        for path in contents(root).into_keys().filter(|path| path.extension().is_some_and(|end| end == "json")) {
            if path.file_name().unwrap() != "config.json" {
                let text = fs::read_to_string(&path).unwrap();
                assert!(text.contains(from), "{text}");
                fs::write(&path, text.replacen(from, to, 1)).unwrap();
            }
        }
    };
    records("\"version\":1,", "\"version\":2,\"new\":[],");
    // A name that it may have come to use.
    fs::create_dir(root.join("layers/new-scheme")).unwrap();
    fs::write(root.join("layers/new-scheme/file"), "new").unwrap();
    let before: BTreeMap<_, _> = contents(root).into_iter().filter(|(path, _)| !path.ends_with("lock")).collect();
    let untouched = || {
        let now = contents(root);
        for (path, content) in &before {
            assert!(now.get(path) == Some(content), "{path:?} was touched");
        }
        now.len() - before.len()
    };
    let store = ImageStore::open(root).unwrap();
    assert_eq!(store.list(), []);
    assert_eq!(untouched(), 1, "more than the lock was made");
    // Pods can start nevertheless.
    let one = pull(&store, &registry, "one").await;
    assert!(images.iter().any(|old| old.id == one.id && common::disk(old) == common::disk(&one)));
    drop(store);
    let store = ImageStore::open(root).unwrap();
    assert_eq!(store.list(), std::slice::from_ref(&one));
    assert!(untouched() > 1);
    store.remove(&one.id).await.unwrap();
    drop(store);
    let store = ImageStore::open(root).unwrap();
    assert_eq!(store.list(), []);
    assert_eq!(untouched(), 2, "more than the lock and the references are left");
    drop(store);
    // The version that knows it is back.
    fs::remove_file(root.join("references.1.json")).unwrap();
    records("\"version\":2,\"new\":[],", "\"version\":1,");
    assert_eq!(ImageStore::open(root).unwrap().list(), images);
}

#[tokio::test]
async fn nobody_else_may_enter_and_no_link_is_followed() {
    let (_registry, directory, images) = filled().await;
    let mode = |path: &Path| path.symlink_metadata().unwrap().permissions().mode() & 0o777;
    let root = directory.path().join("made/here");
    drop(ImageStore::open(&root).unwrap());
    for (name, expected) in [("", 0o700), ("tmp", 0o700), ("layers", 0o700), ("images", 0o700), ("lock", 0o600)] {
        assert_eq!(mode(&root.join(name)), expected, "{name}");
    }
    // A lock that everybody could take, as others made it.
    fs::set_permissions(root.join("lock"), fs::Permissions::from_mode(0o644)).unwrap();
    drop(ImageStore::open(&root).unwrap());
    assert_eq!(mode(&root.join("lock")), 0o600);
    for name in ["lock", "layers"] {
        let target = directory.path().join(format!("target-{name}"));
        match name {
            "lock" => fs::write(&target, "precious").unwrap(),
            _ => fs::create_dir_all(target.join("file")).unwrap(),
        }
        let (before, own) = (contents(&target), directory.path().join(name));
        fs::rename(&own, directory.path().join("away")).unwrap();
        symlink(&target, &own).unwrap();
        // It opens, since pods must be had, and has nothing.
        let store = ImageStore::open(directory.path()).unwrap();
        assert_eq!(store.list(), []);
        let error = store.remove(&images[0].id).await.unwrap_err().to_string();
        assert!(error.contains(own.to_str().unwrap()), "{error}");
        assert_eq!(contents(&target), before);
        fs::remove_file(&own).unwrap();
        fs::rename(directory.path().join("away"), &own).unwrap();
        change(&store).await;
        assert_eq!(store.list(), images);
    }
}
