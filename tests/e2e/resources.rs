//! Limits: as the guest's kernel has them, from outside, changed while a pod runs, and
//! what happens at them.

use std::path::{Path, PathBuf};

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, pod_config};
use nacelle_tests::daemon::Daemon;
use tonic::Code;

type Limits = cri::LinuxContainerResources;

const MIB: i64 = 1 << 20;

/// A cgroup on the host that ends with the test, as a kubelet makes one for a pod.
struct HostCgroup(PathBuf);

impl HostCgroup {
    fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let path = Path::new("/sys/fs/cgroup").join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        for (file, value) in files {
            std::fs::write(path.join(file), value).unwrap();
        }
        Self(path)
    }

    fn name(&self) -> String {
        format!("/{}", self.0.strip_prefix("/sys/fs/cgroup").unwrap().display())
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.0.join(file)).unwrap().trim().to_owned()
    }

    fn write(&self, file: &str, value: &str) {
        std::fs::write(self.0.join(file), value).unwrap();
    }

    /// How many processes below it the host's kernel has killed for want of memory.
    fn oom_kills(&self) -> String {
        let events = self.read("memory.events");
        events.lines().find_map(|line| line.strip_prefix("oom_kill ")).unwrap().to_owned()
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

async fn sleeper(client: &Client, pod: &str, limits: Limits) -> Result<String, tonic::Status> {
    let mut config = container_config("busybox", &["sleep", "1000"]);
    config.linux.as_mut().unwrap().resources = Some(limits);
    let id = client.create_as(pod, config).await?;
    client.start(&id).await?;
    Ok(id)
}

/// As [`sleeper`], with `/host/zeros`, a file of 160 MiB that takes no space on the host: reading it fills the guest's page
/// cache. (What is written to the pod's disk is memory of the host where that lies on a tmpfs, as on an emulated one.)
async fn reader(client: &Client, pod: &str, limits: Limits, directory: &Path) -> String {
    std::fs::File::create(directory.join("zeros")).unwrap().set_len(160 << 20).unwrap();
    let mut config = container_config("busybox", &["sleep", "1000"]);
    config.linux.as_mut().unwrap().resources = Some(limits);
    let host_path = directory.to_string_lossy().into_owned();
    config.mounts = vec![cri::Mount { host_path, container_path: "/host".into(), ..Default::default() }];
    let id = client.create_as(pod, config).await.unwrap();
    client.start(&id).await.unwrap();
    id
}

async fn shell(client: &Client, id: &str, script: &str) -> String {
    let answer = client.exec(id, &["sh", "-c", script]).await.unwrap();
    String::from_utf8_lossy(&[answer.stdout, answer.stderr].concat()).trim().to_owned()
}

async fn update(client: &Client, id: &str, limits: Limits) -> Result<(), tonic::Status> {
    let request =
        cri::UpdateContainerResourcesRequest { container_id: id.into(), linux: Some(limits), ..Default::default() };
    client.runtime.clone().update_container_resources(request).await.map(drop)
}

const FILES: &str = "cd /sys/fs/cgroup; for f in cpu.max cpu.weight cpuset.cpus memory.max memory.swap.max memory.high \
                     pids.max hugetlb.2MB.max; do echo $f $(cat $f); done; echo score $(cat /proc/1/oom_score_adj)";

#[tokio::test]
async fn every_limit_is_the_guest_s_kernel_s_and_can_be_changed() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let limits = Limits {
        cpu_period: 50_000,
        cpu_quota: 20_000,
        cpu_shares: 1024,
        memory_limit_in_bytes: 64 * MIB,
        memory_swap_limit_in_bytes: 64 * MIB,
        oom_score_adj: 500,
        // The host's, as a static CPU manager names them for every container: not the guest's.
        cpuset_cpus: "0,40-63".into(),
        cpuset_mems: "0-1".into(),
        hugepage_limits: vec![
            cri::HugepageLimit { page_size: "2MB".into(), limit: 4 << 20 },
            cri::HugepageLimit { page_size: "1GB".into(), limit: 0 },
        ],
        unified: [("pids.max".to_owned(), "20".to_owned()), ("memory.high".to_owned(), (48 * MIB).to_string())].into(),
    };
    let id = sleeper(&client, &pod, limits.clone()).await.unwrap();
    let expected = [
        "cpu.max 20000 50000",
        "cpu.weight 100",
        "cpuset.cpus",
        "memory.max 67108864",
        "memory.swap.max 0",
        "memory.high 50331648",
        "pids.max 20",
        "hugetlb.2MB.max 4194304",
        "score 500",
    ];
    assert_eq!(shell(&client, &id, FILES).await.lines().collect::<Vec<_>>(), expected);
    let shown = client.status(&id).await.unwrap().resources.unwrap().linux.unwrap();
    assert_eq!(shown, limits);
    let change = Limits { cpu_quota: 30_000, memory_limit_in_bytes: 80 * MIB, ..Default::default() };
    update(&client, &id, change).await.unwrap();
    let files = shell(&client, &id, FILES).await;
    for line in ["cpu.max 30000 50000", "memory.max 83886080", "cpu.weight 100", "pids.max 20"] {
        assert!(files.lines().any(|found| found == line), "no {line} in {files}");
    }
    let shown = client.status(&id).await.unwrap().resources.unwrap().linux.unwrap();
    assert_eq!((shown.cpu_quota, shown.memory_limit_in_bytes, shown.cpu_shares), (30_000, 80 * MIB, 1024));
    for (beyond, word) in [
        (Limits { memory_limit_in_bytes: 4096 * MIB, ..Default::default() }, "memory limit"),
        (Limits { cpu_quota: 500_000, cpu_period: 100_000, ..Default::default() }, "processors"),
    ] {
        let error = update(&client, &id, beyond).await.unwrap_err();
        assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
        assert!(error.message().contains(word) && error.message().contains("guest"), "{}", error.message());
    }
    for (wrong, word) in [
        (
            Limits { unified: [("memory.nonsense".to_owned(), "1".to_owned())].into(), ..Default::default() },
            "memory.nonsense",
        ),
        (Limits { cpuset_cpus: "5-1".into(), ..Default::default() }, "cpuset_cpus"),
        (Limits { cpu_period: 5, ..Default::default() }, "linux.cpu_period"),
    ] {
        let error = update(&client, &id, wrong.clone()).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(word), "{}", error.message());
    }
    let missing = update(&client, "0123456789", Limits::default()).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound, "{missing}");
    // More processes than it may have: it is told so.
    let said = shell(&client, &id, "for i in $(seq 30); do sleep 9 & done 2>&1").await;
    assert!(said.contains("Resource temporarily unavailable") || said.contains("can't fork"), "{said}");
    client.stop(&id, 0).await.unwrap();
    let ended = update(&client, &id, Limits { cpu_shares: 10, ..Default::default() }).await.unwrap_err();
    assert_eq!(ended.code(), Code::FailedPrecondition, "{ended}");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_container_that_needs_more_memory_than_it_may_have_is_oom_killed() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let mut config = container_config("busybox", &["sh", "-c", "dd if=/dev/zero of=/dev/null bs=64M"]);
    config.linux.as_mut().unwrap().resources =
        Some(Limits { memory_limit_in_bytes: 15 * MIB, memory_swap_limit_in_bytes: 15 * MIB, ..Default::default() });
    let id = client.create_as(&pod, config).await.unwrap();
    client.start(&id).await.unwrap();
    let status = client.wait_exit(&id).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn the_guest_is_as_large_as_its_pod_and_bounded_from_outside() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let parent =
        HostCgroup::new("kubepods-test", &[("pids.max", "300"), ("memory.max", "700M"), ("cpu.max", "200000 100000")]);
    let mut config = pod_config(logs.path());
    let linux = config.linux.as_mut().unwrap();
    linux.cgroup_parent = parent.name();
    linux.resources = Some(Limits {
        memory_limit_in_bytes: 400 * MIB,
        cpu_quota: 150_000,
        cpu_period: 100_000,
        cpu_shares: 1536,
        ..Default::default()
    });
    linux.overhead = Some(Limits { memory_limit_in_bytes: 200 * MIB, ..Default::default() });
    let pod = client.run_pod_as(config).await.unwrap();
    let id = sleeper(&client, &pod, Limits::default()).await.unwrap();
    // Two processors that work, and the memory of the limit beside the guest's own.
    assert_eq!(shell(&client, &id, "nproc; cat /sys/devices/system/cpu/online").await, "2\n0-1");
    let both = "taskset 1 true && taskset 2 sh -c 'cut -d\" \" -f39 /proc/self/stat'";
    assert_eq!(shell(&client, &id, both).await, "1", "the second processor runs programs");
    let total: i64 = shell(&client, &id, "grep MemTotal /proc/meminfo | tr -dc 0-9").await.parse().unwrap();
    assert!((400 * 1024..520 * 1024).contains(&total), "{total} KiB");
    // The VMM was born in the pod's cgroup.
    let vmm = client.vmm_pid(&pod).await.unwrap();
    let cgroup = std::fs::read_to_string(format!("/proc/{vmm}/cgroup")).unwrap();
    assert!(cgroup.contains(&format!("{}/nacelle-{pod}", parent.name())), "{cgroup}");
    let own = parent.0.join(format!("nacelle-{pod}"));
    let own = |file: &str| std::fs::read_to_string(own.join(file)).unwrap().trim().to_owned();
    assert_eq!((own("memory.max"), own("cpu.max")), ((600 * MIB).to_string(), "150000 100000".into()));
    let used: i64 = parent.read("memory.current").parse().unwrap();
    assert!(used > 30 * MIB, "the guest's memory is the pod's: {used}");
    // How many processes the pod may have is the kubelet's to say, and the guest's to hold.
    let said =
        shell(&client, &id, "grep -q . /proc/1/status; for i in $(seq 400); do sleep 9 & done 2>&1 | tail -1").await;
    assert!(said.contains("can't fork") || said.contains("unavailable"), "{said}");

    let change = |memory: i64, quota: i64| cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.clone(),
        overhead: None,
        resources: Some(Limits { memory_limit_in_bytes: memory, cpu_quota: quota, ..Default::default() }),
    };
    let mut runtime = client.runtime.clone();
    runtime.update_pod_sandbox_resources(change(380 * MIB, 120_000)).await.unwrap();
    assert_eq!((own("memory.max"), own("cpu.max")), ((580 * MIB).to_string(), "120000 100000".into()));
    let error = runtime.update_pod_sandbox_resources(change(900 * MIB, 0)).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_pod_that_comes_to_its_limit_on_the_host_is_told_as_it_is() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let parent = HostCgroup::new("kubepods-oom", &[("memory.max", "120M"), ("memory.swap.max", "0")]);
    let mut config = pod_config(logs.path());
    config.linux.as_mut().unwrap().cgroup_parent = parent.name();
    let pod = client.run_pod_as(config).await.unwrap();
    let id = sleeper(&client, &pod, Limits::default()).await.unwrap();
    // The guest fits. Somebody takes away what it has not touched yet.
    let used: i64 = parent.read("memory.current").parse().unwrap();
    parent.write("memory.max", &(used + 8 * MIB).to_string());
    let eater = client.exec(&id, &["dd", "if=/dev/zero", "of=/dev/null", "bs=40M", "count=1"]).await;
    assert!(eater.is_err(), "the guest ended under it");
    client.wait_not_ready(&pod).await.unwrap();
    let status = client.status(&id).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    assert!(status.message.contains("out-of-memory"), "{}", status.message);
    client.remove_pod(&pod).await.unwrap();
}

/// A pod with these limits and this overhead, in MiB, in a cgroup as a kubelet makes it for them.
fn kubelet_pod(logs: &Path, name: &str, limit: i64, overhead: i64) -> (cri::PodSandboxConfig, HostCgroup) {
    let all = ((limit + overhead) * MIB).to_string();
    let parent = HostCgroup::new(name, &[("memory.max", &all), ("memory.swap.max", "0")]);
    let bytes = |mib: i64| (mib > 0).then(|| Limits { memory_limit_in_bytes: mib * MIB, ..Default::default() });
    let mut config = pod_config(logs);
    let linux = config.linux.as_mut().unwrap();
    (linux.cgroup_parent, linux.resources, linux.overhead) = (parent.name(), bytes(limit), bytes(overhead));
    (config, parent)
}

#[tokio::test]
async fn a_container_can_use_all_of_its_limit_and_its_pod_stays_within_its_cgroup() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let (config, parent) = kubelet_pod(logs.path(), "kubepods-fit", 128, 64);
    let pod = client.run_pod_as(config).await.unwrap();
    let limits =
        Limits { memory_limit_in_bytes: 128 * MIB, memory_swap_limit_in_bytes: 128 * MIB, ..Default::default() };
    let id = reader(&client, &pod, limits, logs.path()).await;
    // All but what a shell has; and more than all, for which the container's own limit ends it.
    let eat = |mib: i64| format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 2>/dev/null; echo $?");
    assert_eq!(shell(&client, &id, &eat(122)).await, "0");
    assert_eq!(shell(&client, &id, &eat(140)).await, "137");
    // Every page of the guest is touched by its page cache.
    shell(&client, &id, "cat /host/zeros >/dev/null").await;
    assert_eq!(shell(&client, &id, &eat(122)).await, "0");
    assert_eq!(parent.oom_kills(), "0");
    assert_eq!(client.status(&id).await.unwrap().state(), cri::ContainerState::ContainerRunning);
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_pod_without_overhead_has_a_guest_that_fits_or_is_told_what_it_takes() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let (config, parent) = kubelet_pod(logs.path(), "kubepods-tight", 160, 0);
    let pod = client.run_pod_as(config).await.unwrap();
    let limits = Limits { memory_limit_in_bytes: 160 * MIB, ..Default::default() };
    let id = reader(&client, &pod, limits, logs.path()).await;
    shell(&client, &id, "cat /host/zeros >/dev/null").await;
    // What it asks for again it has.
    update(&client, &id, Limits { memory_limit_in_bytes: 160 * MIB, cpu_shares: 100, ..Default::default() })
        .await
        .unwrap();
    assert_eq!(parent.oom_kills(), "0");
    client.remove_pod(&pod).await.unwrap();
    let (config, _parent) = kubelet_pod(logs.path(), "kubepods-none", 48, 0);
    let error = client.run_pod_as(config).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert!(error.message().contains("RuntimeClass whose overhead.podFixed.memory is"), "{}", error.message());
}

#[tokio::test]
async fn each_guest_s_process_has_the_oom_score_of_its_pod_s_class() {
    // The daemon is one that the kernel spares, as its unit has it.
    let own = Path::new("/proc/self/oom_score_adj");
    let before = std::fs::read_to_string(own).unwrap();
    std::fs::write(own, "-500").unwrap();
    let daemon = Daemon::start("").await;
    std::fs::write(own, before).unwrap();
    let daemon = daemon.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let top = HostCgroup::new("oom", &[]);
    let score = async |pod: &str| {
        let pid = client.vmm_pid(pod).await.unwrap();
        std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned()
    };
    let container = async |pod: &str, oom_score_adj: i64| {
        sleeper(&client, pod, Limits { oom_score_adj, ..Default::default() }).await.unwrap()
    };
    let mut pods = Vec::new();
    for (parent, expected) in [
        (String::new(), "0"),
        (format!("{}/kubepods/besteffort/pod1", top.name()), "1000"),
        (format!("{}/kubepods/pod2", top.name()), "-997"),
        (format!("{}/kubepods/burstable/pod3", top.name()), "999"),
    ] {
        let mut config = pod_config(logs.path());
        config.linux.as_mut().unwrap().cgroup_parent = parent.clone();
        let pod = client.run_pod_as(config).await.unwrap();
        assert_eq!(score(&pod).await, expected, "{parent}");
        pods.push(pod);
    }
    // As soon as the containers are known, what they request in all.
    let burstable = &pods[3];
    container(burstable, 700).await;
    assert_eq!(score(burstable).await, "700");
    let second = container(burstable, 900).await;
    assert_eq!(score(burstable).await, "600");
    client.remove(&second).await.unwrap();
    assert_eq!(score(burstable).await, "700");
    container(&pods[2], -997).await;
    assert_eq!(score(&pods[2]).await, "-997");
    for pod in &pods {
        client.remove_pod(pod).await.unwrap();
    }
    for inner in ["kubepods/besteffort/pod1", "kubepods/besteffort", "kubepods/pod2", "kubepods/burstable/pod3"]
        .into_iter()
        .chain(["kubepods/burstable", "kubepods"])
    {
        std::fs::remove_dir(top.0.join(inner)).unwrap();
    }
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn processors_of_the_host_are_for_the_whole_pod() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let parent = HostCgroup::new("kubepods-cpuset", &[]);
    let mut config = pod_config(logs.path());
    config.linux.as_mut().unwrap().cgroup_parent = parent.name();
    let pod = client.run_pod_as(config).await.unwrap();
    let own = parent.0.join(format!("nacelle-{pod}"));
    let own = |file: &str| std::fs::read_to_string(own.join(file)).unwrap().trim().to_owned();
    let pinned = || Limits { cpuset_cpus: "0".into(), cpuset_mems: "0".into(), ..Default::default() };
    let first = sleeper(&client, &pod, pinned()).await.unwrap();
    assert_eq!((own("cpuset.cpus"), own("cpuset.mems")), ("0".into(), "0".into()));
    // Whose container is not bound binds the pod no more, until it is.
    let second = sleeper(&client, &pod, Limits::default()).await.unwrap();
    let all = |file: &str| std::fs::read_to_string(parent.0.join(file)).unwrap().trim().to_owned();
    assert_eq!(own("cpuset.cpus"), all("cpuset.cpus.effective"));
    assert_eq!(own("cpuset.mems"), all("cpuset.mems.effective"));
    update(&client, &second, pinned()).await.unwrap();
    assert_eq!(own("cpuset.cpus"), "0");
    // Processors that nobody has are no reason to refuse a pod.
    update(&client, &first, Limits { cpuset_cpus: "0-4000".into(), ..Default::default() }).await.unwrap();
    let shown = client.status(&first).await.unwrap().resources.unwrap().linux.unwrap();
    assert_eq!(shown.cpuset_cpus, "0-4000");
    assert_eq!(shell(&client, &first, "nproc; cat /sys/fs/cgroup/cpuset.cpus").await, "1");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn limits_that_somebody_has_taken_from_the_pod_s_cgroup_are_put_back() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let (config, parent) = kubelet_pod(logs.path(), "kubepods-systemd", 200, 100);
    let pod = client.run_pod_as(config).await.unwrap();
    let own = parent.0.join(format!("nacelle-{pod}"));
    let limit = || std::fs::read_to_string(own.join("memory.max")).map(|limit| limit.trim().to_owned());
    assert_eq!(limit().unwrap(), (300 * MIB).to_string());
    // What systemd does to a slice none of whose units wants the controller.
    parent.write("cgroup.subtree_control", "-memory");
    assert!(limit().is_err());
    let stats = client.pod_stats(&pod).await.unwrap();
    assert!(stats.linux.unwrap().memory.is_some(), "its memory is measured again");
    parent.write("cgroup.subtree_control", "-memory");
    sleeper(&client, &pod, Limits::default()).await.unwrap();
    assert_eq!(limit().unwrap(), (300 * MIB).to_string());
    client.remove_pod(&pod).await.unwrap();
}
