//! What the store does when its disk is full, read-only or frozen, or there is no descriptor left: it opens, and loses
//! nothing.
//!
//! Needs root, for file systems of its own.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::filled::{change, contents, fill, filled, pull, registry};
use common::{listing, run};
use nacelle_image::{ErrorKind, ImageStore};
use rustix::process::{Resource, Rlimit, setrlimit};
use tempfile::TempDir;

/// A file system of its own.
struct Disk(TempDir);

impl Disk {
    fn tmpfs(size: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(directory.path()));
        Self(directory)
    }

    fn remount(&self, how: &str) {
        run(Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(self.0.path()));
    }

    fn root(&self) -> PathBuf {
        self.0.path().join("images")
    }

    /// Takes all the room there is.
    fn fill(&self) -> PathBuf {
        let path = self.0.path().join("filler");
        let mut file = File::create(&path).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_keeps_every_image_and_lets_them_be_removed() {
    let (registry, disk) = (registry(), Disk::tmpfs("8m"));
    let images = fill(&registry, &disk.root()).await;
    fs::create_dir(disk.root().join("tmp/half")).unwrap();
    let filler = disk.fill();
    let store = ImageStore::open(&disk.root()).unwrap();
    assert_eq!(store.list(), images);
    assert_eq!(listing(&disk.root(), "tmp"), [""; 0]);
    // Removal has made a page free; whatever is written next may take it.
    let refilled = disk.0.path().join("filler2");
    let mut file = File::create(&refilled).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    let error = store.pull(&registry.reference("three"), None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    // One that is there needs no room, whatever its pull policy.
    pull(&store, &registry, "one").await;
    assert_eq!(store.list(), images);
    // How a kubelet makes room.
    store.remove(&images[0].id).await.unwrap();
    assert_eq!(store.list(), &images[1..]);
    drop(store);
    let store = ImageStore::open(&disk.root()).unwrap();
    assert_eq!(store.list(), &images[1..]);
    fs::remove_file(filler).unwrap();
    pull(&store, &registry, "three").await;
    let images = store.list();
    assert_eq!(images.len(), 2);
    drop(store);
    assert_eq!(ImageStore::open(&disk.root()).unwrap().list(), images);
}

#[tokio::test]
async fn a_disk_that_became_read_only_keeps_every_image() {
    let (registry, disk) = (registry(), Disk::tmpfs("8m"));
    let images = fill(&registry, &disk.root()).await;
    fs::create_dir(disk.root().join("tmp/half")).unwrap();
    disk.remount("ro");
    let store = ImageStore::open(&disk.root()).unwrap();
    assert_eq!(store.list(), images);
    assert_eq!(ImageStore::open(&disk.root()).unwrap_err().kind(), ErrorKind::Locked);
    assert!(store.usage().unwrap().bytes > 0);
    store.pull(&registry.reference("three"), None, |_| {}).await.unwrap_err();
    store.remove(&images[0].id).await.unwrap_err();
    assert_eq!(store.list(), images);
    disk.remount("rw");
    store.remove(&images[0].id).await.unwrap();
    assert_eq!(store.list(), &images[1..]);
    assert_eq!(listing(&disk.root(), "tmp"), [""; 0]);
    pull(&store, &registry, "three").await;
}

#[tokio::test]
async fn a_process_without_descriptors_loses_no_image() {
    const ROOT: &str = "NACELLE_TEST_ROOT";
    if let Some(root) = std::env::var_os(ROOT) {
        return without_descriptors(Path::new(&root)).await;
    }
    let (_registry, directory, images) = filled().await;
    // The limit is a process's: this one's other tests have none to spare.
    let this = ["a_process_without_descriptors_loses_no_image", "--exact", "--nocapture"];
    run(Command::new(std::env::current_exe().unwrap()).args(this).env(ROOT, directory.path()));
    assert_eq!(ImageStore::open(directory.path()).unwrap().list(), images);
}

/// Opens the store with so few descriptors left that this or that step has none.
async fn without_descriptors(root: &Path) {
    let before = contents(&root.join("images"));
    let limit = Rlimit { current: Some(64), maximum: Some(64) };
    setrlimit(Resource::Nofile, limit).unwrap();
    for left in 0..6 {
        let mut taken = Vec::new();
        while let Ok(file) = File::open("/dev/null") {
            taken.push(file);
        }
        taken.truncate(taken.len() - left);
        let store = ImageStore::open(root).unwrap();
        assert!(left > 0 || store.list().is_empty(), "the test takes too few");
        drop(taken);
        change(&store).await;
        let images = store.list();
        assert_eq!(images.len(), 2, "with {left} left");
        assert!(images.iter().all(|image| image.repo_tags.len() == 1), "with {left} left: {images:?}");
        drop(store);
        assert!(contents(&root.join("images")) == before, "with {left} left");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_disk_holds_up_changes_alone() {
    let (registry, directory) = (registry(), tempfile::tempdir().unwrap());
    let (image, at) = (directory.path().join("disk"), directory.path().join("mount"));
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    fs::create_dir(&at).unwrap();
    run(Command::new("mkfs.ext4").arg("-q").arg(&image));
    run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at));
    let frozen = Frozen(at.clone());
    let root = at.join("images");
    let images = fill(&registry, &root).await;
    let store = ImageStore::open(&root).unwrap();
    frozen.set("--freeze");
    let changes: Vec<_> = ["one", "two"]
        .map(|name| {
            let (store, name) = (store.clone(), registry.reference(name));
            tokio::spawn(async move { store.remove(&name).await })
        })
        .into_iter()
        .collect();
    // Whichever is first has begun when its image is no longer there.
    let begun = async {
        while store.list().len() == images.len() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), begun).await.unwrap();
    let looked = store.clone();
    let look = tokio::task::spawn_blocking(move || (looked.list().len(), looked.get("x"), looked.usage().unwrap()));
    let (listed, _, usage) = tokio::time::timeout(Duration::from_secs(60), look).await.unwrap().unwrap();
    assert_eq!(listed, 1);
    assert!(usage.bytes > 0 && changes.iter().all(|change| !change.is_finished()));
    frozen.set("--unfreeze");
    for change in changes {
        change.await.unwrap().unwrap();
    }
    assert_eq!(store.list(), []);
    drop(store);
}

/// A mounted file system, thawed and unmounted at the end.
struct Frozen(PathBuf);

impl Frozen {
    fn set(&self, how: &str) {
        run(Command::new("fsfreeze").arg(how).arg(&self.0));
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.0).stderr(std::process::Stdio::null()).status();
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
