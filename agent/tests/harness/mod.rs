//! An agent without a guest: the same service in namespaces of its own, with a real EROFS
//! image on a loop device in place of a hot-added disk.

#![allow(dead_code, clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use nacelle_proto::agent::v1::agent_client::AgentClient;
use nacelle_proto::agent::v1::{
    ConfigureSandboxRequest, CreateContainerRequest, Device, ExecRequest, RemoveContainerRequest,
    StartContainerRequest, WaitRequest,
};
use nacelle_proto::stdio::{Header, Reply, Stream};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// Slots of the pretended bus that hold the image.
pub const SLOTS: std::ops::RangeInclusive<u32> = 1..=12;

/// Whether this machine can run these tests; says why not.
pub fn possible() -> bool {
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let missing = [
        ("root", rustix::process::geteuid().is_root()),
        ("loop devices", Path::new("/dev/loop-control").exists()),
        ("erofs", filesystems.contains("erofs")),
        ("overlay", filesystems.contains("overlay")),
        ("/bin/busybox (busybox-static)", Path::new("/bin/busybox").exists()),
    ]
    .into_iter()
    .filter_map(|(what, there)| (!there).then_some(what))
    .collect::<Vec<_>>();
    if !missing.is_empty() {
        eprintln!("skipped: this machine has no {}", missing.join(", "));
    }
    missing.is_empty()
}

pub struct Agent {
    pub calls: AgentClient<Channel>,
    process: Process,
}

/// What there is of an agent on this machine. Dropped, it is gone, whoever fails meanwhile: an agent that
/// outlived its test would keep the test program's output open, for which its caller waits.
struct Process {
    directory: TempDir,
    device: String,
    child: Child,
}

impl Agent {
    /// An agent with a configured sandbox.
    pub async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["run", "sockets", "cgroup"] {
            fs::create_dir(path(name)).unwrap();
        }
        let image = make_image(directory.path());
        let device = output(Command::new("losetup").args(["--find", "--show", "--read-only"]).arg(&image));
        let name = Path::new(&device).file_name().unwrap();
        for slot in SLOTS {
            let block = format!("sysfs/bus/pci/devices/0000:00:{slot:02x}.0/virtio0/block");
            fs::create_dir_all(path(&block).join(name)).unwrap();
        }
        let script = format!(
            "mount -t cgroup2 none {d}/cgroup && mkdir {d}/cgroup/{id} && echo $$ > {d}/cgroup/{id}/cgroup.procs && \
             exec unshare --cgroup sh -c 'umount -l {d}/cgroup && mount -t cgroup2 none /sys/fs/cgroup && \
             mkdir -p /sys/fs/cgroup/pod && mount -t tmpfs none {d}/run && \
             exec {agent} serve {d}/run {d}/sysfs {d}/sockets'",
            d = directory.path().display(),
            id = cgroup_name(directory.path()),
            agent = env!("CARGO_BIN_EXE_nacelle-agent"),
        );
        let child = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--mount-proc", "--net", "--uts", "--ipc", "--kill-child"])
            .args(["sh", "-c", &script])
            .spawn()
            .unwrap();
        let socket = path("sockets/agent");
        let process = Process { directory, device, child };
        let mut agent = Self { calls: connect(socket).await, process };
        let configure = ConfigureSandboxRequest { hostname: "pod-name".into(), ..Default::default() };
        agent.calls.configure_sandbox(configure).await.unwrap();
        agent
    }

    /// A plain specification running `args`.
    pub fn spec(args: &[&str]) -> Value {
        json!({
            "ociVersion": "1.1.0",
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": args, "env": ["PATH=/bin"],
                "capabilities": {
                    "bounding": ["CAP_CHOWN", "CAP_MKNOD"], "effective": ["CAP_CHOWN", "CAP_MKNOD"],
                    "permitted": ["CAP_CHOWN", "CAP_MKNOD"]
                }
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}
            ],
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}]}
        })
    }

    pub fn create(id: &str, slot: u32, spec: &Value) -> CreateContainerRequest {
        CreateContainerRequest {
            container_id: id.into(),
            spec_json: spec.to_string().into_bytes(),
            rootfs: Some(Device { slot }),
            ..Default::default()
        }
    }

    /// Creates and starts a container running `args`.
    pub async fn run(&mut self, id: &str, slot: u32, args: &[&str]) {
        self.calls.create_container(Self::create(id, slot, &Self::spec(args))).await.unwrap();
        self.start_container(id).await.unwrap();
    }

    pub async fn start_container(&mut self, id: &str) -> Result<u32, tonic::Status> {
        let request = StartContainerRequest { container_id: id.into() };
        Ok(self.calls.start_container(request).await?.into_inner().pid)
    }

    pub async fn exec(&mut self, id: &str, exec: &str, args: &[&str]) -> Result<u32, tonic::Status> {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let request = ExecRequest { container_id: id.into(), exec_id: exec.into(), args, ..Default::default() };
        Ok(self.calls.exec(request).await?.into_inner().pid)
    }

    /// Runs a command in a container to its end: exit code and output.
    pub async fn exec_output(&mut self, id: &str, exec: &str, args: &[&str]) -> (i32, String) {
        self.exec(id, exec, args).await.unwrap();
        let output = self.read(id, exec, Stream::Stdout).await;
        (self.wait(id, exec).await, output)
    }

    pub async fn wait(&mut self, id: &str, exec: &str) -> i32 {
        let request = WaitRequest { container_id: id.into(), exec_id: exec.into() };
        let waited = tokio::time::timeout(Duration::from_secs(20), self.calls.wait(request)).await;
        waited.expect("the process should have ended").unwrap().into_inner().exit_code
    }

    pub async fn remove(&mut self, id: &str) -> Vec<u32> {
        let request = RemoveContainerRequest { container_id: id.into() };
        let released = self.calls.remove_container(request).await.unwrap().into_inner().released;
        released.iter().map(|device| device.slot).collect()
    }

    /// Opens a stream; an error is the agent's refusal.
    pub async fn open(
        &self,
        id: &str,
        exec: &str,
        stream: Stream,
        offset: u64,
    ) -> Result<BufReader<UnixStream>, String> {
        let header = Header { container_id: id.into(), exec_id: exec.into(), stream, offset };
        let socket = UnixStream::connect(self.process.directory.path().join("sockets/stdio")).await.unwrap();
        let mut socket = BufReader::new(socket);
        socket.write_all(format!("{}\n", serde_json::to_string(&header).unwrap()).as_bytes()).await.unwrap();
        let mut line = String::new();
        socket.read_line(&mut line).await.unwrap();
        match serde_json::from_str::<Reply>(&line).unwrap().error {
            error if error.is_empty() => Ok(socket),
            error => Err(error),
        }
    }

    /// The whole of a stream, once it has ended.
    pub async fn read(&self, id: &str, exec: &str, stream: Stream) -> String {
        let mut socket = self.open(id, exec, stream, 0).await.unwrap();
        let mut bytes = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(20), socket.read_to_end(&mut bytes)).await;
        read.expect("the stream should have ended").unwrap();
        String::from_utf8(bytes).unwrap()
    }

    /// What the agent's mount namespace holds below its directory, the tmpfs itself apart.
    pub fn mounts(&self) -> Vec<String> {
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", self.pid())).unwrap();
        let run = format!("{}/", self.process.directory.path().join("run").display());
        let below = |line: &&str| line.split(' ').nth(1).is_some_and(|target| target.starts_with(&run));
        mounts.lines().filter(below).map(str::to_owned).collect()
    }

    /// Files and directories left in the agent's own places for containers.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        let root =
            PathBuf::from(format!("/proc/{}/root{}", self.pid(), self.process.directory.path().join("run").display()));
        let places = ["containers", "state", "scratch/containers"].map(|name| root.join(name));
        let cgroups = fs::read_dir(format!("/proc/{}/root/sys/fs/cgroup/pod", self.pid())).unwrap();
        let groups = cgroups.flatten().filter(|entry| entry.file_type().unwrap().is_dir()).map(|entry| entry.path());
        let files = places.iter().flat_map(|place| fs::read_dir(place).into_iter().flatten().flatten());
        files.map(|entry| entry.path()).chain(groups).collect()
    }

    /// The control groups below a container's own.
    pub fn groups(&self, id: &str) -> Vec<PathBuf> {
        let group = fs::read_dir(format!("/proc/{}/root/sys/fs/cgroup/pod/{id}", self.pid())).unwrap();
        group.flatten().filter(|entry| entry.file_type().unwrap().is_dir()).map(|entry| entry.path()).collect()
    }

    /// The agent's process id: the child of unshare's.
    fn pid(&self) -> String {
        let children = format!("/proc/{id}/task/{id}/children", id = self.process.child.id());
        fs::read_to_string(children).unwrap().trim().to_owned()
    }

    /// Waits for the agent to end by itself.
    pub fn ended(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if self.process.child.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
        // The group is of the machine's hierarchy, wherever that is mounted.
        let name = cgroup_name(self.directory.path());
        for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            let group = Path::new(root).join(&name);
            let _ = fs::remove_dir(group.join("pod")).and_then(|()| fs::remove_dir(group));
        }
    }
}

fn cgroup_name(directory: &Path) -> String {
    format!("nacelle-test-{}", directory.file_name().unwrap().to_str().unwrap().trim_start_matches('.'))
}

async fn connect(socket: PathBuf) -> AgentClient<Channel> {
    let deadline = Instant::now() + Duration::from_secs(10);
    // A socket is there a moment before anybody listens on it.
    while let Err(error) = UnixStream::connect(&socket).await {
        assert!(Instant::now() < deadline, "the agent does not start: {error}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://agent").connect_with_connector(connector).await.unwrap();
    AgentClient::new(channel)
}

/// A busybox with users, as an EROFS file system.
pub fn make_image(directory: &Path) -> PathBuf {
    let root = directory.join("image");
    for name in ["bin", "etc", "srv", "proc"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in [
        "sh",
        "cat",
        "echo",
        "id",
        "sleep",
        "true",
        "false",
        "seq",
        "pwd",
        "stty",
        "tty",
        "mkdir",
        "touch",
        "mknod",
        "head",
        "dd",
        "env",
        "grep",
        "setsid",
        "date",
        "kill",
        "hostname",
        "sha256sum",
        "ls",
        "rm",
    ] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nwww:x:33:34::/srv:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nwww:x:34:\nadm:x:4:www\n").unwrap();
    fs::write(root.join("srv/plain"), "no program\n").unwrap();
    fs::set_permissions(root.join("srv/plain"), fs::Permissions::from_mode(0o644)).unwrap();
    let image = directory.join("image.erofs");
    output(Command::new("mkfs.erofs").args(["-T0", "--quiet"]).arg(&image).arg(&root));
    image
}

/// Standard output of a command that must succeed.
pub fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
