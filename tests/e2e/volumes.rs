//! Volumes: directories, files, images and disks of the host in containers.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, image, limit, pod_config};
use nacelle_tests::daemon::Daemon;
use nacelle_tests::disk::Disk;
use nacelle_tests::host;
use tempfile::TempDir;
use tonic::Code;

use crate::contexts::of_pod;

/// A pod that may hold privileged containers, with busybox pulled.
async fn pod() -> (Client, String, TempDir) {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let (pod, logs) = pod_of(&client).await;
    (client, pod, logs)
}

async fn pod_of(client: &Client) -> (String, TempDir) {
    let logs = tempfile::tempdir().unwrap();
    let mut config = pod_config(logs.path());
    of_pod(&mut config).privileged = true;
    (client.run_pod_as(config).await.unwrap(), logs)
}

fn mount(host: &Path, container: &str) -> cri::Mount {
    cri::Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: container.into(),
        ..cri::Mount::default()
    }
}

fn read_only(host: &Path, container: &str) -> cri::Mount {
    cri::Mount { readonly: true, ..mount(host, container) }
}

fn config(mounts: Vec<cri::Mount>) -> cri::ContainerConfig {
    cri::ContainerConfig { mounts, ..container_config("busybox", &["sleep", "1000"]) }
}

/// Creates and starts a container with these mounts.
async fn run(client: &Client, pod: &str, mounts: Vec<cri::Mount>) -> String {
    start(client, pod, config(mounts)).await
}

async fn start(client: &Client, pod: &str, config: cri::ContainerConfig) -> String {
    let id = client.create_as(pod, config).await.unwrap();
    client.start(&id).await.unwrap();
    id
}

/// What a shell in the container says; its script must succeed.
async fn shell(client: &Client, id: &str, script: &str) -> String {
    let answer = client.exec(id, &["sh", "-ec", script]).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(answer.exit_code, 0, "{script}: {}{}", text(&answer.stdout), text(&answer.stderr));
    text(&answer.stdout)
}

/// What it complains of; its script must fail.
async fn refused(client: &Client, id: &str, script: &str) -> String {
    let answer = client.exec(id, &["sh", "-ec", script]).await.unwrap();
    assert_ne!(answer.exit_code, 0, "{script} succeeded: {}", String::from_utf8_lossy(&answer.stdout));
    String::from_utf8_lossy(&answer.stderr).into_owned()
}

#[tokio::test]
async fn a_mount_has_the_options_that_its_container_asks_for() {
    let (client, pod, _logs) = pod().await;
    let host = tempfile::tempdir().unwrap();
    let program = host.path().join("program");
    fs::write(&program, "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let options = ["noexec", "nosuid", "nodev"].map(String::from).to_vec();
    let strict = cri::Mount { mount_options: options.clone(), ..mount(host.path(), "/strict") };
    let id = run(&client, &pod, vec![mount(host.path(), "/plain"), strict]).await;
    assert_eq!(shell(&client, &id, "/plain/program").await, "ran\n");
    assert!(refused(&client, &id, "/strict/program").await.contains("Permission denied"));
    shell(&client, &id, "echo changed > /strict/file; grep -q changed /plain/file").await;
    let shown = shell(&client, &id, "grep ' /strict ' /proc/mounts").await;
    assert!(options.iter().all(|option| shown.contains(option.as_str())), "{shown}");
    assert_eq!(client.status(&id).await.unwrap().mounts[1].mount_options, options);
    let wrong = cri::Mount { mount_options: vec!["rshared".into()], ..mount(host.path(), "/data") };
    let error = client.create_as(&pod, config(vec![wrong])).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().starts_with("config.mounts[0].mount_options[0]: "), "{}", error.message());
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_volume_in_memory_that_grows_on_the_host_grows_in_the_pod() {
    let (client, pod, _logs) = pod().await;
    let host = tempfile::tempdir().unwrap();
    let command = |program: &str, arguments: &[&str]| {
        let status = Command::new(program).args(arguments).arg(host.path()).status().unwrap();
        assert!(status.success(), "{program} {arguments:?}: {status}");
    };
    command("mount", &["-t", "tmpfs", "-o", "size=1m", "emptydir"]);
    let id = run(&client, &pod, vec![mount(host.path(), "/cache")]).await;
    let size = "df -k /cache | awk 'END { print $2 }'";
    let fill = "dd if=/dev/zero of=/cache/file bs=1024 count=3000 2>&1";
    assert_eq!(shell(&client, &id, size).await.trim(), "1024");
    assert!(shell(&client, &id, &format!("! {fill}")).await.contains("No space left"));
    command("mount", &["-o", "remount,size=4m"]);
    assert_eq!(shell(&client, &id, size).await.trim(), "4096");
    shell(&client, &id, fill).await;
    command("mount", &["-o", "remount,size=8m"]);
    assert_eq!(shell(&client, &id, size).await.trim(), "8192");
    client.remove_pod(&pod).await.unwrap();
    command("umount", &[]);
}

#[tokio::test]
async fn what_a_kubelet_mounts_into_every_container_is_there() {
    let (client, pod, _logs) = pod().await;
    let host = tempfile::tempdir().unwrap();
    let path = |name: &str| host.path().join(name);
    fs::create_dir(path("token")).unwrap();
    fs::write(path("token/token"), "secret").unwrap();
    fs::write(path("hosts"), "10.1.2.3 kubernetes\n").unwrap();
    fs::write(path("termination"), "").unwrap();
    fs::set_permissions(path("termination"), fs::Permissions::from_mode(0o666)).unwrap();
    fs::write(path("secret-neighbour"), "not for the pod").unwrap();
    let mounts = vec![
        read_only(&path("token"), "/var/run/secrets/kubernetes.io/serviceaccount"),
        mount(&path("hosts"), "/etc/hosts"),
        mount(&path("termination"), "/dev/termination-log"),
    ];
    let id = run(&client, &pod, mounts.clone()).await;
    assert_eq!(shell(&client, &id, "cat /var/run/secrets/kubernetes.io/serviceaccount/token").await, "secret");
    assert_eq!(shell(&client, &id, "cat /etc/hosts").await, "10.1.2.3 kubernetes\n");
    shell(&client, &id, "echo the end > /dev/termination-log").await;
    assert_eq!(fs::read_to_string(path("termination")).unwrap(), "the end\n");
    refused(&client, &id, "echo x > /var/run/secrets/kubernetes.io/serviceaccount/token").await;
    let status = client.status(&id).await.unwrap();
    assert_eq!(status.mounts, mounts, "shown as asked for");
    // A file alone has no neighbours, not even for who may do everything in the guest.
    let mut privileged = config(vec![mount(&path("hosts"), "/etc/hosts")]);
    let security = privileged.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    security.privileged = true;
    security.namespace_options.as_mut().unwrap().pid = cri::NamespaceMode::Node.into();
    let id = start(&client, &pod, privileged).await;
    let seen = shell(&client, &id, "cd /proc/1/root && find run/nacelle/volumes -name '*neighbour*'").await;
    assert_eq!(seen, "");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn ownership_modes_links_and_attributes_are_the_hosts() {
    let (client, pod, _logs) = pod().await;
    let host = tempfile::tempdir().unwrap();
    let file = host.path().join("file");
    fs::write(&file, "x").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&file, Some(1234), Some(4321)).unwrap();
    symlink("file", host.path().join("link")).unwrap();
    fs::hard_link(&file, host.path().join("hard")).unwrap();
    let id = run(&client, &pod, vec![mount(host.path(), "/data")]).await;
    assert_eq!(
        shell(&client, &id, "stat -c '%u %g %a %h' /data/file; readlink /data/link").await,
        "1234 4321 640 2\nfile\n"
    );
    // Made in the guest, seen on the host.
    let script = "cd /data; mkdir -p a/b; echo new > a/b/c; chown 7:8 a/b/c; chmod 4711 a/b/c; ln -s c a/b/l; \
                  ln a/b/c a/h; mv a/h a/moved; mkfifo p; touch -d '2001-02-03 04:05:06' a";
    shell(&client, &id, script).await;
    let made = fs::metadata(host.path().join("a/b/c")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777, made.nlink()), (7, 8, 0o4711, 2));
    assert_eq!(fs::read_link(host.path().join("a/b/l")).unwrap(), Path::new("c"));
    assert_eq!(fs::metadata(host.path().join("a")).unwrap().mtime(), 981_173_106);
    // An ordinary user whose group owns the volume, as with an fsGroup.
    fs::create_dir(host.path().join("shared")).unwrap();
    std::os::unix::fs::chown(host.path().join("shared"), Some(0), Some(5000)).unwrap();
    fs::set_permissions(host.path().join("shared"), fs::Permissions::from_mode(0o2775)).unwrap();
    let mut user = config(vec![mount(host.path(), "/data")]);
    let security = user.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    security.run_as_user = Some(cri::Int64Value { value: 1000 });
    security.run_as_group = Some(cri::Int64Value { value: 1000 });
    security.supplemental_groups = vec![5000];
    let id = start(&client, &pod, user).await;
    shell(&client, &id, "echo mine > /data/shared/file").await;
    let made = fs::metadata(host.path().join("shared/file")).unwrap();
    assert_eq!((made.uid(), made.gid()), (1000, 5000));
    refused(&client, &id, "cat /data/file").await;
    refused(&client, &id, "echo x > /data/a/new").await;
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn an_empty_directory_in_memory_keeps_its_limit_and_a_sub_path_shows_no_more_than_itself() {
    let (client, pod, _logs) = pod().await;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    // As the kubelet prepares them: a tmpfs, and binds of what is below a volume.
    for name in ["memory", "volume/a/b", "sub"] {
        fs::create_dir_all(path(name)).unwrap();
    }
    host::run("mount", &["-t", "tmpfs", "-o", "size=1m,mode=1777", "tmpfs", &path("memory")]);
    fs::write(path("volume/neighbour"), "").unwrap();
    fs::write(path("volume/a/file"), "of a").unwrap();
    fs::write(path("single"), "").unwrap();
    host::run("mount", &["--bind", &path("volume/a"), &path("sub")]);
    host::run("mount", &["--bind", &path("volume/a/file"), &path("single")]);
    let mounts = [("memory", "/cache"), ("sub", "/sub"), ("single", "/etc/single")]
        .map(|(host, container)| mount(Path::new(&path(host)), container));
    let id = run(&client, &pod, mounts.to_vec()).await;
    assert_eq!(shell(&client, &id, "df -k /cache | awk 'END { print $2 }'").await, "1024\n");
    let said = refused(&client, &id, "dd if=/dev/zero of=/cache/large bs=64k count=32").await;
    assert!(said.contains("No space left"), "{said}");
    assert_eq!(fs::metadata(path("memory/large")).unwrap().len(), 1 << 20);
    assert_eq!(shell(&client, &id, "rm /cache/large; cat /sub/file /etc/single; ls /sub").await, "of aof ab\nfile\n");
    shell(&client, &id, "echo new > /etc/single; echo made > /sub/b/made").await;
    assert_eq!(fs::read_to_string(path("volume/a/file")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(path("volume/a/b/made")).unwrap(), "made\n");
    client.remove_pod(&pod).await.unwrap();
    for name in ["single", "sub", "memory"] {
        host::run("umount", &[&path(name)]);
    }
}

#[tokio::test]
async fn what_the_host_changes_is_seen_within_a_second_or_two() {
    let (client, pod, _logs) = pod().await;
    let host = tempfile::tempdir().unwrap();
    // As the kubelet's atomic writer does it.
    let publish = |version: &str| {
        let directory = host.path().join(format!("..{version}"));
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("key"), version).unwrap();
        symlink(format!("..{version}"), host.path().join("..data_tmp")).unwrap();
        fs::rename(host.path().join("..data_tmp"), host.path().join("..data")).unwrap();
    };
    publish("first");
    symlink("..data/key", host.path().join("key")).unwrap();
    fs::write(host.path().join("log"), "one\n").unwrap();
    let id = run(&client, &pod, vec![read_only(host.path(), "/config")]).await;
    assert_eq!(shell(&client, &id, "cat /config/key").await, "first");
    assert_eq!(shell(&client, &id, "cat /config/log").await, "one\n");
    for version in ["second", "third"] {
        publish(version);
        fs::write(host.path().join("log"), format!("one\n{version}\n")).unwrap();
        // By the guest's clock, which an emulated host lets run at its own pace.
        let seen = format!("[ $(cat /config/key) = {version} ] && grep -q {version} /config/log");
        let wait = format!("i=0; until {seen} || [ $i -ge 100 ]; do usleep 100000; i=$((i+1)); done; echo $i");
        let tenths: u32 = shell(&client, &id, &wait).await.trim().parse().unwrap();
        assert!(tenths <= 15, "{version} is seen after {tenths} tenths of a second");
    }
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn read_only_holds_against_a_privileged_container() {
    let (client, pod, _logs) = pod().await;
    let host_directory = tempfile::tempdir().unwrap();
    let sub = host_directory.path().join("sub");
    fs::create_dir(&sub).unwrap();
    fs::write(host_directory.path().join("file"), "x").unwrap();
    host::run("mount", &["-t", "tmpfs", "tmpfs", &sub.to_string_lossy()]);
    let all = cri::Mount { recursive_read_only: true, ..read_only(host_directory.path(), "/all") };
    let mut privileged = config(vec![read_only(host_directory.path(), "/top"), all]);
    privileged.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let id = start(&client, &pod, privileged).await;
    let tries = "mount -o remount,rw,bind /top || true; mount -o remount,rw,bind /all || true";
    shell(&client, &id, tries).await;
    for attempt in [
        "echo y > /top/file",
        "touch /top/new",
        "rm /top/file",
        "mv /top/file /top/other",
        "chmod 777 /top/file",
        "echo y > /all/file",
        "touch /all/sub/new",
        "truncate -s 0 /all/file",
    ] {
        let said = refused(&client, &id, attempt).await;
        assert!(said.contains("Read-only file system"), "{attempt}: {said}");
    }
    // What is mounted below a volume that is read-only, but not recursively, is not.
    shell(&client, &id, "echo y > /top/sub/new").await;
    assert_eq!(fs::read_to_string(sub.join("new")).unwrap(), "y\n");
    assert_eq!(fs::read_to_string(host_directory.path().join("file")).unwrap(), "x");
    client.remove_pod(&pod).await.unwrap();
    host::run("umount", &[&sub.to_string_lossy()]);
    let status = client.runtime.clone().status(cri::StatusRequest { verbose: false }).await.unwrap().into_inner();
    assert!(status.runtime_handlers.iter().all(|h| h.features.as_ref().unwrap().recursive_read_only_mounts));
}

#[tokio::test]
async fn later_mounts_of_the_host_are_seen_where_that_was_asked_for() {
    let (client, pod, _logs) = pod().await;
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    let follow = |container: &str| cri::Mount {
        propagation: cri::MountPropagation::PropagationHostToContainer.into(),
        ..mount(&directory.path().join("volume"), container)
    };
    // A mount that nothing propagates from, whatever this host's are.
    host::run("mount", &["-t", "tmpfs", "tmpfs", &at("")]);
    host::run("mount", &["--make-private", &at("")]);
    fs::create_dir_all(at("volume/sub")).unwrap();
    let error = client.create_as(&pod, config(vec![follow("/follow")])).await.unwrap_err();
    assert!(error.message().contains("--make-rshared"), "{error}");
    host::run("mount", &["--make-shared", &at("")]);
    let id = run(&client, &pod, vec![follow("/follow"), mount(&directory.path().join("volume"), "/private")]).await;
    assert_eq!(shell(&client, &id, "ls /follow/sub /private/sub").await, "/follow/sub:\n\n/private/sub:\n");
    // What the VMM holds of it leads nowhere else.
    leads_nowhere(client.vmm_pid(&pod).await.unwrap());
    host::run("mount", &["-t", "tmpfs", "tmpfs", &at("volume/sub")]);
    fs::write(at("volume/sub/mounted"), "").unwrap();
    shell(&client, &id, "until [ -e /follow/sub/mounted ]; do usleep 100000; done").await;
    assert_eq!(shell(&client, &id, "ls /private/sub").await, "");
    client.remove(&id).await.unwrap();
    // Nothing of it is left in the VMM, which would keep the host from unmounting it for good.
    let jail = PathBuf::from(format!("/proc/{}/root/volumes", client.vmm_pid(&pod).await.unwrap()));
    assert_eq!(fs::read_dir(jail).unwrap().count(), 0);
    client.remove_pod(&pod).await.unwrap();
    host::run("umount", &[&at("volume/sub")]);
    host::run("umount", &[&at("")]);
}

/// Asserts that nothing of the host is reached from a directory that a VMM holds open, as code that has broken out would try it.
fn leads_nowhere(vmm: i32) {
    use rustix::fs::{Mode, OFlags, fstat, openat};
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let pidfd = pidfd_open(Pid::from_raw(vmm).unwrap(), PidfdFlags::empty()).unwrap();
    let root = fs::metadata("/").unwrap();
    let mut tried = 0;
    for entry in fs::read_dir(format!("/proc/{vmm}/fd")).unwrap() {
        let number = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        let Ok(held) = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) else { continue };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(up) = openat(&held, "../../../../../../../..", flags, Mode::empty()) else { continue };
        let up = fstat(&up).unwrap();
        assert_ne!((up.st_dev, up.st_ino), (root.dev(), root.ino()), "descriptor {number} leads to the host's root");
        tried += 1;
    }
    assert!(tried >= 2, "the volumes");
}

#[tokio::test]
async fn what_cannot_be_mounted_is_refused_by_its_field() {
    let (client, pod, _logs) = pod().await;
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let both = cri::Mount {
        propagation: cri::MountPropagation::PropagationBidirectional.into(),
        ..mount(directory.path(), "/data")
    };
    let mapping = vec![cri::IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
    let halved = cri::Mount { uid_mappings: mapping.clone(), ..mount(directory.path(), "/data") };
    let mapped = cri::Mount { gid_mappings: mapping, ..halved.clone() };
    for (mount, field, word) in [
        (mount(&socket, "/run/socket"), "config.mounts[1].host_path", "socket"),
        (mount(Path::new("/dev/kmsg"), "/log"), "config.mounts[1].host_path", "character device"),
        (both, "config.mounts[1].propagation", "HostToContainer"),
        (halved, "config.mounts[1].uidMappings", "mapped together"),
        (mapped, "config.mounts[1].uidMappings", "the pod is in no user namespace"),
    ] {
        let asked = config(vec![self::mount(directory.path(), "/first"), mount]);
        let error = client.create_as(&pod, asked).await.unwrap_err();
        assert!(error.message().starts_with(field) && error.message().contains(word), "{error}");
    }
    let device =
        |path: &str| cri::Device { host_path: path.into(), container_path: "/dev/x".into(), ..Default::default() };
    let asked = cri::ContainerConfig { devices: vec![device("/dev/kmsg")], ..config(vec![]) };
    let error = client.create_as(&pod, asked).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().starts_with("config.devices[0].host_path"), "{error}");
    // The pod is none the worse.
    let id = run(&client, &pod, vec![mount(directory.path(), "/data")]).await;
    assert_eq!(shell(&client, &id, "ls -F /data").await, "socket=\n");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn missing_paths_become_directories_and_links_lead_where_the_host_says() {
    let (client, pod, _logs) = pod().await;
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir_all(directory.path().join("real/deep")).unwrap();
    fs::write(directory.path().join("real/deep/file"), "here").unwrap();
    symlink(directory.path().join("real"), directory.path().join("link")).unwrap();
    let mounts = vec![
        mount(&directory.path().join("missing/deep"), "/made"),
        mount(&directory.path().join("link/deep"), "/linked"),
        mount(&directory.path().join("link/deep/file"), "/etc/a-file"),
        // One inside the other, in the wrong order.
        mount(&directory.path().join("real"), "/outer/inner/deepest"),
        mount(&directory.path().join("missing"), "/outer/inner"),
    ];
    let id = run(&client, &pod, mounts).await;
    shell(&client, &id, "echo x > /made/new").await;
    assert!(directory.path().join("missing/deep/new").is_file());
    assert_eq!(
        shell(&client, &id, "cat /linked/file /etc/a-file /outer/inner/deepest/deep/file").await,
        "hereherehere"
    );
    // A link in a volume is the container's, and leads nowhere on the host.
    symlink("/etc/hostname", directory.path().join("real/deep/escape")).unwrap();
    let inside = shell(&client, &id, "cat /linked/escape").await;
    assert_ne!(inside, fs::read_to_string("/etc/hostname").unwrap_or_default());
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn hundreds_of_files_and_a_deep_tree_are_all_there() {
    let (client, pod, _logs) = pod().await;
    let directory = tempfile::tempdir().unwrap();
    for number in 0..600 {
        fs::write(directory.path().join(format!("file-{number}")), number.to_string()).unwrap();
    }
    let mut deep = directory.path().to_owned();
    for level in 0..60 {
        deep.push(format!("level-{level}"));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), "found").unwrap();
    let id = run(&client, &pod, vec![mount(directory.path(), "/data")]).await;
    assert_eq!(shell(&client, &id, "ls /data | wc -l; cat /data/file-* | wc -c").await.trim(), "601\n1690");
    assert_eq!(shell(&client, &id, "cat $(find /data -name bottom)").await, "found");
    shell(&client, &id, "cp -r /data/level-0 /data/copy; rm -r /data/level-0; rm /data/file-*").await;
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    assert_eq!(shell(&client, &id, "cat $(find /data -name bottom)").await, "found");
    // Four MiB, written in the guest and on the host.
    shell(&client, &id, "seq 1 700000 > /data/big; sync; sha256sum /data/big > /data/sum").await;
    let sum = Command::new("sha256sum").arg(directory.path().join("big")).output().unwrap().stdout;
    assert_eq!(sum[..64], fs::read(directory.path().join("sum")).unwrap()[..64]);
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_volume_in_use_outlives_the_daemon_and_goes_with_its_container() {
    let mut daemon = Daemon::start("").await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let (pod, _logs) = pod_of(&client).await;
    let directory = tempfile::tempdir().unwrap();
    let writer = "i=0; while :; do i=$((i+1)); echo $i >> /data/log; usleep 20000; done";
    let asked = cri::ContainerConfig {
        command: ["sh", "-c", writer].map(str::to_owned).to_vec(),
        ..config(vec![mount(directory.path(), "/data")])
    };
    let id = start(&client, &pod, asked).await;
    let lines = || fs::read_to_string(directory.path().join("log")).unwrap_or_default().lines().count();
    let more = async |than: usize| {
        let begun = Instant::now();
        while lines() <= than {
            assert!(begun.elapsed() < limit(20), "nothing more is written");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    more(3).await;
    daemon.kill();
    let then = lines();
    more(then).await;
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    more(lines()).await;
    assert_eq!(client.status(&id).await.unwrap().mounts.len(), 1);
    let log = fs::read_to_string(directory.path().join("log")).unwrap();
    assert!(log.lines().enumerate().all(|(index, line)| line == (index + 1).to_string()), "lines are missing");
    // The VMM lets go of it at once.
    let vmm = client.vmm_pid(&pod).await.unwrap();
    // By number: it has them from a copy of the mount, where they have other names.
    let number = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let ours = [number(directory.path()), number(&directory.path().join("log"))];
    let held = || {
        let files = fs::read_dir(format!("/proc/{vmm}/fd")).unwrap().flatten();
        files.filter(|file| ours.contains(&number(&file.path()))).count()
    };
    assert!(held() > 0);
    client.stop(&id, 0).await.unwrap();
    client.remove(&id).await.unwrap();
    assert_eq!(held(), 0);
    let id = run(&client, &pod, vec![mount(directory.path(), "/again")]).await;
    shell(&client, &id, "test -s /again/log").await;
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn an_image_is_mounted_as_a_volume() {
    let (client, pod, _logs) = pod().await;
    let of_image = |sub: &str, container: &str| cri::Mount {
        container_path: container.into(),
        image: Some(cri::ImageSpec { image: image("busybox"), ..Default::default() }),
        image_sub_path: sub.into(),
        readonly: true,
        ..cri::Mount::default()
    };
    let id = run(&client, &pod, vec![of_image("", "/whole"), of_image("bin", "/part")]).await;
    shell(&client, &id, "test -x /whole/bin/busybox && test -x /part/busybox").await;
    assert!(refused(&client, &id, "touch /whole/new").await.contains("Read-only"));
    let status = client.status(&id).await.unwrap();
    let shown: Vec<_> = status.mounts.into_iter().map(|mount| mount.image.unwrap().image_ref).collect();
    assert_eq!(shown, [status.image_id.clone(), status.image_id], "the container's own image");
    client.remove(&id).await.unwrap();
    let written = cri::Mount { readonly: false, ..of_image("", "/x") };
    let error = client.create_as(&pod, config(vec![written])).await.unwrap_err();
    assert!(error.message().starts_with("config.mounts[0].readonly: "), "{error}");
    let error = client.create_as(&pod, config(vec![of_image("no/such", "/part")])).await.unwrap_err();
    assert!(error.message().contains("no/such"), "{error}");
    let missing = cri::Mount {
        image: Some(cri::ImageSpec { image: image("never-pulled"), ..Default::default() }),
        ..of_image("", "/x")
    };
    let error = client.create_as(&pod, config(vec![missing])).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_block_device_of_the_host_is_one_in_the_container() {
    let (client, pod, _logs) = pod().await;
    let disk = Disk::attach(8 << 20);
    let asked = cri::ContainerConfig { devices: vec![disk.device("rwm")], ..config(vec![]) };
    let id = start(&client, &pod, asked).await;
    shell(&client, &id, "test -b /dev/xvda; echo from the guest | dd of=/dev/xvda bs=512 conv=sync,fsync").await;
    client.remove(&id).await.unwrap();
    assert!(disk.content().starts_with(b"from the guest\n"));
    let asked = cri::ContainerConfig { devices: vec![disk.device("r")], ..config(vec![]) };
    let id = start(&client, &pod, asked).await;
    assert_eq!(shell(&client, &id, "head -n 1 /dev/xvda").await, "from the guest\n");
    refused(&client, &id, "dd if=/dev/zero of=/dev/xvda bs=512 count=1 conv=fsync").await;
    client.remove_pod(&pod).await.unwrap();
    disk.detach();
}
