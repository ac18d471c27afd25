//! A store with images in it, and looks at its files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use nacelle_image::{Image, ImageStore};
use tempfile::TempDir;

use super::{Compression, Layout, Registry, files, noise};

/// A registry with the images `one` and `two`, which share a layer, and `three`.
pub fn registry() -> Registry {
    let registry = Registry::start();
    let mut layout = Layout::default();
    let base = (files(&[("base", &noise(1, 100_000))]), Compression::Gzip);
    for (seed, name, shares) in [(2, "one", true), (3, "two", true), (4, "three", false)] {
        let own = (files(&[("own", &noise(seed, 100_000))]), Compression::Gzip);
        let layers = if shares { vec![base.clone(), own] } else { vec![own] };
        layout.image(name, "amd64", &layers);
        registry.push(&layout, name, name, &[]);
    }
    registry
}

pub async fn pull(store: &ImageStore, registry: &Registry, name: &str) -> Image {
    store.pull(&registry.reference(name), None, |_| {}).await.unwrap()
}

/// A registry, and a closed store in a directory with `one` and `two`.
pub async fn filled() -> (Registry, TempDir, Vec<Image>) {
    let (registry, directory) = (registry(), tempfile::tempdir().unwrap());
    let images = fill(&registry, directory.path()).await;
    (registry, directory, images)
}

pub async fn fill(registry: &Registry, root: &Path) -> Vec<Image> {
    let store = ImageStore::open(root).unwrap();
    pull(&store, registry, "one").await;
    pull(&store, registry, "two").await;
    store.list()
}

/// Has the store look again at what it could not read.
pub async fn change(store: &ImageStore) {
    store.remove("no-such-image").await.unwrap();
}

pub fn ids(images: &[Image]) -> Vec<&str> {
    images.iter().map(|image| image.id.as_str()).collect()
}

/// Every file with its content.
pub fn contents(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut pending) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(path) = pending.pop() {
        match fs::read_dir(&path) {
            Ok(entries) => pending.extend(entries.map(|entry| entry.unwrap().path())),
            Err(_) => drop(found.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    found
}

/// The directory of an image, and the directories of its layers.
pub fn parts(image: &Image) -> Vec<PathBuf> {
    image.rootfs_files().iter().map(|file| file.parent().unwrap().to_owned()).collect()
}
