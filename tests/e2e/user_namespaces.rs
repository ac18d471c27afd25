//! Pods whose root is nobody in their guest (`hostUsers: false`), and to whom everything of
//! their own still belongs.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, image, limit, pod_config};
use nacelle_tests::daemon::Daemon;
use nacelle_tests::disk::Disk;
use nacelle_tests::host::run;
use nacelle_tests::streaming::Spdy;
use tempfile::TempDir;
use tonic::Code;

use crate::contexts::of_pod;

/// The pod's first id in its guest, and how many it has.
const FIRST: u32 = 100_000;
const LENGTH: u32 = 65_536;
/// To whom that belongs which the pod has no id for.
const NOBODY: &str = "65534:65534";
/// Sets a parameter that all namespaces of a kernel share, to what it is.
const SET_GLOBAL: &str = "cat /proc/sys/vm/max_map_count > /proc/sys/vm/max_map_count";

fn ids(container_id: u32, host_id: u32, length: u32) -> Vec<cri::IdMapping> {
    vec![cri::IdMapping { host_id, container_id, length }]
}

fn usual() -> Vec<cri::IdMapping> {
    ids(0, FIRST, LENGTH)
}

fn user_namespace(uids: Vec<cri::IdMapping>, gids: Vec<cri::IdMapping>) -> Option<cri::UserNamespace> {
    Some(cri::UserNamespace { mode: cri::NamespaceMode::Pod.into(), uids, gids })
}

fn pod_options(config: &mut cri::PodSandboxConfig) -> &mut cri::NamespaceOption {
    of_pod(config).namespace_options.as_mut().unwrap()
}

fn context(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

/// A pod with a user namespace.
fn mapped_pod(logs: &Path) -> cri::PodSandboxConfig {
    let mut config = pod_config(logs);
    pod_options(&mut config).userns_options = user_namespace(usual(), usual());
    config
}

/// A container for it.
fn mapped_container(command: &[&str]) -> cri::ContainerConfig {
    let mut config = container_config("busybox", command);
    context(&mut config).namespace_options.as_mut().unwrap().userns_options = user_namespace(usual(), usual());
    config
}

fn sleeper() -> cri::ContainerConfig {
    mapped_container(&["sleep", "1000"])
}

/// A volume that is mapped as a kubelet maps those of such a pod.
fn mapped_mount(host: &Path, container: &str) -> cri::Mount {
    cri::Mount { uid_mappings: usual(), gid_mappings: usual(), ..plain_mount(host, container) }
}

fn plain_mount(host: &Path, container: &str) -> cri::Mount {
    cri::Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: container.into(),
        ..cri::Mount::default()
    }
}

async fn start(client: &Client, pod: &str, config: cri::ContainerConfig) -> String {
    let id = client.create_as(pod, config).await.unwrap();
    client.start(&id).await.unwrap();
    id
}

/// A pod with a user namespace on the node's daemon, and a container that sleeps in it.
async fn running(change: impl FnOnce(&mut cri::PodSandboxConfig)) -> (Client, String, String, TempDir) {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let mut config = mapped_pod(logs.path());
    change(&mut config);
    let pod = client.run_pod_as(config).await.unwrap();
    let id = start(&client, &pod, sleeper()).await;
    (client, pod, id, logs)
}

/// What a script that must fail complains of.
async fn refused(client: &Client, id: &str, script: &str) -> String {
    let answer = client.exec(id, &["sh", "-ec", script]).await.unwrap();
    assert_ne!(answer.exit_code, 0, "{script} succeeded: {}", String::from_utf8_lossy(&answer.stdout));
    String::from_utf8_lossy(&answer.stderr).into_owned()
}

/// Owner and group of files in a container.
async fn owners(client: &Client, id: &str, files: &str) -> Vec<String> {
    client.shell(id, &format!("stat -c %u:%g {files}")).await.lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn root_of_the_pod_owns_its_files_and_nothing_of_its_guest() {
    let (client, pod, id, _logs) = running(|_| ()).await;
    let map = format!("0 {FIRST} {LENGTH}");
    let maps = client.shell(&id, "cat /proc/self/uid_map /proc/1/gid_map | tr -s ' '").await;
    assert_eq!(maps.lines().map(str::trim).collect::<Vec<_>>(), [map.as_str(); 2]);
    assert_eq!(client.shell(&id, "echo $(id -u) $(id -g)").await, "0 0");

    // The image's files, new ones, the pod's, and what is mounted: no one is nobody.
    client.shell(&id, "echo x > /made && mkdir /etc/made && echo more >> /etc/passwd && echo x > /dev/shm/made").await;
    let files = "/ /bin/busybox /etc/passwd /made /etc/made /etc/hosts /dev /dev/pts /dev/shm /dev/shm/made /proc/1";
    assert_eq!(owners(&client, &id, files).await, vec!["0:0"; 11]);
    client.shell(&id, "chown 33:44 /made && echo 10.0.0.9 other >> /etc/hosts").await;
    assert_eq!(owners(&client, &id, "/made").await, ["33:44"]);
    client.shell(&id, "echo x > /dev/null && head -c 1 /dev/urandom /dev/zero > /dev/null && test -c /dev/full").await;

    // What is the guest's is not its root's to change, as it is for the root of another pod.
    assert!(refused(&client, &id, SET_GLOBAL).await.contains("denied"));
    assert!(refused(&client, &id, "mknod /tmp/disk b 254 0").await.contains("not permitted"));
    let logs = tempfile::tempdir().unwrap();
    let plain = client.run_pod(logs.path()).await.unwrap();
    let other = client.create(&plain, "busybox", &["sleep", "1000"]).await.unwrap();
    client.start(&other).await.unwrap();
    client.shell(&other, SET_GLOBAL).await;

    // Not even with all capabilities, which are those in its own namespaces.
    let mut privileged = sleeper();
    context(&mut privileged).privileged = true;
    let error = client.create_as(&pod, privileged.clone()).await.unwrap_err();
    assert!(error.message().contains("privileged"), "{error}");
    client.remove_pod(&plain).await.unwrap();
    client.remove_pod(&pod).await.unwrap();
    let mut config = mapped_pod(logs.path());
    of_pod(&mut config).privileged = true;
    let pod = client.run_pod_as(config).await.unwrap();
    let id = start(&client, &pod, privileged).await;
    client
        .shell(&id, "mkdir -p /tmp/m && mount -t tmpfs tmpfs /tmp/m && hostname new && hostname | grep -qx new")
        .await;
    assert!(refused(&client, &id, SET_GLOBAL).await.contains("denied"));
    // Busybox complains and goes on.
    client.shell(&id, "date -s 2001-01-01 2>&1 | grep 'not permitted' && test $(date +%Y) -gt 2001").await;
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_pod_s_user_writes_to_its_own_output_and_terminal() {
    let (client, pod, id, _logs) = running(|_| ()).await;
    let mut user = mapped_container(&["sh", "-c", "id -u > /dev/stdout; id -u > /dev/stderr; exec sleep 1000"]);
    context(&mut user).run_as_user = Some(cri::Int64Value { value: 1234 });
    context(&mut user).supplemental_groups = vec![7];
    user.working_dir = "/made/for/it".into();
    let app = start(&client, &pod, user.clone()).await;
    assert_eq!(client.shell(&app, "id -u; id -G | tr ' ' '\\n' | grep -x 7; pwd").await, "1234\n7\n/made/for/it");
    assert_eq!(owners(&client, &app, "/made/for/it").await, ["0:0"]);
    let log = client.status(&app).await.unwrap().log_path;
    let deadline = tokio::time::Instant::now() + limit(20);
    while nacelle_tests::client::log_lines(&log).unwrap().len() < 2 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "its output is not its own: {}",
            fs::read_to_string(&log).unwrap()
        );
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }

    for (container, uid) in [(&id, "0"), (&app, "1234")] {
        let script = format!("stat -c %u $(tty) | grep -qx {uid} && echo mine > $(tty); exit 3");
        let exec = cri::ExecRequest {
            container_id: container.clone(),
            cmd: ["sh", "-c", &script].map(str::to_owned).to_vec(),
            stdin: true,
            stdout: true,
            tty: true,
            ..Default::default()
        };
        let mut spdy = Spdy::connect(&client.exec_url(exec).await.unwrap(), "v4.channel.k8s.io").await.unwrap();
        let [error, _, stdout, _] = spdy.open_all(["error", "stdin", "stdout", "resize"]).await.unwrap();
        assert!(spdy.finish(stdout).await.unwrap().contains("mine"));
        assert!(spdy.finish(error).await.unwrap().contains("\"3\""));
    }
    // Terminals of the container's own, and a user that the pod does not have.
    let mut terminal = mapped_container(&["sh", "-c", "echo seen > /dev/console; tty; exec sleep 1000"]);
    terminal.tty = true;
    let terminal = start(&client, &pod, terminal).await;
    client.shell(&terminal, "test -c /dev/console").await;
    context(&mut user).run_as_user = Some(cri::Int64Value { value: i64::from(LENGTH) });
    user.metadata.as_mut().unwrap().name += "-unmapped";
    let error = client.create_as(&pod, user).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("user 65536"), "{error}");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn the_pod_s_network_processes_and_parameters_are_its_own() {
    let (client, pod, id, _logs) = running(|config| {
        config.hostname = "mapped".into();
        pod_options(config).pid = cri::NamespaceMode::Pod.into();
        let sysctls = &mut config.linux.as_mut().unwrap().sysctls;
        sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
        sysctls.insert("fs.mqueue.msg_max".into(), "100".into());
        sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "90".into());
    })
    .await;
    assert_eq!(client.shell(&id, "hostname").await, "mapped");
    let files = "cat kernel/shm_rmid_forced fs/mqueue/msg_max net/ipv4/ip_unprivileged_port_start | tr '\\n' ' '";
    assert_eq!(client.shell(&id, &format!("cd /proc/sys; {files}")).await, "1 100 90");
    // Who may set up networks may set up the pod's.
    let mut admin = sleeper();
    let add_capabilities = vec!["NET_ADMIN".to_owned()];
    context(&mut admin).capabilities = Some(cri::Capability { add_capabilities, ..Default::default() });
    let admin = start(&client, &pod, admin).await;
    client.shell(&admin, "echo 1 > /proc/sys/net/ipv4/ip_forward && ip link set dev eth0 mtu 1400").await;
    assert_eq!(client.shell(&id, "cat /sys/class/net/eth0/mtu").await, "1400");

    // A web server of root's on port 80, one of a user's on port 90, and none on port 89.
    let server = |port: &str| mapped_container(&["httpd", "-f", "-p", port, "-h", "/etc"]);
    let as_user = |mut config: cri::ContainerConfig| {
        context(&mut config).run_as_user = Some(cri::Int64Value { value: 1234 });
        context(&mut config).capabilities =
            Some(cri::Capability { drop_capabilities: vec!["ALL".into()], ..Default::default() });
        config
    };
    let servers = [start(&client, &pod, server("80")).await, start(&client, &pod, as_user(server("90"))).await];
    let failed = start(&client, &pod, as_user(server("89"))).await;
    assert_ne!(client.wait_exit(&failed).await.unwrap().exit_code, 0);
    let ip = client.pod_status(&pod).await.unwrap().network.unwrap().ip;
    for (port, server) in [80, 90].into_iter().zip(&servers) {
        client
            .shell(
                server,
                &format!("for i in $(seq 100); do wget -qO- 127.0.0.1:{port}/passwd && break; sleep 0.2; done"),
            )
            .await;
        let mut stream = TcpStream::connect(format!("{ip}:{port}")).unwrap();
        stream.set_read_timeout(Some(limit(20))).unwrap();
        write!(stream, "GET /passwd HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("root:"), "{answer}");
    }
    client.shell(&id, "ping -c 1 -W 20 10.244.0.1").await;

    let mut spdy = Spdy::connect(&client.port_forward_url(&pod).await.unwrap(), "portforward.k8s.io").await.unwrap();
    let headers = |kind| [("streamtype", kind), ("port", "80"), ("requestid", "0")];
    let error = spdy.open(&headers("error")).await.unwrap();
    spdy.send(error, b"", true).await.unwrap();
    let data = spdy.open(&headers("data")).await.unwrap();
    spdy.send(data, b"GET /passwd HTTP/1.0\r\n\r\n", false).await.unwrap();
    assert!(spdy.finish(data).await.unwrap().contains("root:"));

    let network = client.pod_stats(&pod).await.unwrap().linux.unwrap().network.unwrap();
    let eth0 = network.default_interface.unwrap();
    assert_eq!(eth0.name, "eth0");
    assert!(eth0.rx_bytes.unwrap().value > 100 && eth0.tx_bytes.unwrap().value > 100);

    // Processes of the containers that share them, of which the first is nobody's.
    let sharing = || {
        let mut config = sleeper();
        context(&mut config).namespace_options.as_mut().unwrap().pid = cri::NamespaceMode::Pod.into();
        config
    };
    let (one, _two) = (start(&client, &pod, sharing()).await, start(&client, &pod, sharing()).await);
    let seen = client.shell(&one, "ps -o pid,args").await;
    assert_eq!(seen.matches("sleep 1000").count(), 2, "{seen}");
    assert!(client.shell(&one, "tr '\\0' ' ' < /proc/1/cmdline").await.contains("pod-init"));
    assert!(refused(&client, &one, "ls /proc/1/root/").await.contains("denied"));
    let mut debug = sleeper();
    let options = context(&mut debug).namespace_options.as_mut().unwrap();
    (options.pid, options.target_id) = (cri::NamespaceMode::Target.into(), id.clone());
    let debug = start(&client, &pod, debug).await;
    assert_eq!(client.shell(&debug, "ps | grep -c '[s]leep 1000'").await, "2");
    client.remove_pod(&pod).await.unwrap();
}

/// A file system of a test's own whose mounts propagate; goes when it is dropped.
struct Shared(std::path::PathBuf);

impl Shared {
    fn mount(path: &Path) -> Self {
        run("mount", &["-t", "tmpfs", "tmpfs", &path.to_string_lossy()]);
        run("mount", &["--make-shared", &path.to_string_lossy()]);
        Self(path.into())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test]
async fn a_volume_s_files_belong_to_the_same_numbers_on_both_sides() {
    let (client, pod, _id, _logs) = running(|_| ()).await;
    let host = tempfile::tempdir().unwrap();
    // What follows the host has to be on a mount from which it propagates.
    let shared = Shared::mount(host.path());
    let path = |name: &str| host.path().join(name);
    // For everybody to go through.
    fs::set_permissions(host.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(path("roots"), "of root").unwrap();
    fs::set_permissions(path("roots"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(path("users"), "").unwrap();
    chown(path("users"), Some(1234), Some(50)).unwrap();
    fs::create_dir(path("open")).unwrap();
    fs::set_permissions(path("open"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::create_dir(path("later")).unwrap();
    let mut mounts = vec![
        mapped_mount(host.path(), "/data"),
        cri::Mount {
            propagation: cri::MountPropagation::PropagationHostToContainer.into(),
            ..mapped_mount(host.path(), "/follow")
        },
        mapped_mount(&path("roots"), "/single"),
        plain_mount(host.path(), "/unmapped"),
        cri::Mount { readonly: true, ..mapped_mount(host.path(), "/read-only") },
        cri::Mount {
            container_path: "/image".into(),
            image: Some(cri::ImageSpec { image: image("busybox"), ..Default::default() }),
            uid_mappings: usual(),
            gid_mappings: usual(),
            readonly: true,
            ..cri::Mount::default()
        },
    ];
    let id = start(&client, &pod, cri::ContainerConfig { mounts: mounts.clone(), ..sleeper() }).await;
    let status = client.status(&id).await.unwrap();
    mounts.last_mut().unwrap().image.as_mut().unwrap().image_ref = status.image_id;
    assert_eq!(status.mounts, mounts, "shown as asked for, and which image it is");
    assert_eq!(owners(&client, &id, "/data /data/roots /data/users /single").await, ["0:0", "0:0", "1234:50", "0:0"]);
    assert_eq!(owners(&client, &id, "/image/bin/busybox").await, ["0:0"]);
    assert_eq!(client.shell(&id, "cat /data/roots /single").await, "of rootof root");
    client.shell(&id, "echo x > /data/made && mkdir /data/dir && ln -s made /data/link && chown 33:44 /data/dir").await;
    client.shell(&id, "echo more >> /data/roots && chmod 640 /data/roots && mv /data/made /data/moved").await;
    let owner = |name: &str| fs::symlink_metadata(path(name)).map(|file| (file.uid(), file.gid())).unwrap();
    assert_eq!(["moved", "link", "roots", "dir"].map(owner), [(0, 0), (0, 0), (0, 0), (33, 44)]);
    assert!(refused(&client, &id, "touch /read-only/new").await.contains("Read-only"));
    // What the host mounts later is mapped too.
    let later = path("later").to_string_lossy().into_owned();
    run("mount", &["-t", "tmpfs", "tmpfs", &later]);
    fs::write(path("later/file"), "").unwrap();
    chown(path("later/file"), Some(1234), Some(50)).unwrap();
    client.shell(&id, "until [ -e /follow/later/file ]; do usleep 100000; done; echo x > /follow/later/made").await;
    assert_eq!(owners(&client, &id, "/follow/later/file /follow/later/made").await, ["1234:50", "0:0"]);
    assert_eq!(owner("later/made"), (0, 0));
    // Exec is in the same namespaces.
    assert_eq!(owners(&client, &id, "/data/link /data/dir").await, ["0:0", "33:44"]);

    // Without a mapping it is the guest's ids that count, of which the pod has its own only.
    assert_eq!(owners(&client, &id, "/unmapped/moved").await, [NOBODY]);
    assert!(refused(&client, &id, "cat /unmapped/roots").await.contains("denied"));
    client.shell(&id, "touch /unmapped/open/outside").await;
    assert_eq!(owner("open/outside"), (FIRST, FIRST));

    let mut user = cri::ContainerConfig { mounts: vec![mapped_mount(host.path(), "/data")], ..sleeper() };
    context(&mut user).run_as_user = Some(cri::Int64Value { value: 1234 });
    let app = start(&client, &pod, user).await;
    client.shell(&app, "echo x > /data/open/new && echo x > /data/users").await;
    assert_eq!(owner("open/new").0, 1234);
    assert!(refused(&client, &app, "cat /data/roots").await.contains("denied"));
    for container in [&id, &app] {
        client.remove(container).await.unwrap();
    }
    client.remove_pod(&pod).await.unwrap();
    run("umount", &[&later]);
    drop(shared);
}

#[tokio::test]
async fn a_disk_is_the_pod_s_root_s_to_use() {
    let (client, pod, _id, _logs) = running(|_| ()).await;
    let disk = Disk::attach(8 << 20);
    let asked = cri::ContainerConfig { devices: vec![disk.device("rwm")], ..sleeper() };
    let id = start(&client, &pod, asked).await;
    assert_eq!(owners(&client, &id, "/dev/xvda").await, ["0:6"]);
    client.shell(&id, "test -b /dev/xvda && echo from the pod | dd of=/dev/xvda bs=512 conv=sync,fsync").await;
    client.remove(&id).await.unwrap();
    assert!(disk.content().starts_with(b"from the pod\n"));
    let asked = cri::ContainerConfig { devices: vec![disk.device("r")], ..sleeper() };
    let id = start(&client, &pod, asked).await;
    assert_eq!(client.shell(&id, "head -n 1 /dev/xvda").await, "from the pod");
    refused(&client, &id, "dd if=/dev/zero of=/dev/xvda bs=512 count=1 conv=fsync").await;
    client.remove_pod(&pod).await.unwrap();
    disk.detach();
}

#[tokio::test]
async fn a_daemon_that_starts_again_knows_the_pod_s_user_namespace() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod_as(mapped_pod(logs.path())).await.unwrap();
    let before = start(&client, &pod, sleeper()).await;
    daemon.kill();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let options = client.pod_status(&pod).await.unwrap().linux.unwrap().namespaces.unwrap().options.unwrap();
    assert_eq!(options.userns_options, user_namespace(usual(), usual()));
    let after = start(&client, &pod, sleeper()).await;
    for id in [&before, &after] {
        assert!(client.shell(id, "tr -s ' ' < /proc/self/uid_map").await.contains(&format!("0 {FIRST} {LENGTH}")));
    }
    client.stop(&before, 0).await.unwrap();
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn the_smallest_namespace_and_none_work_and_what_cannot_be_is_refused_by_its_field() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let status = client.runtime.clone().status(cri::StatusRequest::default()).await.unwrap().into_inner();
    assert!(status.runtime_handlers.iter().all(|handler| handler.features.unwrap().user_namespaces));

    let logs = tempfile::tempdir().unwrap();
    let mode = |mode: cri::NamespaceMode| Some(cri::UserNamespace { mode: mode.into(), ..Default::default() });
    let of_both = |ids: Vec<cri::IdMapping>| user_namespace(ids.clone(), ids);
    for (options, field) in [
        (mode(cri::NamespaceMode::Container), "userns_options.mode: "),
        (mode(cri::NamespaceMode::Target), "userns_options.mode: "),
        (mode(cri::NamespaceMode::Pod), "userns_options.uids: "),
        (of_both([usual(), ids(LENGTH, 300_000, 5)].concat()), "userns_options.uids: "),
        (of_both(ids(1, FIRST, LENGTH)), "userns_options.uids: "),
        (of_both(ids(0, FIRST, 0)), "userns_options.uids: "),
        (user_namespace(usual(), vec![]), "userns_options.gids: "),
        (user_namespace(usual(), ids(0, FIRST, 1)), "userns_options.gids: "),
    ] {
        let mut config = pod_config(logs.path());
        pod_options(&mut config).userns_options = options;
        let error = client.run_pod_as(config).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(field), "{field}: {}", error.message());
    }
    let mut config = mapped_pod(logs.path());
    pod_options(&mut config).pid = cri::NamespaceMode::Node.into();
    let error = client.run_pod_as(config).await.unwrap_err();
    assert!(error.message().contains("namespace_options.pid: "), "{error}");

    // A namespace of root alone: no group for terminals, none for disks.
    let mut config = pod_config(logs.path());
    pod_options(&mut config).userns_options = of_both(ids(0, 7, 1));
    let pod = client.run_pod_as(config).await.unwrap();
    let mut alone = sleeper();
    context(&mut alone).namespace_options.as_mut().unwrap().userns_options = of_both(ids(0, 7, 1));
    let id = start(&client, &pod, alone.clone()).await;
    assert_eq!(client.shell(&id, "tr -s ' ' < /proc/self/uid_map").await, "0 7 1");
    // Its containers are in it, and in no other.
    let mut other = sleeper();
    other.mounts = vec![mapped_mount(logs.path(), "/data")];
    let mut outside = container_config("busybox", &["true"]);
    alone.mounts = vec![mapped_mount(logs.path(), "/data")];
    alone.metadata.as_mut().unwrap().name += "-mounting";
    for (config, field) in
        [(other, "userns_options: "), (outside.clone(), "userns_options: "), (alone, "config.mounts[0].uidMappings: ")]
    {
        let error = client.create_as(&pod, config).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(field), "{field}: {}", error.message());
    }
    client.remove_pod(&pod).await.unwrap();

    // None: ids are the guest's.
    let mut config = pod_config(logs.path());
    pod_options(&mut config).userns_options = mode(cri::NamespaceMode::Node);
    let pod = client.run_pod_as(config).await.unwrap();
    context(&mut outside).namespace_options.as_mut().unwrap().userns_options = mode(cri::NamespaceMode::Node);
    outside.command = ["sleep", "1000"].map(str::to_owned).to_vec();
    let id = start(&client, &pod, outside).await;
    assert_eq!(client.shell(&id, "tr -s ' ' < /proc/self/uid_map").await, "0 0 4294967295");
    let mut mounting = container_config("busybox", &["true"]);
    mounting.mounts = vec![mapped_mount(logs.path(), "/data")];
    let error = client.create_as(&pod, mounting).await.unwrap_err();
    assert!(error.message().contains("config.mounts[0].uidMappings: "), "{error}");
    client.remove_pod(&pod).await.unwrap();
}
