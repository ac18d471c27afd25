//! What a daemon says that cannot start, and what `nacelle` says by itself.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, image, limit};
use nacelle_tests::daemon::Daemon;
use nacelle_tests::dead::Dead;
use tonic::Code;

#[tokio::test]
async fn a_socket_in_use_and_a_directory_in_use_are_named() {
    let first = Daemon::start("").await.unwrap();
    let second = |config: String| async move {
        let mut daemon = Daemon::configured("").unwrap();
        std::fs::write(daemon.path().join("config.toml"), config).unwrap();
        daemon.expect_failure().await.unwrap()
    };
    let socket = first.socket().display().to_string();
    let said = second(format!("socket = \"{socket}\"\nroot = \"/tmp/n-x/root\"\nrun = \"/tmp/n-x/r\"")).await;
    assert!(said.contains(&socket) && said.contains("in use"), "{said}");
    let path = first.path().display();
    let said = second(format!("socket = \"{path}/other.sock\"\nroot = \"{path}/root\"\nrun = \"{path}/r\"")).await;
    assert!(said.contains("another") && said.contains(&path.to_string()), "{said}");
}

#[tokio::test]
async fn an_unknown_key_is_refused_by_name() {
    let mut daemon = Daemon::configured("colour = \"blue\"").unwrap();
    let said = daemon.expect_failure().await.unwrap();
    assert!(said.contains("colour") && said.contains("config.toml"), "{said}");
}

#[test]
fn check_tells_that_this_host_can_run_guests() {
    let output = Command::new("nacelle").arg("check").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("This host can run guests."), "{said}");
}

#[test]
fn run_passes_output_and_exit_code_on_and_cleans_up() {
    let script = "echo out; echo err >&2; exit 9";
    let output = Command::new("nacelle").args(["run", &image("busybox"), "--", "sh", "-c", script]).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!((output.status.code(), &*stdout, &*stderr), (Some(9), "out\n", "err\n"));
    let left: Vec<_> = std::fs::read_dir("/var/lib/nacelle/run/pods").into_iter().flatten().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn run_names_an_image_that_is_not_there() {
    let output = Command::new("nacelle").args(["run", &image("no-such-image")]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("no-such-image"), "{said}");
}

/// A small file system at one of a daemon's directories.
struct Small(PathBuf);

impl Small {
    fn at(path: PathBuf, size: &str) -> Self {
        std::fs::create_dir_all(&path).unwrap();
        let options = std::ffi::CString::new(format!("size={size},mode=0700")).unwrap();
        rustix::mount::mount("none", &path, "tmpfs", rustix::mount::MountFlags::empty(), &*options).unwrap();
        Self(path)
    }

    /// Takes all the room that is left, and says where.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = File::create(&path).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Ids of all images.
async fn images(client: &Client) -> Vec<String> {
    let listed = client.images.clone().list_images(cri::ListImagesRequest::default()).await.unwrap();
    listed.into_inner().images.into_iter().map(|image| image.id).collect()
}

/// A daemon whose directory `name` is full starts, has its images, and goes on as soon as there is room.
async fn starts_on_a_full_disk(name: &str) {
    let mut daemon = Daemon::configured("").unwrap();
    let small = Small::at(daemon.path().join(name), "32m");
    daemon.restart().await.unwrap();
    let id = daemon.client().await.pull("busybox").await.unwrap();
    daemon.kill();
    let filler = small.fill();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert_eq!(images(&client).await, std::slice::from_ref(&id));
    let usage = client.images.clone().image_fs_info(cri::ImageFsInfoRequest {}).await.unwrap().into_inner();
    assert!(usage.image_filesystems[0].used_bytes.unwrap().value > 100_000);
    let error = client.pull("layers").await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    std::fs::remove_file(filler).unwrap();
    client.pull("layers").await.unwrap();
    // A kubelet that finds the disk full removes images.
    small.fill();
    let spec = cri::ImageSpec { image: id.clone(), ..Default::default() };
    client.images.clone().remove_image(cri::RemoveImageRequest { image: Some(spec) }).await.unwrap();
    daemon.kill();
    daemon.restart().await.unwrap();
    let left = images(&daemon.client().await).await;
    assert!(left.len() == 1 && left[0] != id, "{left:?}");
}

#[tokio::test]
async fn a_daemon_starts_with_a_full_disk_for_images() {
    starts_on_a_full_disk("root/images").await;
}

#[tokio::test]
async fn a_daemon_starts_with_a_full_disk() {
    starts_on_a_full_disk("root").await;
}

#[tokio::test]
async fn a_rollback_keeps_what_the_newer_version_wrote_and_pulls_anew() {
    let mut daemon = Daemon::start("").await.unwrap();
    let id = daemon.client().await.pull("busybox").await.unwrap();
    daemon.kill();
    let store = daemon.path().join("root/images");
    let record = store.join("images").join(id.trim_start_matches("sha256:")).join("image.json");
    let version = |from: &str, to: &str| {
        let text = std::fs::read_to_string(&record).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(&record, text.replacen(from, to, 1)).unwrap();
    };
    version("\"version\":1", "\"version\":2");
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert_eq!(images(&client).await, [""; 0]);
    assert!(daemon.log().contains(&*record.parent().unwrap().to_string_lossy()), "{}", daemon.log());
    assert_eq!(client.pull("busybox").await.unwrap(), id);
    assert_eq!(client.run_once("busybox", &["echo", "hello"]).await.unwrap().1, 0);
    let spec = cri::ImageSpec { image: id.clone(), ..Default::default() };
    client.images.clone().remove_image(cri::RemoveImageRequest { image: Some(spec) }).await.unwrap();
    daemon.kill();
    version("\"version\":2", "\"version\":1");
    daemon.restart().await.unwrap();
    assert_eq!(images(&daemon.client().await).await, [id]);
}

#[tokio::test]
async fn a_daemon_answers_before_it_has_read_its_records() {
    let mut daemon = Daemon::start("").await.unwrap();
    daemon.kill();
    // One of them is where nothing is ever read.
    let dead = Dead::mount(daemon.path().join("root/pods").join("a".repeat(64))).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let asked = client.runtime.clone().status(cri::StatusRequest { verbose: true }).await.unwrap().into_inner();
    assert!(asked.info["nacelle"].contains("\"pods\":null"), "{:?}", asked.info);
    let listing = tokio::spawn(async move { client.pods().await });
    tokio::time::sleep(limit(1)).await;
    assert!(!listing.is_finished(), "pods are listed that nobody knows yet");
    drop(dead);
    tokio::time::timeout(limit(30), listing).await.expect("an answer").unwrap().unwrap();
}
