//! Pods that are cloned instead of booted.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nacelle_tests::client::{Client, limit, pod_config};
use nacelle_tests::daemon::Daemon;
use nacelle_tests::host;
use tempfile::TempDir;

/// A daemon with templates of its own, and their directory.
fn daemon(extra: &str) -> (Daemon, PathBuf, TempDir) {
    let directory = tempfile::tempdir_in("/run").unwrap();
    let templates = directory.path().join("templates");
    let keys = format!("guest.template_directory = {:?}\n{extra}", templates.display().to_string());
    (Daemon::configured(&keys).unwrap(), templates, directory)
}

/// The names of what is in the directory of templates.
fn names(templates: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(templates).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Whether the machine of a pod went on from a saved one.
fn cloned(daemon: &Daemon, pod: &str) -> bool {
    let path = daemon.path().join("r/pods").join(pod).join("vmm.json");
    let config: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    config["start"].get("clone").is_some()
}

/// A pod of this much memory for its containers.
async fn pod_of(client: &Client, logs: &Path, memory_mib: i64) -> String {
    let mut config = pod_config(logs);
    let linux = config.linux.get_or_insert_default();
    linux.resources.get_or_insert_default().memory_limit_in_bytes = memory_mib << 20;
    client.run_pod_as(config).await.unwrap()
}

#[tokio::test]
async fn clones_are_pods_of_their_own() {
    let (mut daemon, templates, _kept) = daemon("");
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    // Both ask while the template is made: they wait for it.
    let (first, second) = tokio::join!(client.run_pod(logs.path()), client.run_pod(logs.path()));
    let pods = [first.unwrap(), second.unwrap()];
    assert!(pods.iter().all(|pod| cloned(&daemon, pod)), "{}", daemon.log());
    assert_eq!(names(&templates).len(), 1);
    let memory = templates.join(names(&templates).first().unwrap()).join("memory");
    let before = fs::metadata(&memory).unwrap().modified().unwrap();

    let mut drawn = BTreeSet::new();
    for pod in &pods {
        let id = client.create(pod, "busybox", &["sleep", "1000"]).await.unwrap();
        client.start(&id).await.unwrap();
        // What no two guests may have in common, from the kernel and from a process.
        let said = client.shell(&id, "cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | md5sum").await;
        assert_eq!(said.lines().count(), 2, "{said}");
        drawn.extend(said.lines().map(str::to_owned));
        let clock: u64 = client.shell(&id, "date +%s").await.trim().parse().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(now.abs_diff(clock) <= limit(5).as_secs(), "the guest's clock says {clock}, the host's {now}");
        // Time goes on, and timers end.
        client.shell(&id, "sleep 0.2").await;
        client.shell(&id, "dd if=/dev/zero of=/file bs=64k count=64 2>/dev/null && rm /file").await;
    }
    assert_eq!(drawn.len(), 4, "{drawn:?}");
    assert_eq!(fs::metadata(&memory).unwrap().modified().unwrap(), before, "a clone wrote to its template");
    for pod in &pods {
        client.remove_pod(pod).await.unwrap();
    }
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_template_that_is_damaged_costs_a_boot_and_is_made_anew() {
    let (mut daemon, templates, _kept) = daemon("");
    daemon.restart().await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let client = daemon.client().await;
    let pod = client.run_pod(logs.path()).await.unwrap();
    client.remove_pod(&pod).await.unwrap();
    let state = templates.join(names(&templates).first().unwrap()).join("state");
    fs::write(&state, "no state").unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    assert!(!cloned(&daemon, &pod) && daemon.log().contains("booting it"), "{}", daemon.log());
    assert_eq!(names(&templates), BTreeSet::new());
    client.remove_pod(&pod).await.unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    assert!(cloned(&daemon, &pod), "{}", daemon.log());
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_size_is_saved_when_it_is_asked_for_again_and_what_was_used_last_is_kept() {
    let (mut daemon, templates, _kept) = daemon("guest.templates = 1");
    daemon.restart().await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let client = daemon.client().await;
    let mut pods = Vec::new();
    for (memory_mib, clone) in [(64, false), (64, true), (32, false), (64, true)] {
        let pod = pod_of(&client, logs.path(), memory_mib).await;
        assert_eq!(cloned(&daemon, &pod), clone, "{memory_mib} MiB: {}", daemon.log());
        pods.push(pod);
    }
    let left = names(&templates);
    assert!(left.len() == 1 && left.first().unwrap().ends_with("-171-1"), "{left:?}");
    // A template is no longer needed once a machine has started from it.
    fs::remove_dir_all(&templates).unwrap();
    let pod = pod_of(&client, logs.path(), 64).await;
    assert!(cloned(&daemon, &pod), "{}", daemon.log());
    pods.push(pod);
    for pod in &pods {
        client.remove_pod(pod).await.unwrap();
    }
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_daemon_killed_while_it_saves_leaves_nothing_that_the_next_does_not_remove() {
    let (mut daemon, templates, _kept) = daemon("");
    daemon.restart().await.unwrap();
    let run = daemon.path().join("r");
    let deadline = tokio::time::Instant::now() + limit(20);
    while host::vmm_processes(&run).is_empty() && names(&templates).is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "no template is made: {}", daemon.log());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    daemon.kill();
    let deadline = tokio::time::Instant::now() + limit(20);
    let before = host::vmm_processes(&run);
    daemon.restart().await.unwrap();
    // A daemon answers before it has looked at what is there.
    loop {
        let after = host::vmm_processes(&run);
        if before.iter().all(|process| !after.contains(process)) {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{before:?} {after:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let logs = tempfile::tempdir().unwrap();
    let client = daemon.client().await;
    let pod = client.run_pod(logs.path()).await.unwrap();
    assert!(cloned(&daemon, &pod), "{}", daemon.log());
    client.remove_pod(&pod).await.unwrap();
    assert!(names(&templates).iter().all(|name| !name.ends_with("new")), "{:?}", names(&templates));
    let left: Vec<_> = fs::read_dir(run.join("pods")).unwrap().flatten().map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn without_templates_every_guest_boots() {
    let (mut daemon, templates, _kept) = daemon("guest.templates = 0");
    daemon.restart().await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let client = daemon.client().await;
    for _ in 0..2 {
        let pod = client.run_pod(logs.path()).await.unwrap();
        assert!(!cloned(&daemon, &pod));
        client.remove_pod(&pod).await.unwrap();
    }
    assert!(!templates.exists());
}
