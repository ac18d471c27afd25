//! What has to hold after each point, on the host and in the pods.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, limit};
use tokio::time::{Instant, sleep};

use crate::node::{Node, PAUSE};
use crate::pods::{Pod, Want};

/// How many descriptors a daemon may have more than another with as many pods: connections and files that are open
/// just now.
const SLACK: usize = 6;

/// What is compared from point to point.
#[derive(Debug, Default)]
pub struct Check {
    /// Descriptors of a daemon, by its pods and the containers that run.
    descriptors: BTreeMap<(usize, usize), usize>,
}

impl Check {
    /// Waits until everything holds; what does not, if that takes too long.
    pub async fn all(&mut self, node: &Node, client: &Client, pods: &mut [Pod]) -> Vec<String> {
        let deadline = Instant::now() + limit(15);
        let mut said = false;
        loop {
            let mut broken = Vec::new();
            for pod in pods.iter_mut() {
                broken.extend(pod.broken(client).await);
            }
            broken.extend(listed(client, pods).await);
            broken.extend(host(node, pods));
            if broken.is_empty() {
                broken.extend(self.too_many_descriptors(node, pods));
            }
            if !said && Instant::now() + limit(13) > deadline && !broken.is_empty() {
                println!("  does not hold yet: {broken:?}");
                said = true;
            }
            if broken.is_empty() || Instant::now() > deadline {
                if broken.is_empty() {
                    note_lines(pods);
                }
                return broken;
            }
            sleep(PAUSE * 4).await;
        }
    }

    fn too_many_descriptors(&mut self, node: &Node, pods: &[Pod]) -> Option<String> {
        let containers = pods.iter().flat_map(|pod| &pod.containers);
        let key = (pods.len(), containers.filter(|container| container.want == Want::Running).count());
        let open = node.descriptors();
        let least = self.descriptors.entry(key).or_insert(open.len());
        *least = open.len().min(*least);
        let known = *least;
        let mut kinds = BTreeMap::<String, usize>::new();
        for name in &open {
            *kinds.entry(name.split(':').next().unwrap_or_default().to_owned()).or_default() += 1;
        }
        (open.len() > known + SLACK).then(|| {
            format!(
                "the daemon has {} descriptors for {key:?} pods and containers, once {known}: {kinds:?}",
                open.len()
            )
        })
    }
}

fn note_lines(pods: &mut [Pod]) {
    for container in pods.iter_mut().flat_map(|pod| &mut pod.containers) {
        if let Ok((lines, _)) = container.said() {
            container.lines = lines;
        }
    }
}

/// What the daemon lists that nobody wants.
async fn listed(client: &Client, pods: &[Pod]) -> Vec<String> {
    let mut broken = Vec::new();
    let ids: BTreeSet<_> = pods.iter().filter_map(|pod| pod.id.clone()).collect();
    match client.pods().await {
        Ok(listed) => {
            let there: BTreeSet<_> = listed.into_iter().map(|pod| pod.id).collect();
            broken.extend(there.difference(&ids).map(|id| format!("the pod {id} is listed, and nobody's")));
        }
        Err(error) => broken.push(format!("ListPodSandbox: {error}")),
    }
    let containers: BTreeSet<_> =
        pods.iter().flat_map(|pod| &pod.containers).filter_map(|container| container.id.clone()).collect();
    match client.runtime.clone().list_containers(cri::ListContainersRequest { filter: None }).await {
        Ok(listed) => {
            let there: BTreeSet<_> = listed.into_inner().containers.into_iter().map(|container| container.id).collect();
            broken
                .extend(there.difference(&containers).map(|id| format!("the container {id} is listed, and nobody's")));
        }
        Err(error) => broken.push(format!("ListContainers: {error}")),
    }
    broken
}

/// The names in a directory.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// What is on the host and no pod's, or not there.
fn host(node: &Node, pods: &[Pod]) -> Vec<String> {
    let ids: BTreeSet<String> = pods.iter().filter_map(|pod| pod.id.clone()).collect();
    let mut broken = Vec::new();
    let mut compare = |what: &str, there: Vec<String>| {
        let mut seen = BTreeSet::new();
        for name in there {
            if !ids.contains(&name) {
                broken.push(format!("{what} {name} is there, and no pod's"));
            } else if !seen.insert(name.clone()) {
                broken.push(format!("{what} {name} is there twice"));
            }
        }
        broken.extend(ids.difference(&seen).map(|id| format!("{what} {id} is not there")));
    };
    let path = node.path();
    let prefixed = |directory: &Path| -> Vec<String> {
        names(directory).into_iter().filter_map(|name| name.strip_prefix("nacelle-").map(str::to_owned)).collect()
    };
    compare("record", names(&path.join("root/pods")));
    compare("run directory", names(&path.join("r/pods")));
    compare("network namespace", prefixed(&path.join("netns")));
    compare("control group", prefixed(Path::new(&format!("/sys/fs/cgroup{}", node.cgroup()))));
    compare("address of", addresses(&path.join("ipam").join(node.bridge())));
    compare("VMM", machines(node));
    // Not by /sys, which shows the network namespace that it was mounted in.
    let listed = Command::new("ip").args(["-o", "link", "show", "master", node.bridge()]).output();
    let ports = listed.map_or(0, |listed| String::from_utf8_lossy(&listed.stdout).lines().count());
    if ports != ids.len() {
        broken.push(format!("the bridge has {ports} ports for {} pods", ids.len()));
    }
    for pod in pods {
        let containers: BTreeSet<_> = pod.containers.iter().filter_map(|container| container.id.as_deref()).collect();
        let records = names(&path.join("root/pods").join(pod.id.as_deref().unwrap_or_default()).join("containers"));
        let records: BTreeSet<_> = records.iter().map(|name| name.trim_end_matches(".json")).collect();
        if records != containers {
            broken.push(format!("of the containers {containers:?} the records {records:?} are there"));
        }
    }
    broken.extend(processes(node));
    broken.extend(disks(node, pods));
    broken.extend(mounts(node, &ids));
    broken.extend(files(node));
    broken
}

/// Whose addresses are taken: host-local has a file for each, with the container's id in its first line.
fn addresses(directory: &Path) -> Vec<String> {
    let files = names(directory).into_iter().filter(|name| name.parse::<std::net::IpAddr>().is_ok());
    files
        .map(|name| {
            let text = fs::read_to_string(directory.join(name)).unwrap_or_default();
            text.lines().next().unwrap_or_default().to_owned()
        })
        .collect()
}

/// Whose VMMs run.
fn machines(node: &Node) -> Vec<String> {
    let run = node.path().join("r/pods");
    let found = nacelle_tests::host::vmm_processes(&run).into_iter();
    found
        .map(|(pid, command)| {
            let rest = command.split(&*run.to_string_lossy()).nth(1).unwrap_or_default();
            match rest.split('/').nth(1) {
                Some(id) => id.to_owned(),
                None => format!("{pid} ({command})"),
            }
        })
        .collect()
}

/// Processes that have to do with this node's directory, and are neither the daemon nor VMMs.
fn processes(node: &Node) -> Vec<String> {
    let own = format!("{}/", node.path().display());
    let daemon = node.pid().map(rustix::process::Pid::as_raw_pid);
    let mut found = Vec::new();
    for (pid, command) in nacelle_tests::host::processes() {
        if command.contains(&own) && !command.contains(" vmm ") && Some(pid) != daemon {
            found.push(format!("process {pid} is nobody's: {command}"));
        }
    }
    found
}

/// Who has the block volume open, and should not, or the other way round.
fn disks(node: &Node, pods: &[Pod]) -> Vec<String> {
    let wanted: BTreeSet<_> = pods.iter().filter(|pod| pod.has_disk()).filter_map(|pod| pod.id.as_deref()).collect();
    let (disk, run) = (node.disk().host_path, node.path().join("r/pods"));
    let mut broken = Vec::new();
    for (pid, command) in nacelle_tests::host::processes() {
        let of_vmm = command.contains(" vmm ") && command.contains(&*run.to_string_lossy());
        if !of_vmm && Some(pid) != node.pid().map(rustix::process::Pid::as_raw_pid) {
            continue;
        }
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let opened = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        let has = opened.filter(|link| *link == Path::new(&disk)).count() > 0;
        let may = of_vmm && wanted.iter().any(|id| command.contains(*id));
        if has != may {
            broken.push(format!("process {pid} ({command}) has the block volume {disk}: {has}, and should: {may}"));
        }
    }
    broken
}

/// Mounts below this node's directory that are no pod's.
fn mounts(node: &Node, ids: &BTreeSet<String>) -> Vec<String> {
    let own = format!("{}/", node.path().display());
    let root = format!("{own}root");
    let all = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let ours = all.lines().filter_map(|line| line.split(' ').nth(1)).filter(|place| place.starts_with(&own));
    let of_nobody = ours.filter(|place| *place != root && !ids.iter().any(|id| place.contains(id.as_str())));
    of_nobody.map(|place| format!("mount {place} is no pod's")).collect()
}

/// Files that are half written.
fn files(node: &Node) -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![node.path().join("root/pods"), node.path().join("root/templates")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                directories.push(entry.path());
            } else if name.starts_with('.') || name.contains("tmp") || name.contains(".new") {
                found.push(format!("file {} is half written", entry.path().display()));
            }
        }
    }
    found
}
