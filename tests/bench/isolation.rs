//! A pod beside another one that is in every trouble at once, against the same beside that pod at rest: CreateContainer
//! with StartContainer, and ExecSync. The other pod's containers have a volume on a file system that never answers, its
//! guest is frozen, with calls waiting for both, and images are pulled from a registry that sends a few bytes at a time.
//!
//! Both are measured by the real clock, for what could hold the pod up is waiting; in turns, the one that comes first
//! changing with each round.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, limit};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::report::Report;

/// Measurements of each kind in a round, beside each of the two.
const SAMPLES: usize = 3;
/// Calls that hang in the other pod, of each kind.
const HANGING: usize = 4;
/// Images that are pulled meanwhile.
const PULLS: usize = 2;
/// What the registry sends at a time, and how often.
const DRIP: [u8; 16] = [0; 16];
const PAUSE: Duration = Duration::from_millis(500);

/// Costs beside the troubled pod and beside the idle one.
#[derive(Default)]
struct Costs {
    container: Vec<f64>,
    exec: Vec<f64>,
}

/// Alternates both, after a round that does not count.
pub async fn run(rounds: usize) -> Result<Vec<Report>> {
    let logs = tempfile::tempdir()?;
    let client = Client::node().await;
    client.pull("busybox").await?;
    let (pod, other) = (client.run_pod(logs.path()).await?, client.run_pod(logs.path()).await?);
    let sleeping = client.create(&pod, "busybox", &["sleep", "100000"]).await?;
    client.start(&sleeping).await?;
    let neighbour = Neighbour::new(&client, other.clone()).await?;
    let (mut troubled, mut idle) = (Costs::default(), Costs::default());
    for round in 0..=rounds {
        if round == 1 {
            (troubled, idle) = (Costs::default(), Costs::default());
        }
        for second in [false, true] {
            if second == (round % 2 == 0) {
                let trouble = neighbour.trouble(&client).await?;
                measure(&client, &pod, &sleeping, &mut troubled).await?;
                neighbour.end(&client, trouble).await?;
            } else {
                measure(&client, &pod, &sleeping, &mut idle).await?;
            }
        }
    }
    client.remove_pod(&pod).await?;
    client.remove_pod(&other).await?;
    let report = |name: &str, ours, peer| Report {
        name: format!("isolation.{name}"),
        unit: "ms".into(),
        ours,
        peer,
        peer_name: "beside a pod at rest".into(),
    };
    Ok(vec![report("container", troubled.container, idle.container), report("exec", troubled.exec, idle.exec)])
}

async fn measure(client: &Client, pod: &str, sleeping: &str, costs: &mut Costs) -> Result<()> {
    for _ in 0..SAMPLES {
        let begun = Instant::now();
        let container = client.create(pod, "busybox", &["sleep", "100000"]).await?;
        client.start(&container).await?;
        costs.container.push(begun.elapsed().as_secs_f64() * 1e3);
        client.remove(&container).await?;
        let begun = Instant::now();
        let answer = client.exec(sleeping, &["true"]).await?;
        costs.exec.push(begun.elapsed().as_secs_f64() * 1e3);
        if answer.exit_code != 0 {
            bail!("true failed in the pod: {answer:?}");
        }
    }
    Ok(())
}

/// The pod that comes into trouble.
struct Neighbour {
    pod: String,
    container: String,
    vmm: Pid,
    registry: String,
}

/// What is wrong, until it is dropped.
struct Trouble {
    hung: Hung,
    calls: JoinSet<()>,
    answered: Arc<AtomicU32>,
}

impl Neighbour {
    async fn new(client: &Client, pod: String) -> Result<Self> {
        let container = client.create(&pod, "busybox", &["sleep", "100000"]).await?;
        client.start(&container).await?;
        let vmm = Pid::from_raw(client.vmm_pid(&pod).await?).context("a process id")?;
        Ok(Self { pod, container, vmm, registry: trickling_registry().await? })
    }

    /// Brings it into trouble, and has calls wait in it.
    async fn trouble(&self, client: &Client) -> Result<Trouble> {
        let hung = Hung::mount()?;
        let at_rest = hung.asked()?;
        kill_process(self.vmm, Signal::STOP)?;
        let (mut calls, answered) = (JoinSet::new(), Arc::new(AtomicU32::new(0)));
        for number in 0..HANGING {
            let (own, pod, answers, path) = (client.clone(), self.pod.clone(), answered.clone(), hung.path(number));
            calls.spawn(async move {
                loop {
                    let made = own.create_as(&pod, with_volume(&path)).await;
                    tell(&made, &answers).await;
                }
            });
            let (own, container, answers) = (client.clone(), self.container.clone(), answered.clone());
            calls.spawn(async move {
                loop {
                    let ran = own.exec(&container, &["true"]).await;
                    tell(&ran, &answers).await;
                }
            });
        }
        for number in 0..PULLS {
            let (own, answers, image) = (client.clone(), answered.clone(), format!("{}/{number}:1", self.registry));
            calls.spawn(async move {
                loop {
                    let spec = cri::ImageSpec { image: image.clone(), ..Default::default() };
                    let request = cri::PullImageRequest { image: Some(spec), ..Default::default() };
                    let pulled = own.images.clone().pull_image(request).await;
                    tell(&pulled, &answers).await;
                }
            });
        }
        // Until all of them hang where they are to.
        let deadline = Instant::now() + limit(10);
        while hung.asked()? <= at_rest {
            if Instant::now() > deadline {
                bail!("nobody asks the file system that does not answer");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Trouble { hung, calls, answered })
    }

    /// Ends all trouble, and waits until the pod is as before.
    async fn end(&self, client: &Client, mut trouble: Trouble) -> Result<()> {
        if trouble.answered.load(Ordering::Relaxed) > 0 {
            bail!("a call that was to hang was answered");
        }
        trouble.calls.shutdown().await;
        drop(trouble.hung);
        kill_process(self.vmm, Signal::CONT)?;
        let deadline = Instant::now() + limit(60);
        while !client.exec(&self.container, &["true"]).await.is_ok_and(|answer| answer.exit_code == 0) {
            if Instant::now() > deadline {
                bail!("the pod that was in trouble does not come back");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // What was to be created is created and removed again, in turn: this comes after all of that.
        let container = client.create(&self.pod, "busybox", &["sleep", "100000"]).await?;
        client.remove(&container).await?;
        Ok(())
    }
}

/// Counts an answer that was not to come; one that says that it does not come is fine, and asked for again.
async fn tell<T>(answer: &Result<T, tonic::Status>, answered: &AtomicU32) {
    match answer {
        Ok(_) => drop(answered.fetch_add(1, Ordering::Relaxed)),
        // As patient as a kubelet.
        Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
    }
}

fn with_volume(path: &Path) -> cri::ContainerConfig {
    let mount = cri::Mount {
        host_path: path.to_string_lossy().into_owned(),
        container_path: "/data".into(),
        ..cri::Mount::default()
    };
    cri::ContainerConfig { mounts: vec![mount], ..container_config("busybox", &["sleep", "100000"]) }
}

/// A file system whose server never answers; whoever waits for it gets an error when this is dropped.
struct Hung {
    directory: TempDir,
    /// By its number, as the kernel's list of such file systems has it.
    device: u32,
    _server: File,
}

impl Hung {
    fn mount() -> Result<Self> {
        let _ = Command::new("modprobe").arg("fuse").status();
        let directory = tempfile::tempdir()?;
        let server =
            File::options().read(true).write(true).open("/dev/fuse").context("open /dev/fuse: modprobe fuse")?;
        let options = CString::new(format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd()))?;
        mount("hung", directory.path(), "fuse", MountFlags::empty(), options.as_c_str()).context("mount by FUSE")?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let place = directory.path().to_string_lossy().into_owned();
        let line = mounts.lines().find(|line| line.split(' ').nth(4) == Some(&place)).context("the mount")?;
        let device = line.split(' ').nth(2).and_then(|device| device.strip_prefix("0:")).context("a device")?;
        Ok(Self { directory, device: device.parse()?, _server: server })
    }

    fn path(&self, number: usize) -> PathBuf {
        self.directory.path().join(number.to_string())
    }

    /// How many requests wait for an answer, the kernel's own included.
    fn asked(&self) -> Result<u32> {
        let connections = Path::new("/sys/fs/fuse/connections");
        if std::fs::read_dir(connections).map_or(0, Iterator::count) == 0 {
            mount("fusectl", connections, "fusectl", MountFlags::empty(), None::<&CStr>).context("mount fusectl")?;
        }
        let waiting = std::fs::read_to_string(connections.join(self.device.to_string()).join("waiting"))?;
        Ok(waiting.trim().parse()?)
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        let _ = unmount(self.directory.path(), UnmountFlags::DETACH | UnmountFlags::FORCE);
    }
}

/// A registry whose images never come to their end; its name.
async fn trickling_registry() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let name = listener.local_addr()?.to_string();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            tokio::spawn(trickle(connection));
        }
    });
    Ok(name)
}

/// Answers the requests of a connection: with a manifest, and with blobs that come a few bytes at a time.
async fn trickle(mut connection: TcpStream) -> std::io::Result<()> {
    let digest = |digit: &str| format!("sha256:{}", digit.repeat(64));
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest("a"), "size": 100_000 },
        "layers": [
            { "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest("b"), "size": 50_000_000 },
            { "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest("c"), "size": 50_000_000 },
        ],
    });
    let manifest = manifest.to_string();
    let mut head = Vec::new();
    loop {
        let mut chunk = [0; 4096];
        let got = connection.read(&mut chunk).await?;
        head.extend_from_slice(chunk.get(..got).unwrap_or_default());
        // What begins so is TLS, which it does not speak.
        if got == 0 || head.first() == Some(&0x16) {
            return Ok(());
        }
        if !head.ends_with(b"\r\n\r\n") {
            continue;
        }
        let request = String::from_utf8_lossy(&head).into_owned();
        head.clear();
        let answer = |length: usize| {
            let kind = "application/vnd.oci.image.manifest.v1+json";
            format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n")
        };
        let path = request.split(' ').nth(1).unwrap_or_default();
        if path.contains("/manifests/") {
            connection.write_all(answer(manifest.len()).as_bytes()).await?;
            if request.starts_with("GET") {
                connection.write_all(manifest.as_bytes()).await?;
            }
        } else if path.contains("/blobs/") {
            let length = if path.ends_with('a') { 100_000 } else { 50_000_000 };
            connection.write_all(answer(length).as_bytes()).await?;
            loop {
                connection.write_all(&DRIP).await?;
                tokio::time::sleep(PAUSE).await;
            }
        } else {
            connection.write_all(answer(0).as_bytes()).await?;
        }
    }
}
