//! What a container expects of Linux, as it finds it on any node.

use std::os::unix::net::UnixListener;
use std::path::Path;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, limit, pod_config};
use nacelle_tests::streaming::Spdy;
use tempfile::TempDir;
use tonic::Code;

use crate::contexts::of_pod;

/// A pod, and what it takes to make containers in it.
struct Pod {
    client: Client,
    id: String,
    logs: TempDir,
}

impl Pod {
    async fn run(image: &str) -> Self {
        let logs = tempfile::tempdir().unwrap();
        let config = pod_config(logs.path());
        Self::run_as(image, config, logs).await
    }

    async fn run_as(image: &str, config: cri::PodSandboxConfig, logs: TempDir) -> Self {
        let client = Client::node().await;
        client.pull(image).await.unwrap();
        let id = client.run_pod_as(config).await.unwrap();
        Self { client, id, logs }
    }

    async fn start(&self, config: cri::ContainerConfig) -> String {
        let container = self.client.create_as(&self.id, config).await.unwrap();
        self.client.start(&container).await.unwrap();
        container
    }

    async fn remove(self) {
        self.client.remove_pod(&self.id).await.unwrap();
        drop(self.logs);
    }
}

fn sleeper(image: &str) -> cri::ContainerConfig {
    container_config(image, &["sleep", "100000"])
}

fn security(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

fn mount(host: &Path, container: &str) -> cri::Mount {
    cri::Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: container.into(),
        ..cri::Mount::default()
    }
}

#[tokio::test]
async fn a_terminal_of_an_exec_is_of_a_known_kind() {
    let pod = Pod::run("busybox").await;
    let id = pod.start(sleeper("busybox")).await;
    let exec = cri::ExecRequest {
        container_id: id.clone(),
        cmd: ["sh", "-c", "echo kind $TERM; clear; echo $?"].map(str::to_owned).to_vec(),
        tty: true,
        stdout: true,
        ..Default::default()
    };
    let mut spdy = Spdy::connect(&pod.client.exec_url(exec).await.unwrap(), "v4.channel.k8s.io").await.unwrap();
    let [_, stdout, _] = spdy.open_all(["error", "stdout", "resize"]).await.unwrap();
    let said = spdy.finish(stdout).await.unwrap();
    assert!(said.contains("kind xterm") && said.trim_end().ends_with('0'), "{said:?}");
    assert_eq!(pod.client.shell(&id, "echo kind $TERM").await, "kind", "there is no terminal");
    pod.remove().await;
}

/// Binds a port of the system's, and has an echo answered, without any capability.
const UNPRIVILEGED: &str = "
import os, socket
assert os.getuid() == 1000
socket.socket().bind(('', 80))
echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
echo.settimeout(60)
echo.sendto(bytes([8, 0, 0, 0, 0, 0, 0, 1]) + b'hello', ('127.0.0.1', 0))
assert echo.recv(100).endswith(b'hello')
print('forwards', open('/proc/sys/net/ipv4/ip_forward').read().strip())
";

#[tokio::test]
async fn who_is_not_root_binds_low_ports_and_pings_unless_the_pod_says_otherwise() {
    for mapped in [false, true] {
        let logs = tempfile::tempdir().unwrap();
        let mut config = pod_config(logs.path());
        let ids = || vec![cri::IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
        let namespace = cri::UserNamespace { mode: cri::NamespaceMode::Pod.into(), uids: ids(), gids: ids() };
        let namespace = mapped.then_some(namespace);
        of_pod(&mut config).namespace_options.get_or_insert_default().userns_options = namespace.clone();
        let pod = Pod::run_as("debian", config, logs).await;
        let mut config = sleeper("debian");
        let context = security(&mut config);
        context.run_as_user = Some(cri::Int64Value { value: 1000 });
        context.namespace_options.get_or_insert_default().userns_options = namespace;
        context.capabilities =
            Some(cri::Capability { drop_capabilities: vec!["ALL".into()], ..cri::Capability::default() });
        let id = pod.start(config).await;
        let answer = pod.client.exec(&id, &["python3", "-c", UNPRIVILEGED]).await.unwrap();
        let said = String::from_utf8_lossy(&[answer.stdout, answer.stderr].concat()).into_owned();
        assert_eq!((answer.exit_code, said.trim()), (0, "forwards 1"), "user namespace: {mapped}");
        pod.remove().await;
    }

    let logs = tempfile::tempdir().unwrap();
    let mut config = pod_config(logs.path());
    let sysctls = [("net.ipv4.ip_unprivileged_port_start", "1024"), ("net.ipv4.ip_forward", "0")];
    config.linux.get_or_insert_default().sysctls =
        sysctls.map(|(name, value)| (name.to_owned(), value.to_owned())).into_iter().collect();
    let pod = Pod::run_as("busybox", config, logs).await;
    let id = pod.start(sleeper("busybox")).await;
    let seen = "cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ip_forward";
    assert_eq!(pod.client.shell(&id, seen).await, "1024\n0");
    pod.remove().await;
}

/// Makes a tunnel.
const TUNNEL: &str = "
import fcntl, os, struct
tunnel = os.open('/dev/net/tun', os.O_RDWR)
fcntl.ioctl(tunnel, 0x400454ca, struct.pack('16sH14x', b'vpn0', 0x1001))
assert os.path.exists('/sys/class/net/vpn0')
os.close(os.open('/dev/file-systems', os.O_RDWR))
";

#[tokio::test]
async fn a_tunnel_and_a_file_system_in_user_space_need_no_privilege() {
    let pod = Pod::run("debian").await;
    let mut config = sleeper("debian");
    config.mounts = vec![mount(Path::new("/dev/net/tun"), "/dev/net/tun")];
    config.devices = vec![cri::Device {
        host_path: "/dev/fuse".into(),
        container_path: "/dev/file-systems".into(),
        permissions: "rw".into(),
    }];
    security(&mut config).capabilities =
        Some(cri::Capability { add_capabilities: vec!["NET_ADMIN".into()], ..cri::Capability::default() });
    let id = pod.start(config).await;
    let answer = pod.client.exec(&id, &["python3", "-c", TUNNEL]).await.unwrap();
    assert_eq!(answer.exit_code, 0, "{}", String::from_utf8_lossy(&answer.stderr));

    // Who did not ask has neither, whatever it calls them.
    let mut config = sleeper("debian");
    config.metadata.as_mut().unwrap().name = "other".into();
    let id = pod.start(config).await;
    let script = "ls /dev/net /dev/fuse; mknod /tmp/tun c 10 200 && cat /tmp/tun";
    let answer = pod.client.exec(&id, &["sh", "-c", script]).await.unwrap();
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(answer.exit_code != 0 && said.contains("Operation not permitted"), "{said}");
    pod.remove().await;
}

#[tokio::test]
async fn a_mount_goes_where_a_link_of_the_image_leads_also_to_nothing() {
    let host = tempfile::tempdir().unwrap();
    std::fs::write(host.path().join("zone"), "a zone").unwrap();
    std::fs::write(host.path().join("token"), "a token").unwrap();
    let pod = Pod::run("links").await;
    let mut config = sleeper("links");
    config.mounts = vec![
        mount(&host.path().join("zone"), "/etc/localtime"),
        mount(&host.path().join("token"), "/var/run/secrets/token"),
    ];
    let id = pod.start(config).await;
    let seen = "cat /etc/localtime /usr/share/zoneinfo/UTC /runtime/secrets/token; echo; \
                cmp /etc/resolv.conf /run/systemd/resolve/stub-resolv.conf && wc -c < /etc/hostname > /dev/null && echo same";
    assert_eq!(pod.client.shell(&id, seen).await, "a zonea zonea token\nsame");
    pod.remove().await;
}

#[tokio::test]
async fn a_socket_of_the_host_answers_nobody_and_is_told_of_at_once() {
    let host = tempfile::tempdir().unwrap();
    let socket = host.path().join("daemon.sock");
    let _daemon = UnixListener::bind(&socket).unwrap();
    let pod = Pod::run("debian").await;
    let mut config = sleeper("debian");
    config.mounts = vec![mount(&socket, "/daemon.sock")];
    let refused = pod.client.create_as(&pod.id, config).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert!(refused.message().contains("config.mounts[0].host_path: ") && refused.message().contains("socket"));

    // Where its directory is mounted, a client is not kept waiting.
    let mut config = sleeper("debian");
    config.mounts = vec![mount(host.path(), "/shared")];
    let id = pod.start(config).await;
    let script = "
import socket
client = socket.socket(socket.AF_UNIX)
client.settimeout(60)
try: client.connect('/shared/daemon.sock')
except ConnectionRefusedError: print('refused')
";
    let timeout = i64::try_from(limit(30).as_secs()).unwrap();
    let answer = pod.client.exec_for(&id, &["python3", "-c", script], timeout).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&answer.stdout).trim(), "refused");
    pod.remove().await;
}

#[tokio::test]
async fn a_privileged_container_has_an_overlay_on_a_file_system_in_memory() {
    let logs = tempfile::tempdir().unwrap();
    let mut config = pod_config(logs.path());
    of_pod(&mut config).privileged = true;
    let pod = Pod::run_as("busybox", config, logs).await;
    let mut config = sleeper("busybox");
    security(&mut config).privileged = true;
    let id = pod.start(config).await;
    let script = "mkdir -p /v /mnt; mount -t tmpfs t /v; mkdir /v/l /v/u /v/w; echo x > /v/l/a
        mount -t overlay o -o lowerdir=/v/l,upperdir=/v/u,workdir=/v/w /mnt && rm /mnt/a && ls -l /v/u/a | head -c 1";
    assert_eq!(pod.client.shell(&id, script).await, "c", "what is left out");
    pod.remove().await;
}

#[tokio::test]
async fn a_core_is_dumped_for_who_asks_into_his_own_directory() {
    let pod = Pod::run("busybox").await;
    let id = pod.start(sleeper("busybox")).await;
    assert_eq!(pod.client.shell(&id, "ulimit -c; ulimit -Hc").await, "0\nunlimited");
    let script = "mkdir /crash; cd /crash; ulimit -c unlimited; sleep 100 & kill -SEGV $!; wait $!; ls | head -c 4";
    assert_eq!(pod.client.shell(&id, script).await, "core");
    pod.remove().await;
}

/// Opens an association's socket, and runs a program of 32 bits, which ends with 42.
const OLD_AND_RARE: &str = r"
import os, socket, struct, subprocess
server = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
server.bind(('127.0.0.1', 0))
server.listen()
client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
client.connect(server.getsockname())
client.sendall(b'hello')
assert server.accept()[0].recv(5) == b'hello'
code = bytes.fromhex('b801000000bb2a000000cd80')
head = b'\x7fELF\1\1\1' + bytes(9) + struct.pack('<HHIIIIIHHHHHH', 2, 3, 1, 0x8048054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
segment = struct.pack('<8I', 1, 0, 0x8048000, 0x8048000, 84 + len(code), 84 + len(code), 5, 4096)
with open('/tmp/old', 'wb') as file: file.write(head + segment + code)
os.chmod('/tmp/old', 0o755)
print(subprocess.run(['/tmp/old']).returncode)
";

#[tokio::test]
async fn the_guest_s_kernel_has_what_pods_of_a_telephone_network_and_of_old_vendors_need() {
    let pod = Pod::run("debian").await;
    let mut config = sleeper("debian");
    // The default filter knows calls of 64 bits only.
    let kind = cri::security_profile::ProfileType::Unconfined.into();
    security(&mut config).seccomp = Some(cri::SecurityProfile { profile_type: kind, localhost_ref: String::new() });
    let id = pod.start(config).await;
    let answer = pod.client.exec(&id, &["python3", "-c", OLD_AND_RARE]).await.unwrap();
    let said = String::from_utf8_lossy(&[answer.stdout, answer.stderr].concat()).into_owned();
    assert_eq!(said.trim(), "42");

    pod.client.pull("busybox").await.unwrap();
    let mut config = sleeper("busybox");
    config.metadata.as_mut().unwrap().name = "tunnel".into();
    security(&mut config).capabilities =
        Some(cri::Capability { add_capabilities: vec!["NET_ADMIN".into()], ..cri::Capability::default() });
    let id = pod.start(config).await;
    pod.client.shell(&id, "ip link add guard type wireguard && ip link show guard").await;
    pod.remove().await;
}
