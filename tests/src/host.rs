//! The host: what pods leave on it, and its programs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every VMM whose configuration lies under `run`: process and command line.
pub fn vmm_processes(run: &Path) -> Vec<(i32, String)> {
    let ours = |command: &str| command.contains(" vmm ") && command.contains(&*run.to_string_lossy());
    processes().into_iter().filter(|(_, command)| ours(command)).collect()
}

/// All processes, with their arguments separated by spaces.
pub fn processes() -> Vec<(i32, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        found.push((pid, String::from_utf8_lossy(&command).replace('\0', " ")));
    }
    found
}

/// Everything of pods that is there: processes, directories, cgroups, mounts. A template that
/// the daemon is making meanwhile is of no pod.
pub fn leftovers(root: &Path, run: &Path) -> Vec<String> {
    let mut found: Vec<_> =
        vmm_processes(run).into_iter().map(|(pid, command)| format!("process {pid}: {command}")).collect();
    for directory in [root.join("pods"), run.join("pods")] {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            found.push(entry.path().display().to_string());
        }
    }
    for mount in std::fs::read_to_string("/proc/mounts").expect("/proc/mounts").lines() {
        if mount.contains(&format!("{}/", run.display())) || mount.contains(&format!("{}/pods", root.display())) {
            found.push(format!("mount {mount}"));
        }
    }
    found.retain(|thing| !thing.contains("/pods/template-"));
    found
}

/// Cgroups of this sandbox.
pub fn cgroups(id: &str) -> Vec<String> {
    fn walk(directory: &Path, name: &str, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_string_lossy() == name {
                    found.push(entry.path().display().to_string());
                }
                walk(&entry.path(), name, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), &format!("nacelle-{id}"), &mut found);
    found
}

/// Runs a program of the host.
///
/// # Panics
/// If it fails, with what it said.
pub fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The kernel of the host.
pub fn kernel_release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("osrelease").trim().to_owned()
}

/// What a pod could leave on this host: processes of VMMs, network namespaces, network
/// devices, mounts, cgroups, files of pods.
pub fn inventory() -> Vec<String> {
    let run = Path::new("/run/nacelle");
    let mut found = leftovers(Path::new("/var/lib/nacelle"), run);
    found.extend(network_namespaces().into_iter().map(|namespace| format!("network namespace {namespace}")));
    for name in std::fs::read_to_string("/proc/net/dev").expect("/proc/net/dev").lines().skip(2) {
        found.push(format!("network device {}", name.split(':').next().unwrap_or_default().trim()));
    }
    for mount in std::fs::read_to_string("/proc/mounts").expect("/proc/mounts").lines() {
        found.push(format!("mount {mount}"));
    }
    let mut directories = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_string_lossy().starts_with("nacelle-") {
                    found.push(format!("cgroup {}", entry.path().display()));
                }
                directories.push(entry.path());
            }
        }
    }
    found
}

/// Network namespaces that have a name or a process.
fn network_namespaces() -> BTreeSet<String> {
    let named = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let named = named.map(|entry| entry.path().display().to_string());
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let used = processes.filter_map(|entry| std::fs::read_link(entry.path().join("ns/net")).ok());
    named.chain(used.map(|link| link.display().to_string())).collect()
}
