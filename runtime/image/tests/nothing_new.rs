//! A pull with nothing new: what is asked of the registry, and what of the disk.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::process::Command;

use common::{Compression, Layout, Registry, files, listing, noise, program, run};
use nacelle_image::ImageStore;

/// How often a file is looked at that is not there, before and after the pull in the trace.
const MARK: &str = "/nacelle-mark";

#[tokio::test]
async fn a_pull_with_nothing_new_is_one_head_and_no_write() {
    const ROOT: &str = "NACELLE_TEST_ROOT";
    const REFERENCE: &str = "NACELLE_TEST_REFERENCE";
    if let (Some(root), Ok(reference)) = (std::env::var_os(ROOT), std::env::var(REFERENCE)) {
        let store = ImageStore::open(root.as_ref()).unwrap();
        let _ = fs::metadata(MARK);
        store.pull(&reference, None, |_| {}).await.unwrap();
        let _ = fs::metadata(MARK);
        return;
    }
    let registry = Registry::start();
    let mut layout = Layout::default();
    layout.image("arm", "arm64", &[(files(&[("f", b"arm")]), Compression::Gzip)]);
    layout.image("app", "amd64", &[(files(&[("f", &noise(1, 100_000))]), Compression::Gzip)]);
    let index = layout.index("multi");
    registry.push(&layout, "multi", "test/multi:1", &["--all"]);
    let (directory, store) = common::store();
    let tag = registry.reference("test/multi:1");
    let image = store.pull(&tag, None, |_| {}).await.unwrap();
    assert_eq!(listing(directory.path(), "manifests"), [format!("{}.json", index.hex())]);
    drop(store);

    let log = || fs::read_to_string(registry.directory.path().join("log")).unwrap();
    let requests = |before: &str, method: &str| {
        let log = log();
        let since = log.strip_prefix(before).unwrap();
        since.lines().filter(|line| line.contains("\" \"nacelle/") && line.contains(&format!("\"{method} "))).count()
    };
    for reference in [tag.clone(), registry.reference(&format!("test/multi@{index}"))] {
        let (before, trace) = (log(), directory.path().join("trace"));
        // The trace is of this process alone: the other tests write.
        let this = ["a_pull_with_nothing_new_is_one_head_and_no_write", "--exact", "--nocapture"];
        run(Command::new(program("strace"))
            .args(["-f", "-y", "-e", "trace=%file,%desc", "-o"])
            .arg(&trace)
            .arg(std::env::current_exe().unwrap())
            .args(this)
            .env(ROOT, directory.path())
            .env(REFERENCE, &reference));
        let trace = fs::read_to_string(&trace).unwrap();
        let parts: Vec<&str> = trace.split(MARK).collect();
        let [_, pull, _] = parts[..] else { panic!("{} marks", parts.len() - 1) };
        assert!(pull.contains("config.json"), "nothing is in the trace: {pull}");
        let changes = |line: &&str| {
            let call = line.split_once(' ').map_or(*line, |(_, call)| call.trim_start());
            let name = call.split('(').next().unwrap_or_default();
            let writes = ["write", "pwrite64", "writev", "pwritev", "pwritev2"].contains(&name);
            // The runtime wakes its threads, and the network is a file, too.
            let elsewhere = ["eventfd", "<TCP", "socket:", "<UNIX", "pipe:", "signalfd"];
            writes && !elsewhere.iter().any(|kind| call.contains(kind))
                || name.starts_with("open") && ["O_WRONLY", "O_RDWR", "O_CREAT"].iter().any(|flag| call.contains(flag))
                || [
                    "fsync",
                    "fdatasync",
                    "rename",
                    "link",
                    "unlink",
                    "mkdir",
                    "rmdir",
                    "truncate",
                    "fallocate",
                    "utime",
                ]
                .iter()
                .any(|changing| name.contains(changing) && name != "readlink" && name != "readlinkat")
        };
        let found: Vec<&str> = pull.lines().filter(changes).collect();
        assert!(found.is_empty(), "{found:#?}");
        // TLS was tried first, and is no request.
        assert_eq!((requests(&before, "HEAD"), requests(&before, "GET")), (1, 0), "{}", &log()[before.len()..]);
    }

    // What was lost is fetched again, and kept again; what nothing leads to goes.
    let kept = directory.path().join("manifests").join(format!("{}.json", index.hex()));
    let before = log();
    fs::write(&kept, "{\"version\":1,").unwrap();
    let store = ImageStore::open(directory.path()).unwrap();
    assert_eq!(store.pull(&tag, None, |_| {}).await.unwrap(), image);
    assert_eq!((requests(&before, "HEAD"), requests(&before, "GET")), (1, 2));
    assert!(fs::read_to_string(&kept).unwrap().ends_with('}'));
    store.remove(&image.id).await.unwrap();
    assert_eq!(listing(directory.path(), "manifests"), [""; 0]);
}
