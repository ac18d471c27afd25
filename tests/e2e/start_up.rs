//! What a daemon says that cannot start, and what `nacelle` says by itself.

use std::process::Command;

use nacelle_tests::client::image;
use nacelle_tests::daemon::Daemon;

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
