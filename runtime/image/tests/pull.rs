//! Pulls from a real registry: what arrives, what is shared, what is left.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::process::Command;
use std::sync::{Arc, Mutex};

use common::{Compression, Layout, Registry, Tls, files, listing, noise, run, store};
use nacelle_image::{Credentials, Digest, Endpoint, ErrorKind, ImageStore, LayerState, Options, Progress};

#[tokio::test]
async fn an_image_of_every_compression_and_format() {
    let registry = Registry::start();
    let mut layout = Layout::default();
    let layers = [
        (files(&[("a", b"1")]), Compression::None),
        (files(&[("b", &noise(1, 300_000))]), Compression::Gzip),
        (files(&[("c", b"3")]), Compression::Zstd),
    ];
    let pushed = layout.image("app", "amd64", &layers);
    registry.push(&layout, "app", "test/app:v1", &[]);
    let (directory, store) = store();

    let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let record = seen.clone();
    let reference = registry.reference("test/app:v1");
    let image = store.pull(&reference, None, move |progress| record.lock().unwrap().push(progress)).await.unwrap();
    assert_eq!(image.id, pushed.config.to_string());
    assert_eq!(image.repo_tags, [reference.as_str()]);
    assert_eq!(image.repo_digests, [registry.reference(&format!("test/app@{}", pushed.manifest))]);
    assert!(image.size > 300_000);
    assert_eq!(image.config.user, "7:8");
    assert_eq!(image.rootfs_files().len(), 4);
    let last = seen.lock().unwrap().last().cloned().unwrap();
    assert_eq!((last.done, last.layers, last.state), (last.total, 3, LayerState::Complete));
    assert!(last.total > 300_000);

    // Every name it has finds it.
    let hex = pushed.config.hex();
    let digest = format!("test/app@{}", pushed.manifest);
    for name in
        [&reference, &registry.reference(&digest), &image.id, &hex, &hex[..12].to_owned(), &image.id[..20].to_owned()]
    {
        assert_eq!(store.get(name).as_ref(), Some(&image), "{name}");
    }
    for name in ["", "test/app:v1", "sha256:", "nothing", "sha256:zz", &registry.reference("test/app:v2")] {
        assert_eq!(store.get(name), None, "{name}");
    }
    assert_eq!(store.list(), std::slice::from_ref(&image));

    // Docker's own format, which knows no zstd, has the same layers.
    layout.image("docker", "amd64", &layers[..2]);
    registry.push(&layout, "docker", "test/docker:v1", &["--format", "v2s2"]);
    let docker = store.pull(&registry.reference("test/docker:v1"), None, |_| {}).await.unwrap();
    assert_eq!(listing(directory.path(), "layers").len(), 3);
    assert_eq!(docker.rootfs_files()[1..], image.rootfs_files()[1..3]);

    let usage = store.usage().unwrap();
    assert!(usage.bytes > 300_000 && usage.inodes > 15, "{usage:?}");
    assert_eq!(listing(directory.path(), "tmp"), [""; 0]);
}

#[tokio::test]
async fn an_index_means_this_platform() {
    let registry = Registry::start();
    let mut layout = Layout::default();
    layout.image("arm", "arm64", &[(files(&[("a", b"arm")]), Compression::Gzip)]);
    registry.push(&layout, "arm", "test/arm", &[]);
    let amd = layout.image("amd", "amd64", &[(files(&[("a", b"amd")]), Compression::Gzip)]);
    let index = layout.index("multi");
    registry.push(&layout, "multi", "test/multi:1", &["--all"]);
    let (_directory, store) = store();
    let image = store.pull(&registry.reference("test/multi:1"), None, |_| {}).await.unwrap();
    assert_eq!(image.id, amd.config.to_string());
    assert_eq!(image.repo_digests, [registry.reference(&format!("test/multi@{index}"))]);
    let by_digest = store.pull(&registry.reference(&format!("test/multi:1@{index}")), None, |_| {}).await.unwrap();
    assert_eq!(by_digest, image);

    let error = store.pull(&registry.reference("test/arm"), None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("arm64"), "{error}");
}

#[tokio::test]
async fn concurrent_pulls_share_their_downloads() {
    let registry = Registry::start();
    let mut layout = Layout::default();
    let shared = (files(&[("shared", &noise(1, 4 << 20))]), Compression::Gzip);
    let one = layout.image("one", "amd64", &[shared.clone(), (files(&[("x", b"1")]), Compression::Gzip)]);
    let two = layout.image("two", "amd64", &[shared, (files(&[("x", b"2")]), Compression::Gzip)]);
    registry.push(&layout, "one", "test/one", &[]);
    registry.push(&layout, "two", "test/two", &[]);
    let (directory, store) = store();
    let (first, second) = (registry.reference("test/one"), registry.reference("test/two"));
    let pulls = (0..6).map(|index| store.pull(if index % 2 == 0 { &first } else { &second }, None, |_| {}));
    for image in futures_util::future::join_all(pulls).await {
        let id = image.unwrap().id;
        assert!(id == one.config.to_string() || id == two.config.to_string());
    }
    let downloads = |digest: &Digest| {
        ["one", "two"].iter().map(|name| registry.requests(&format!("/v2/test/{name}/blobs/{digest}"))).sum::<usize>()
    };
    for layer in one.layers.iter().chain(&two.layers) {
        assert_eq!(downloads(layer), 1);
    }
    assert_eq!(listing(directory.path(), "layers").len(), 3);
    // Nothing is fetched again but the manifest.
    store.pull(&first, None, |_| {}).await.unwrap();
    assert_eq!(downloads(&one.layers[0]), 1);
}

#[tokio::test]
async fn a_tag_moves_and_removal_takes_what_is_unshared() {
    let registry = Registry::start();
    let mut layout = Layout::default();
    let base = (files(&[("base", b"base")]), Compression::Gzip);
    let old = layout.image("old", "amd64", &[base.clone(), (files(&[("v", b"1")]), Compression::Gzip)]);
    let new = layout.image("new", "amd64", &[base, (files(&[("v", b"2")]), Compression::Gzip)]);
    let (directory, store) = store();
    let reference = registry.reference("test/app:latest");
    registry.push(&layout, "old", "test/app:latest", &[]);
    store.pull(&reference, None, |_| {}).await.unwrap();
    registry.push(&layout, "new", "test/app:latest", &[]);
    let image = store.pull(&registry.reference("test/app"), None, |_| {}).await.unwrap();
    assert_eq!(image.id, new.config.to_string());
    let left = store.get(&old.config.to_string()).unwrap();
    assert_eq!((left.repo_tags.len(), left.repo_digests.len()), (0, 1));
    registry.push(&layout, "new", "test/app:other", &[]);
    let image = store.pull(&registry.reference("test/app:other"), None, |_| {}).await.unwrap();
    assert_eq!(image.repo_tags.len(), 2);

    // A new process finds the same.
    let before = store.list();
    let held = ImageStore::open(directory.path()).unwrap_err();
    assert_eq!(held.kind(), ErrorKind::Locked);
    assert!(held.to_string().contains(&format!("process {} ", std::process::id())), "{held}");
    drop(store);
    let store = ImageStore::open(directory.path()).unwrap();
    assert_eq!(store.list(), before);

    let open = image.open_rootfs().unwrap();
    store.remove(&reference).await.unwrap();
    assert_eq!(store.list(), std::slice::from_ref(&left));
    assert_eq!(listing(directory.path(), "layers").len(), 2);
    assert_eq!(image.open_rootfs().unwrap_err().kind(), ErrorKind::NotFound);
    for file in open {
        assert!(file.metadata().unwrap().len() > 0);
    }
    store.remove(&reference).await.unwrap();
    store.remove("sha256:0123").await.unwrap();
    store.remove(&left.id).await.unwrap();
    for place in ["layers", "images", "tmp"] {
        assert_eq!(listing(directory.path(), place), [""; 0], "{place}");
    }
    assert_eq!(store.list(), []);
}

#[tokio::test]
async fn an_interrupted_store_is_swept() {
    let registry = Registry::start();
    let mut layout = Layout::default();
    let pushed = layout.image("app", "amd64", &[(files(&[("v", b"1")]), Compression::Gzip)]);
    layout.image("other", "amd64", &[(files(&[("v", b"2")]), Compression::Gzip)]);
    registry.push(&layout, "app", "test/app", &[]);
    registry.push(&layout, "other", "test/other", &[]);
    let (directory, store) = store();
    let image = store.pull(&registry.reference("test/app"), None, |_| {}).await.unwrap();
    let other = store.pull(&registry.reference("test/other"), None, |_| {}).await.unwrap();
    drop(store);
    // What a crash, or a disk, may leave.
    fs::create_dir_all(directory.path().join("tmp/half/made")).unwrap();
    fs::write(directory.path().join("tmp/file"), b"x").unwrap();
    fs::create_dir_all(directory.path().join("layers").join(Digest::of(b"nobody's").hex())).unwrap();
    fs::create_dir_all(directory.path().join("images").join(Digest::of(b"nobody's").hex())).unwrap();
    let cut = &other.rootfs_files()[1];
    fs::File::options().write(true).open(cut).unwrap().set_len(4096).unwrap();
    let store = ImageStore::open(directory.path()).unwrap();
    assert_eq!(store.list(), std::slice::from_ref(&image));
    assert_eq!(listing(directory.path(), "tmp"), [""; 0]);
    assert_eq!(listing(directory.path(), "images"), [pushed.config.hex()]);
    assert_eq!(listing(directory.path(), "layers").len(), 1);
    // What was lost comes back.
    assert_eq!(store.pull(&registry.reference("test/other"), None, |_| {}).await.unwrap().id, other.id);
    // Images without their references are nobody's.
    drop(store);
    fs::remove_file(directory.path().join("references.json")).unwrap();
    let store = ImageStore::open(directory.path()).unwrap();
    assert_eq!(store.list(), []);
    assert_eq!(listing(directory.path(), "layers"), [""; 0]);
}

#[tokio::test]
async fn passwords_are_asked_for_and_taken() {
    let registry = Registry::start_protected();
    let mut layout = Layout::default();
    layout.image("app", "amd64", &[(files(&[("v", b"1")]), Compression::Gzip)]);
    registry.push(&layout, "app", "test/app", &[]);
    let (_directory, store) = store();
    let reference = registry.reference("test/app");
    let basic = |password: &str| Some(Credentials::Basic { username: "user".into(), password: password.into() }.into());
    for wrong in [None, basic("guess"), Some(Credentials::Bearer { token: "x".into() }.into())] {
        let error = store.pull(&reference, wrong, |_| {}).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert!(!error.to_string().contains("guess"));
    }
    store.pull(&reference, basic("secret"), |_| {}).await.unwrap();
}

#[tokio::test]
async fn unknown_and_unreachable() {
    let registry = Registry::start();
    let (_directory, store) = store();
    let error = store.pull(&registry.reference("test/none:x"), None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("test/none:x"), "{error}");
    let address = registry.address.clone();
    drop(registry);
    let error = store.pull(&format!("{address}/test/none"), None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains(&address) && error.to_string().contains("refused"), "{error}");
    assert_eq!(store.pull("Not/A/Name", None, |_| {}).await.unwrap_err().kind(), ErrorKind::InvalidReference);
}

#[tokio::test]
async fn what_the_registry_has_is_not_what_was_pushed() {
    let registry = Registry::start();
    let (directory, store) = store();
    let mut layout = Layout::default();
    let fail = async |name: &str| {
        let error = store.pull(&registry.reference(name), None, |_| {}).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
        for place in ["layers", "images", "tmp"] {
            assert_eq!(listing(directory.path(), place), [""; 0], "{name}: {place}");
        }
        error.to_string()
    };
    let mut push = |name: &str, seed| {
        let image = layout.image(name, "amd64", &[(files(&[("f", &noise(seed, 500_000))]), Compression::Gzip)]);
        registry.push(&layout, name, name, &[]);
        image
    };
    let damage = |digest: &Digest, change: fn(&mut Vec<u8>)| {
        let mut bytes = fs::read(registry.blob(digest)).unwrap();
        change(&mut bytes);
        fs::write(registry.blob(digest), bytes).unwrap();
    };
    let image = push("flipped", 1);
    damage(&image.layers[0], |bytes| bytes[250_000] ^= 1);
    let message = fail("flipped").await;
    assert!(message.contains(&image.layers[0].to_string()) && message.contains("expected digest"), "{message}");
    let image = push("cut", 2);
    damage(&image.layers[0], |bytes| bytes.truncate(100_000));
    assert!(fail("cut").await.contains("100000 bytes"));
    let image = push("config", 3);
    damage(&image.config, |bytes| bytes[20] ^= 1);
    assert!(fail("config").await.contains(&image.config.to_string()));
    let image = push("manifest", 4);
    damage(&image.manifest, |bytes| bytes.extend(b" "));
    let by_digest = format!("manifest@{}", image.manifest);
    assert!(fail(&by_digest).await.contains("expected digest"));
}

/// A virtual machine takes 250 files for a disk.
#[tokio::test]
async fn hundreds_of_layers_are_fewer_files() {
    let registry = Registry::start();
    let (directory, store) = store();
    let name = |index: usize| format!("f{index}");
    let layers: Vec<_> = (0..300usize)
        .map(|index| (files(&[(&name(index), &[u8::try_from(index % 251).unwrap(); 5000])]), Compression::None))
        .collect();
    let mut layout = Layout::default();
    layout.image("many", "amd64", &layers);
    registry.push(&layout, "many", "many", &[]);
    let image = store.pull(&registry.reference("many"), None, |_| {}).await.unwrap();
    let content = |image: &nacelle_image::Image| {
        let mut files = image.open_rootfs().unwrap();
        assert!(files.len() <= 240, "{}", files.len());
        let mut all = Vec::new();
        files.iter_mut().for_each(|file| _ = std::io::Read::read_to_end(file, &mut all).unwrap());
        all
    };
    let disk = content(&image);
    // Each layer's content is the two blocks after the first of its own.
    let lengths = listing(directory.path(), "layers")
        .into_iter()
        .map(|layer| fs::metadata(directory.path().join("layers").join(layer).join("layer.erofs")).unwrap().len());
    let rootfs = image.rootfs_files();
    let own = fs::metadata(&rootfs[0]).unwrap().len();
    assert_eq!(disk.len() as u64, own + lengths.sum::<u64>());
    drop(store);
    let store = ImageStore::open(directory.path()).unwrap();
    assert!(content(&store.get(&image.id).unwrap()) == disk);
}

#[tokio::test]
async fn hostile_layers_are_refused_by_name() {
    let registry = Registry::start();
    let (directory, store) = store();
    let link = |target: &str| {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = common::header(tar::EntryType::Link, 0);
        header.as_mut_bytes()[..4].copy_from_slice(b"hard");
        header.as_mut_bytes()[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        builder.append(&header, &b""[..]).unwrap();
        builder.into_inner().unwrap()
    };
    let cases = [
        // Known only when the layers are merged: files of the host are none of the image.
        ("hard-absolute", link("/etc/passwd"), "etc/passwd"),
        ("hard-parent", link("../../../../../../../etc/passwd"), "etc/passwd"),
        ("hard-missing", link("not/here"), "not/here"),
        ("hard-root", link(".."), "hard"),
    ];
    let mut layout = Layout::default();
    for (name, archive, _) in &cases {
        layout.image(name, "amd64", &[(archive.clone(), Compression::Gzip)]);
        registry.push(&layout, name, name, &[]);
    }
    for (name, _, entry) in cases {
        let error = store.pull(&registry.reference(name), None, |_| {}).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{name}: {error}");
        assert!(error.to_string().contains(entry), "{name}: {error}");
        assert_eq!(listing(directory.path(), "images"), [""; 0]);
        assert_eq!(listing(directory.path(), "tmp"), [""; 0]);
    }
    assert_eq!(store.list(), []);
}

#[tokio::test]
async fn https_is_verified() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (certificate, key) = (path("certificate"), path("key"));
    run(Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=registry.test", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate));
    let registry = Registry::start_with(false, Some(&Tls { certificate: certificate.clone(), key, clients: None }));
    let mut layout = Layout::default();
    layout.image("app", "amd64", &[(files(&[("v", b"1")]), Compression::Gzip)]);
    registry.push(&layout, "app", "test/app", &[]);

    let open = |authorities: Vec<Vec<u8>>| {
        let url = format!("https://{}", registry.address);
        let endpoints =
            move |_: &str| Ok(vec![Endpoint { authorities: authorities.clone(), ..Endpoint::new(url.clone()) }]);
        let options = Options { endpoints: Arc::new(endpoints), ..Options::default() };
        let directory = tempfile::tempdir().unwrap();
        (ImageStore::open_with(directory.path(), options).unwrap(), directory)
    };
    let (store, _directory) = open(Vec::new());
    let error = store.pull("registry.test/test/app", None, |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("certificate"), "{error}");
    let (store, _directory) = open(vec![fs::read(&certificate).unwrap()]);
    store.pull("registry.test/test/app", None, |_| {}).await.unwrap();
}
