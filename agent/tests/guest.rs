//! The agent in a real guest: PID 1 under the project's own VMM.
//!
//! Needs a host that runs guests (hack/vmhost) and three variables: NACELLE_TEST_VMM, a
//! command that takes the path of a machine's configuration as its last argument
//! (`nacelle vmm --config`), NACELLE_TEST_KERNEL and NACELLE_TEST_INITRAMFS. Skipped
//! without them. Prints what each step took.

#![allow(clippy::unwrap_used)]

mod harness;

use std::fs::{self, File};
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use harness::{Agent, make_image, output};
use hyper_util::rt::TokioIo;
use nacelle_proto::agent::v1::agent_client::AgentClient;
use nacelle_proto::agent::v1::{
    ConfigureSandboxRequest, Device, ExecRequest, ForgetExecRequest, InfoRequest, RemoveContainerRequest,
    SetClockRequest, ShutdownRequest, StartContainerRequest, WaitRequest, WaitResponse,
};
use nacelle_proto::stdio::{AGENT_PORT, Header, READY_PORT, STDIO_PORT, Stream};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, recv, sendmsg, socket_with,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

struct Guest {
    directory: tempfile::TempDir,
    vmm: Child,
    control: OwnedFd,
    calls: AgentClient<Channel>,
}

fn took(what: &str, since: Instant) {
    println!("{:9.2} ms  {what}", since.elapsed().as_secs_f64() * 1e3);
}

impl Guest {
    async fn boot(vmm: &str, kernel: &str, initramfs: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let config = json!({
            "id": "agent-test", "kernel": kernel, "initramfs": initramfs, "memory_mib": 256, "vcpus": 1,
            "vsock": path("vsock"), "control": path("control"), "console": path("console")
        });
        fs::write(path("config"), config.to_string()).unwrap();
        let listener = UnixListener::bind(path(&format!("vsock_{READY_PORT}"))).unwrap();
        let start = Instant::now();
        let mut words = vmm.split(' ');
        let mut command = Command::new(words.next().unwrap());
        let vmm = command.args(words).arg(path("config")).spawn().unwrap();
        let (mut ready, _) = listener.accept().unwrap();
        let mut line = String::new();
        ready.read_to_string(&mut line).unwrap();
        took(&format!("exec of the VMM to {line:?}"), start);
        assert!(line.starts_with("ready ") && line.ends_with('\n'), "{line:?}");

        let control = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        connect(&control, &SocketAddrUnix::new(path("control")).unwrap()).unwrap();
        let vsock = path("vsock");
        let connector = tower::service_fn(move |_| {
            let vsock = vsock.clone();
            async move { dial(&vsock, AGENT_PORT).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://agent").connect_with_connector(connector).await.unwrap();
        Self { directory, vmm, control, calls: AgentClient::new(channel) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn control(&self, request: &Value, file: Option<&File>) -> Value {
        let bytes = request.to_string().into_bytes();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        }
        sendmsg(&self.control, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::empty()).unwrap();
        let mut answer = vec![0; 65536];
        let (count, _) = recv(&self.control, answer.as_mut_slice(), RecvFlags::empty()).unwrap();
        serde_json::from_slice(&answer[..count]).unwrap()
    }

    fn add_disk(&self, file: &Path, read_only: bool) -> u32 {
        let file = File::options().read(true).write(!read_only).open(file).unwrap();
        let answer = self.control(&json!({"op": "add_disk", "read_only": read_only}), Some(&file));
        u32::try_from(answer["slot"].as_u64().unwrap_or_else(|| panic!("{answer}"))).unwrap()
    }

    fn remove_device(&self, slot: u32) {
        let answer = self.control(&json!({"op": "remove_device", "slot": slot}), None);
        assert_eq!(answer["result"], "done", "{answer}");
    }

    async fn run(&mut self, id: &str, slot: u32, spec: &Value) -> u32 {
        let start = Instant::now();
        self.calls.create_container(Agent::create(id, slot, spec)).await.unwrap();
        took(&format!("CreateContainer {id}"), start);
        let start = Instant::now();
        let started = self.calls.start_container(StartContainerRequest { container_id: id.into() }).await.unwrap();
        took(&format!("StartContainer {id}"), start);
        started.into_inner().pid
    }

    async fn read(&self, id: &str, exec: &str, stream: Stream) -> String {
        let header = Header { container_id: id.into(), exec_id: exec.into(), stream, offset: 0 };
        let mut socket = dial(&self.path("vsock"), STDIO_PORT).await.unwrap();
        socket.write_all(format!("{}\n", serde_json::to_string(&header).unwrap()).as_bytes()).await.unwrap();
        let mut text = String::new();
        let read = tokio::time::timeout(Duration::from_secs(60), socket.read_to_string(&mut text)).await;
        read.expect("the stream should have ended").unwrap();
        let (reply, rest) = text.split_once('\n').unwrap();
        assert_eq!(reply, r#"{"error":""}"#);
        rest.to_owned()
    }

    async fn wait(&mut self, id: &str, exec: &str) -> WaitResponse {
        self.calls.wait(WaitRequest { container_id: id.into(), exec_id: exec.into() }).await.unwrap().into_inner()
    }

    async fn exec(&mut self, id: &str, exec: &str, args: &[&str]) -> (i32, String) {
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Default::default()
        };
        self.calls.exec(request).await.unwrap();
        let code = self.wait(id, exec).await.exit_code;
        let output = self.read(id, exec, Stream::Stdout).await;
        self.calls.forget_exec(ForgetExecRequest { container_id: id.into(), exec_id: exec.into() }).await.unwrap();
        (code, output)
    }

    /// The guest's clock as a container sees it, in seconds since the Unix epoch.
    async fn date(&mut self, exec: &str) -> i64 {
        self.exec("main", exec, &["date", "+%s"]).await.1.trim().parse().unwrap()
    }

    /// Sets the guest's clock, an hour off and a little off, as the daemon does.
    async fn clock_follows(&mut self) {
        let told = self.calls.set_clock(SetClockRequest::default()).await.unwrap().into_inner();
        let hour = 3_600_000_000_000;
        let request = SetClockRequest { at: told.at, host_time: told.guest_time + hour };
        let stepped = self.calls.set_clock(request).await.unwrap().into_inner();
        assert!(stepped.stepped && stepped.at > told.at, "{stepped:?}");
        // To the instant that the request is about, however late it comes; and so a second time changes nothing.
        let passed = stepped.at - told.at;
        let off = stepped.guest_time - (told.guest_time + hour + passed);
        assert!(off.abs() < 500_000_000, "{off} ns off");
        let again = self.calls.set_clock(request).await.unwrap().into_inner();
        assert!(!again.stepped, "{again:?}");
        let seen = self.date("later").await;
        assert!((seen - stepped.guest_time / 1_000_000_000).unsigned_abs() < 600, "{seen} {stepped:?}");
        // Less than a second is not set, which programs would notice.
        let little = SetClockRequest { at: again.at, host_time: again.guest_time - 400_000_000 };
        let slewed = self.calls.set_clock(little).await.unwrap().into_inner();
        assert!(!slewed.stepped && slewed.guest_time > again.guest_time, "{slewed:?}");
        let back = SetClockRequest { at: told.at, host_time: told.guest_time };
        assert!(self.calls.set_clock(back).await.unwrap().into_inner().stepped);
        let error = self.calls.set_clock(SetClockRequest { at: i64::MAX, host_time: 1 }).await.unwrap_err();
        assert!(error.message().starts_with("at: "), "{error}");
    }

    async fn remove(&mut self, id: &str) -> Vec<Device> {
        let start = Instant::now();
        let request = RemoveContainerRequest { container_id: id.into() };
        let released = self.calls.remove_container(request).await.unwrap().into_inner().released;
        took(&format!("RemoveContainer {id}"), start);
        released
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
        if std::thread::panicking() {
            let console = fs::read(self.path("console")).unwrap_or_default();
            eprintln!("console:\n{}", String::from_utf8_lossy(&console).trim_matches('\0'));
        }
    }
}

async fn dial(vsock: &Path, port: u32) -> std::io::Result<UnixStream> {
    let mut socket = UnixStream::connect(vsock).await?;
    socket.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    while socket.read_u8().await? != b'\n' {}
    Ok(socket)
}

#[tokio::test]
async fn a_pod_s_life_in_a_real_guest() {
    let variable = |name| std::env::var(format!("NACELLE_TEST_{name}"));
    let (Ok(vmm), Ok(kernel), Ok(initramfs)) = (variable("VMM"), variable("KERNEL"), variable("INITRAMFS")) else {
        eprintln!("skipped: NACELLE_TEST_VMM, NACELLE_TEST_KERNEL and NACELLE_TEST_INITRAMFS are not set");
        return;
    };
    let mut guest = Guest::boot(&vmm, &kernel, &initramfs).await;
    let start = Instant::now();
    let info = guest.calls.info(InfoRequest {}).await.unwrap().into_inner();
    took("first call answered", start);
    assert!(info.kernel_release.starts_with("6."), "{info:?}");

    let image = make_image(guest.directory.path());
    let scratch = guest.path("scratch");
    File::create(&scratch).unwrap().set_len(64 << 20).unwrap();
    output(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&scratch));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let start = Instant::now();
    let slot = guest.add_disk(&scratch, false);
    let configure = ConfigureSandboxRequest {
        hostname: "pod-name".into(),
        resolv_conf: b"nameserver 192.0.2.1\n".to_vec(),
        sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into(),
        scratch: Some(Device { slot }),
        clock_seconds: i64::try_from(now.as_secs()).unwrap(),
        ..Default::default()
    };
    guest.calls.configure_sandbox(configure.clone()).await.unwrap();
    took("scratch disk added and sandbox configured", start);
    guest.calls.configure_sandbox(configure).await.unwrap();

    let first = guest.add_disk(&image, true);
    let mut spec =
        Agent::spec(&["sh", "-c", "cat /etc/resolv.conf; hostname; echo kept > /kept; while true; do sleep 1; done"]);
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20}, "pids": {"limit": 20}, "cpu": {"shares": 512, "quota": 50000, "period": 100000},
        "devices": [{"allow": false, "access": "rwm"}]
    });
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev"]
    }));
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid", "noexec", "nodev"]
    }));
    spec["mounts"].as_array_mut().unwrap().reverse();
    guest.run("main", first, &spec).await;
    let limits = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                  cat /kept; grep -c lo: /proc/net/dev; grep ' / ' /proc/mounts | head -n 1";
    let (code, seen) = guest.exec("main", "limits", &["sh", "-c", limits]).await;
    assert!(seen.starts_with("67108864\n20\n50000 100000\n0\nkept\n1\noverlay / overlay "), "{seen}");
    assert_eq!(code, 0);

    let rounds = 20;
    let start = Instant::now();
    for round in 0..rounds {
        assert_eq!(guest.exec("main", &format!("e{round}"), &["true"]).await.0, 0);
    }
    println!(
        "{:9.2} ms  exec of true with its output and end, mean of {rounds}",
        start.elapsed().as_secs_f64() * 1e3 / f64::from(rounds)
    );

    // More than the limit: the kernel kills, and the agent says so.
    let second = guest.add_disk(&image, true);
    let mut spec = Agent::spec(&[
        "sh",
        "-c",
        "head -c 100000000 /dev/zero | sha256sum; dd if=/dev/zero of=/dev/null bs=100M count=1",
    ]);
    spec["linux"]["resources"] = json!({"memory": {"limit": 32 << 20, "swap": 32 << 20}});
    guest.run("greedy", second, &spec).await;
    let end = guest.wait("greedy", "").await;
    assert!(end.oom_killed && end.exit_code != 0, "{end:?}");
    assert!(guest.read("greedy", "", Stream::Stdout).await.contains("  -\n"));
    assert_eq!(guest.remove("greedy").await, [Device { slot: second }]);
    guest.remove_device(second);
    // The same slot, found again.
    let again = guest.add_disk(&image, true);
    guest.run("again", again, &Agent::spec(&["sh", "-c", "seq 1 100000 | sha256sum"])).await;
    assert_eq!(guest.wait("again", "").await.exit_code, 0);
    assert!(
        guest.read("again", "", Stream::Stdout).await.starts_with("b2bc7d3f"),
        "{}",
        guest.read("again", "", Stream::Stdout).await
    );
    let finished = Duration::from_nanos(guest.wait("again", "").await.finished_at.unsigned_abs());
    let lag = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().abs_diff(finished);
    assert!(lag < Duration::from_secs(10), "the guest's clock is off by {lag:?}");

    // A child that the kernel killed is no end of the container for want of memory.
    let third = guest.add_disk(&image, true);
    let mut spec = Agent::spec(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=100M count=1; exit 3"]);
    spec["linux"]["resources"] = json!({"memory": {"limit": 32 << 20, "swap": 32 << 20}});
    guest.run("parent", third, &spec).await;
    let end = guest.wait("parent", "").await;
    assert_eq!((end.exit_code, end.oom_killed), (3, false), "{end:?}");
    assert_eq!(guest.remove("parent").await, [Device { slot: third }]);
    guest.remove_device(third);
    // What a node has, whatever little memory the guest starts with.
    let limits = "cd /proc/sys; cat kernel/threads-max fs/file-max fs/inotify/max_user_watches fs/epoll/max_user_watches; \
                  grep SigQ /proc/self/status";
    let (_, limits) = guest.exec("main", "node", &["sh", "-c", limits]).await;
    let (limits, signals) = limits.split_once("SigQ").unwrap();
    assert_eq!(limits, "4194304\n9223372036854775807\n1048576\n4194304\n");
    assert!(signals.ends_with("/131072\n"), "{signals}");

    guest.clock_follows().await;

    let end = guest.exec("main", "memory", &["sh", "-c", "grep -E 'VmRSS|VmHWM|RssAnon' /proc/1/status"]).await;
    println!("container's own: {:?}", end.1);
    let start = Instant::now();
    guest.calls.shutdown(ShutdownRequest {}).await.unwrap();
    took("Shutdown answered", start);
    let status = guest.vmm.wait().unwrap();
    took("VMM ended", start);
    assert!(status.success(), "an orderly power-off is no crash: {status}");
}
