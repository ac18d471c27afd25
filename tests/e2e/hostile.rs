//! A VMM that was broken out of, a pod with a volume of its logs, and a local user, against the daemon.
//!
//! Each test plays one of them as far as root can play it: it has what they have (a VMM its directory and arguments, a pod its volume, a
//! user processes and files of his own), tries a trick, and shows that nothing outside was read, written, deleted, signalled or
//! connected to, and that nobody else's pod has noticed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, limit, log_lines};
use nacelle_tests::daemon::Daemon;
use nacelle_tests::host;
use rustix::fs::{CWD, FileType, FlockOperation, Mode, flock, mknodat};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;

/// What nobody may read.
const SECRET: &str = "a-secret-of-the-host";
/// A local user without any privileges.
const NOBODY: u32 = 65534;

/// A pod whose container runs, on a daemon of the test's own.
struct Victim {
    daemon: Daemon,
    client: Client,
    pod: String,
    container: String,
    logs: TempDir,
}

impl Victim {
    async fn new() -> Self {
        let daemon = Daemon::start("").await.unwrap();
        let client = daemon.client().await;
        client.pull("busybox").await.unwrap();
        let logs = tempfile::tempdir().unwrap();
        let (pod, container) = running(&client, logs.path()).await;
        Self { daemon, client, pod, container, logs }
    }

    /// The directory that the pod's VMM can write to.
    fn run(&self) -> PathBuf {
        self.daemon.path().join("r/pods").join(&self.pod)
    }

    async fn restart(&mut self) {
        self.daemon.kill();
        self.daemon.restart().await.unwrap();
        self.client = self.daemon.client().await;
    }

    async fn kill_vmm(&self) {
        let vmm = self.client.vmm_pid(&self.pod).await.unwrap();
        kill_process(Pid::from_raw(vmm).unwrap(), Signal::KILL).unwrap();
    }

    /// That a pod is well: ready, and its container answers.
    async fn is_well(&self, pod: &str, container: &str) {
        assert_eq!(self.client.pod_status(pod).await.unwrap().state(), cri::PodSandboxState::SandboxReady);
        assert_eq!(self.client.shell(container, "echo alive").await, "alive");
    }

    /// Everything that the daemon says of the pod.
    async fn told(&self) -> String {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: self.pod.clone(), verbose: true };
        let pod = self.client.runtime.clone().pod_sandbox_status(request).await.unwrap().into_inner();
        format!("{pod:?} {:?} {}", self.client.status(&self.container).await.unwrap(), self.daemon.log())
    }

    /// Takes everything down.
    async fn end(self) {
        self.client.remove_pod(&self.pod).await.unwrap();
        assert_eq!(self.daemon.leftovers(), [""; 0]);
    }
}

async fn running(client: &Client, logs: &Path) -> (String, String) {
    let pod = client.run_pod(logs).await.unwrap();
    let container = client.create(&pod, "busybox", &["sleep", "1000"]).await.unwrap();
    client.start(&container).await.unwrap();
    (pod, container)
}

/// A directory outside, with a secret and more.
fn outside() -> TempDir {
    let outside = tempfile::tempdir().unwrap();
    fs::create_dir(outside.path().join("directory")).unwrap();
    for name in ["secret", "directory/file"] {
        fs::write(outside.path().join(name), format!("{SECRET}\n{SECRET}, without an end")).unwrap();
    }
    outside
}

fn untouched(outside: &TempDir) {
    let count = |name: &str| fs::read_dir(outside.path().join(name)).unwrap().count();
    assert_eq!((count("."), count("directory")), (2, 1));
    for name in ["secret", "directory/file"] {
        let text = fs::read_to_string(outside.path().join(name)).unwrap();
        assert_eq!(text, format!("{SECRET}\n{SECRET}, without an end"), "{name}");
    }
}

/// What puts something at a path.
type Trick<'a> = dyn Fn(&Path) + 'a;

/// Puts something else where `path` was.
fn replaced(path: &Path, make: impl FnOnce(&Path)) {
    let _ = fs::remove_file(path);
    let _ = fs::remove_dir_all(path);
    make(path);
}

fn pipe(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

/// Larger than any memory, and takes none.
fn endless(path: &Path) {
    File::create(path).unwrap().set_len(1 << 40).unwrap();
}

#[tokio::test]
async fn what_a_vmm_puts_in_place_of_its_words_is_not_read() {
    let outside = outside();
    let secret = outside.path().join("secret");
    let tricks: [(&str, &Trick<'_>); 4] = [
        ("a link to a secret", &|path| symlink(&secret, path).unwrap()),
        ("a link to an endless device", &|path| symlink("/dev/zero", path).unwrap()),
        ("a named pipe", &pipe),
        ("an endless file", &endless),
    ];
    for (trick, make) in tricks {
        let victim = Victim::new().await;
        for name in ["vmm.log", "console"] {
            replaced(&victim.run().join(name), make);
        }
        victim.kill_vmm().await;
        victim.client.wait_not_ready(&victim.pod).await.unwrap_or_else(|error| panic!("{trick}: {error}"));
        let status =
            victim.client.wait_exit(&victim.container).await.unwrap_or_else(|error| panic!("{trick}: {error}"));
        assert_eq!(status.exit_code, 137, "{trick}");
        let told = victim.told().await;
        assert!(!told.contains(SECRET), "{trick}: {told}");
        victim.end().await;
        untouched(&outside);
    }
}

#[tokio::test]
async fn a_vmm_cannot_have_the_daemon_talk_to_another_pods() {
    let mut victim = Victim::new().await;
    let (neighbour, healthy) = running(&victim.client, victim.logs.path()).await;
    let run_of_neighbour = victim.daemon.path().join("r/pods").join(&neighbour);
    for name in ["vsock", "control"] {
        let target = run_of_neighbour.join(name);
        replaced(&victim.run().join(name), |path| symlink(target, path).unwrap());
    }
    // After a restart no connection is left from before.
    victim.restart().await;
    let call = victim.client.exec_for(&victim.container, &["true"], 5);
    let answer = tokio::time::timeout(limit(60), call).await.expect("an answer");
    assert!(answer.is_err(), "the neighbour's guest was asked: {answer:?}");
    victim.is_well(&neighbour, &healthy).await;
    // Its own end is not the neighbour's.
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: victim.pod.clone() };
    let mut runtime = victim.client.runtime.clone();
    tokio::time::timeout(limit(120), runtime.stop_pod_sandbox(request)).await.expect("an end").unwrap();
    victim.is_well(&neighbour, &healthy).await;
    victim.client.remove_pod(&neighbour).await.unwrap();
    victim.end().await;
}

#[tokio::test]
async fn what_a_vmm_fills_its_directory_with_costs_nobody_anything() {
    let outside = outside();
    let mut victim = Victim::new().await;
    let run = victim.run();
    symlink(outside.path(), run.join("link")).unwrap();
    symlink(outside.path().join("secret"), run.join("vsock_1")).unwrap();
    pipe(&run.join("pipe"));
    endless(&run.join("endless"));
    fs::create_dir_all(run.join("a/b/c")).unwrap();
    symlink(outside.path().join("directory"), run.join("a/b/c/link")).unwrap();
    for name in ["vmm.json", "vmm.log", "console"] {
        replaced(&run.join(name), |path| fs::create_dir(path).unwrap());
    }
    victim.restart().await;
    victim.is_well(&victim.pod, &victim.container).await;
    assert!(!victim.told().await.contains(SECRET));
    victim.end().await;
    untouched(&outside);
}

/// Writes over the arguments that a process shows of itself, as any process can do with its own.
fn pretend(pid: i32, arguments: &[&OsStr]) {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name, in parentheses, may contain anything; fields 48 and 49 are where the arguments are.
    let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let [start, end] = [fields[45], fields[46]].map(|field| field.parse::<u64>().unwrap());
    let mut text: Vec<u8> = arguments.iter().flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect();
    let room = usize::try_from(end - start).unwrap();
    assert!(text.len() <= room, "{} bytes in {room}", text.len());
    text.resize(room, 0);
    File::options().write(true).open(format!("/proc/{pid}/mem")).unwrap().write_all_at(&text, start).unwrap();
}

#[tokio::test]
async fn what_a_vmm_says_in_its_arguments_is_nobodys_evidence() {
    let mut victim = Victim::new().await;
    let (neighbour, healthy) = running(&victim.client, victim.logs.path()).await;
    let outside = outside();
    let run = victim.daemon.path().join("r/pods");
    let vmm = victim.client.vmm_pid(&victim.pod).await.unwrap();
    let up = "../".repeat(run.components().count() + 1);
    let config = run.join(up).join(outside.path().strip_prefix("/").unwrap()).join("x");
    for arguments in [
        vec!["nacelle".as_ref(), "vmm".as_ref(), "--config".as_ref(), config.as_os_str()],
        // The directory of all pods.
        vec!["nacelle".as_ref(), "vmm".as_ref(), "--config".as_ref(), run.join("x").as_os_str()],
        vec![],
    ] {
        pretend(vmm, &arguments);
        victim.restart().await;
        victim.is_well(&victim.pod, &victim.container).await;
        victim.is_well(&neighbour, &healthy).await;
        untouched(&outside);
    }
    victim.client.remove_pod(&neighbour).await.unwrap();
    victim.client.remove_pod(&victim.pod).await.unwrap();
    fs::read_link(format!("/proc/{vmm}/exe")).expect_err("it has ended with its pod");
}

/// A process of nobody that looks like a VMM. Ended when it is dropped.
struct Impostor(Child);

impl Impostor {
    fn new(directory: &Path, config: &Path) -> Self {
        let script = directory.join("vmm");
        fs::write(&script, "echo started; read forever").unwrap();
        let child = Command::new("sh")
            .args([OsStr::new("vmm"), OsStr::new("--config"), config.as_os_str()])
            .current_dir(directory)
            .uid(NOBODY)
            .gid(NOBODY)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = child.unwrap();
        // It is what it pretends to be once it runs.
        let mut word = [0; 8];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut word).unwrap();
        Self(child)
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_user_who_runs_something_that_looks_like_a_vmm_gets_nothing_done() {
    let mut victim = Victim::new().await;
    let outside = outside();
    let own = tempfile::tempdir().unwrap();
    fs::set_permissions(own.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (ran, plugin) = (own.path().join("ran"), own.path().join("plugin"));
    fs::write(&plugin, format!("#!/bin/sh\n: > {}\n", ran.display())).unwrap();
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
    // As if his directory were a pod's, with a network to leave whose plugin is his.
    let list = json!({
        "name": "n", "version": "1.0.0", "disable_check": false, "plugins": [{"type": plugin}], "source": "/n",
    });
    let attachment = json!({
        "list": list, "interface": "eth0", "container_id": "x", "args": "", "capabilities": {}, "result": null,
    });
    let record = json!({"version": 1, "netns": own.path().join("netns"), "attachments": [attachment]});
    fs::write(own.path().join("network.json"), record.to_string()).unwrap();
    let run = victim.daemon.path().join("r/pods");
    let up = run.join("../".repeat(run.components().count() + 1));
    let below = |path: &Path| up.join(path.strip_prefix("/").unwrap()).join("x");
    let mut impostors = [below(own.path()), below(outside.path()), run.join("x"), run.join("no-id/vmm.json")]
        .map(|config| Impostor::new(own.path(), &config));
    victim.restart().await;
    for impostor in &mut impostors {
        assert!(impostor.lives(), "it is no VMM, and nobody's business");
    }
    victim.is_well(&victim.pod, &victim.container).await;
    assert!(own.path().join("network.json").exists() && !ran.exists());
    untouched(&outside);
    drop(impostors);
    victim.end().await;
}

#[tokio::test]
async fn a_lock_on_the_networks_directory_holds_up_no_pod() {
    let mut daemon = Daemon::networked("").unwrap();
    let networks = daemon.path().join("cni");
    let plugins = [json!({"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.219.0.0/24"}})];
    let list = json!({"cniVersion": "1.0.0", "name": "hostile", "plugins": plugins});
    fs::write(networks.join("10-hostile.conflist"), list.to_string()).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    // Anybody can open it for reading, which is all that a lock takes.
    let directory = File::open(&networks).unwrap();
    flock(&directory, FlockOperation::LockExclusive).unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = tokio::time::timeout(limit(60), client.run_pod(logs.path())).await.expect("an answer").unwrap();
    tokio::time::timeout(limit(60), client.remove_pod(&pod)).await.expect("an answer").unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_log_directory_that_leads_elsewhere_is_not_written_through() {
    let outside = outside();
    let daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let id = client.create(&pod, "busybox", &["sh", "-c", "echo said; sleep 1000"]).await.unwrap();
    let path = PathBuf::from(client.status(&id).await.unwrap().log_path);
    let container = path.parent().unwrap();
    let refused = async |trick: &str, word: &str| {
        let error = client.start(&id).await.expect_err(trick);
        assert!(error.message().contains(word), "{trick}: {error}");
        untouched(&outside);
    };
    fs::create_dir(container).unwrap();
    replaced(container, |path| symlink(outside.path().join("directory"), path).unwrap());
    refused("the container's directory is a link", container.to_str().unwrap()).await;
    replaced(container, |path| fs::create_dir(path).unwrap());
    symlink(outside.path().join("secret"), &path).unwrap();
    refused("the log is a link", "symbolic link").await;
    replaced(&path, pipe);
    refused("the log is a named pipe", "named pipe").await;
    // And as soon as it is as it should be, it works.
    replaced(&path, endless);
    client.start(&id).await.unwrap();
    let deadline = tokio::time::Instant::now() + limit(30);
    while !log_lines(&path).is_ok_and(|lines| lines == [("stdout".into(), "said".into())]) {
        assert!(tokio::time::Instant::now() < deadline, "nothing was logged");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    client.remove_pod(&pod).await.unwrap();
}

/// A pod that has a volume of its own logs, as one of `/var/log` would be.
#[tokio::test]
async fn a_pod_that_replaces_its_log_lives_on_and_its_lines_come_when_it_can_be_opened() {
    let outside = outside();
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let script = "i=0; while [ ! -e /tmp/end ]; do i=$((i+1)); echo line $i; usleep 20000; done";
    let mut config = nacelle_tests::client::container_config("busybox", &["sh", "-c", script]);
    config.mounts = vec![cri::Mount {
        host_path: logs.path().to_string_lossy().into_owned(),
        container_path: "/logs".into(),
        ..cri::Mount::default()
    }];
    let name = config.log_path.clone();
    let id = client.create_as(&pod, config).await.unwrap();
    client.start(&id).await.unwrap();
    let (log, target) = (logs.path().join(&name), outside.path().join("secret"));
    let moved = format!("mv /logs/{name} /logs/kept && ln -s {} /logs/{name}", target.display());
    client.shell(&id, &moved).await;
    daemon.kill();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert_eq!(client.pod_status(&pod).await.unwrap().state(), cri::PodSandboxState::SandboxReady);
    assert_eq!(client.status(&id).await.unwrap().state(), cri::ContainerState::ContainerRunning);
    let reopen = cri::ReopenContainerLogRequest { container_id: id.clone() };
    client.runtime.clone().reopen_container_log(reopen).await.expect_err("it is a link");
    untouched(&outside);
    client.shell(&id, &format!("rm /logs/{name} && mv /logs/kept /logs/{name} && touch /tmp/end")).await;
    client.wait_exit(&id).await.unwrap();
    let lines: Vec<_> = log_lines(&log).unwrap().into_iter().map(|line| line.1).collect();
    let expected: Vec<_> = (1..=lines.len()).map(|number| format!("line {number}")).collect();
    assert!(lines == expected && !lines.is_empty(), "{lines:?}");
    client.remove_pod(&pod).await.unwrap();
    untouched(&outside);
    assert_eq!(host::cgroups(&pod), [""; 0]);
}
