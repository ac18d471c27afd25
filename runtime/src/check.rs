//! `nacelle check`: whether this host can run guests, in words, and what to do.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use kvm_ioctls::Kvm;
use nacelle_sandbox::{GuestConfig, GuestHandler, Network, Versions, versions_on_record};

use crate::config::Config;

/// The KVM API that has been the only one since 2007.
const KVM_API: i32 = 12;

/// One finding.
struct Finding {
    what: &'static str,
    result: Result<String, String>,
    /// Whether guests cannot run without it.
    required: bool,
}

/// What stands behind /dev/kvm.
#[derive(Debug, PartialEq, Eq)]
enum Virtualisation {
    /// The processor's own.
    Hardware(&'static str),
    /// Emulated in software: guests would die in it.
    Software,
}

/// Prints what was found; fails if guests cannot run.
pub fn main(config: &Config) -> ExitCode {
    let guest = config.default_guest();
    let findings = [
        Finding { what: "virtualisation", result: virtualisation(), required: true },
        Finding { what: "guest kernel", result: readable(&guest.kernel, "guest.kernel"), required: true },
        Finding { what: "guest initramfs", result: readable(&guest.initramfs, "guest.initramfs"), required: true },
        Finding { what: "handlers", result: handlers(config), required: false },
        Finding { what: "mkfs.ext4", result: mkfs(), required: true },
        Finding { what: "cgroup v2", result: cgroup(), required: false },
        Finding { what: "pod network", result: network(config), required: false },
        Finding { what: "directories", result: directories(config), required: false },
        Finding { what: "pods", result: pods(config), required: false },
    ];
    let mut ready = true;
    for finding in findings {
        match finding.result {
            Ok(words) => println!("ok       {:<16} {words}", finding.what),
            Err(words) if finding.required => {
                ready = false;
                println!("MISSING  {:<16} {words}", finding.what);
            }
            Err(words) => println!("warning  {:<16} {words}", finding.what),
        }
    }
    if ready {
        println!("This host can run guests.");
        ExitCode::SUCCESS
    } else {
        println!("This host cannot run guests: see MISSING above.");
        ExitCode::FAILURE
    }
}

/// The short form for the CRI's Status: why guests cannot run, or that they can.
pub fn guests_can_run(guest: &GuestConfig) -> Result<(), String> {
    virtualisation()?;
    has_files("guest", guest)
}

/// Which handlers cannot make guests, and why; `handlers` are those that do it in their own way.
pub fn handlers_can_run(handlers: &BTreeMap<String, GuestHandler>) -> Result<(), String> {
    let check = |(name, handler): (&String, &GuestHandler)| {
        let why = has_files(&format!("handlers.{name}"), &handler.guest).err()?;
        Some(format!("{name}: {why}"))
    };
    let troubles: Vec<_> = handlers.iter().filter_map(check).collect();
    if troubles.is_empty() { Ok(()) } else { Err(troubles.join("; ")) }
}

/// Whether what guests start from is there. `of` is the table of the configuration that says it.
fn has_files(of: &str, guest: &GuestConfig) -> Result<(), String> {
    readable(&guest.kernel, &format!("{of}.kernel"))?;
    readable(&guest.initramfs, &format!("{of}.initramfs"))?;
    Ok(())
}

fn virtualisation() -> Result<String, String> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return Err(no_kvm(&cpuinfo, &std::io::Error::from(error))),
    };
    let version = kvm.get_api_version();
    if version != KVM_API {
        return Err(format!("/dev/kvm speaks API {version}, not {KVM_API}: update the host's kernel"));
    }
    if let Err(error) = kvm.create_vm() {
        return Err(format!("/dev/kvm refuses to make a virtual machine ({error}): see the host's kernel log"));
    }
    match classify(&cpuinfo) {
        Virtualisation::Hardware(name) => Ok(format!("/dev/kvm on {name}")),
        Virtualisation::Software => {
            Err("/dev/kvm is there, but the processor shows neither vmx nor svm: it is emulated in software and a \
             guest's kernel dies in it. Use a bare-metal host, or enable nested virtualisation for this machine"
                .into())
        }
    }
}

fn no_kvm(cpuinfo: &str, error: &std::io::Error) -> String {
    let remedy = match (error.kind(), classify(cpuinfo)) {
        (std::io::ErrorKind::PermissionDenied, _) => "run as root, or as a member of the group kvm",
        (_, Virtualisation::Hardware(_)) => "load the module kvm_intel or kvm_amd",
        (_, Virtualisation::Software) => {
            "enable virtualisation in the firmware, or nested virtualisation if this is a virtual machine"
        }
    };
    format!("/dev/kvm cannot be used ({error}): {remedy}")
}

fn classify(cpuinfo: &str) -> Virtualisation {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    if has("vmx") {
        Virtualisation::Hardware("Intel VT-x")
    } else if has("svm") {
        Virtualisation::Hardware("AMD-V")
    } else {
        Virtualisation::Software
    }
}

fn readable(path: &Path, key: &str) -> Result<String, String> {
    match std::fs::File::open(path).and_then(|file| file.metadata()) {
        Ok(metadata) if metadata.is_file() && metadata.len() > 0 => {
            Ok(format!("{} ({} KiB)", path.display(), metadata.len() >> 10))
        }
        Ok(_) => Err(format!("{} is empty or no file: build the guest image, or set {key}", path.display())),
        Err(error) => Err(format!("{} ({error}): build the guest image, or set {key}", path.display())),
    }
}

fn handlers(config: &Config) -> Result<String, String> {
    handlers_can_run(&config.guest_handlers())?;
    let names = config.handlers.keys().map(|name| match *name == config.default_handler {
        true => format!("{name} (the default)"),
        false => name.clone(),
    });
    Ok(names.collect::<Vec<_>>().join(", "))
}

fn mkfs() -> Result<String, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join("mkfs.ext4"))
        .find(|program| program.exists())
        .map(|program| program.display().to_string())
        .ok_or_else(|| "not found in PATH: install the package e2fsprogs".into())
}

fn cgroup() -> Result<String, String> {
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Err("no cgroup v2 at /sys/fs/cgroup: pods run without limits from outside; boot with \
             systemd.unified_cgroup_hierarchy=1"
            .into());
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    if slow_to_change(&mounts, rustix::system::uname().release().to_str().unwrap_or_default()) {
        return Err(
            "/sys/fs/cgroup is mounted for few changes: each start of a pod waits some 10 ms until it may make \
             one: run mount -o remount,favordynmods /sys/fs/cgroup"
                .into(),
        );
    }
    Ok("/sys/fs/cgroup".into())
}

/// Whether moving a process to another group waits for all of the host's processors. A kernel
/// before 6.0 never does, a later one does unless the hierarchy is mounted with `favordynmods`.
fn slow_to_change(mounts: &str, release: &str) -> bool {
    let favoured = mounts.lines().any(|line| {
        let mut words = line.split(' ').skip(1);
        let hierarchy = words.next() == Some("/sys/fs/cgroup") && words.next() == Some("cgroup2");
        hierarchy && words.next().is_some_and(|options| options.split(',').any(|option| option == "favordynmods"))
    });
    let major = release.split('.').next().and_then(|major| major.parse::<u32>().ok());
    !favoured && major.is_some_and(|major| major >= 6)
}

fn directories(config: &Config) -> Result<String, String> {
    crate::directories::check(config).map_err(|error| error.to_string())?;
    Ok(format!("{} and {}", config.root.display(), config.run.display()))
}

/// What the running pods consist of, as far as that is on record.
fn pods(config: &Config) -> Result<String, String> {
    let told = versions_on_record(&config.root, &config.run).map_err(|error| error.to_string())?;
    kinds(&told.0, told.1)
}

/// `known` in words: how many pods have which VMM and agent; of `unknown` more nothing is known.
fn kinds(known: &BTreeMap<Versions, usize>, unknown: usize) -> Result<String, String> {
    // Which kernel it is, and what each of a version's features is called, says the status of each pod.
    let mut groups = BTreeMap::<String, usize>::new();
    for (versions, count) in known {
        let Versions { vmm, vmm_features, agent, agent_features, .. } = versions;
        let kind = match agent.as_str() {
            "" => "not asked yet".to_owned(),
            agent => {
                let vmm = release(vmm, vmm_features);
                format!("VMM {vmm}, agent {}", release(agent, agent_features))
            }
        };
        *groups.entry(kind).or_default() += count;
    }
    let mut words: Vec<_> = groups.into_iter().map(|(kind, count)| format!("{count} ({kind})")).collect();
    if words.is_empty() {
        words.push("none".into());
    }
    let words = words.join(", ");
    if unknown > 0 {
        return Err(format!("{words}, and {unknown} with records that cannot be used: see the daemon's log"));
    }
    Ok(words)
}

/// A version; those of the first release know nothing beyond it.
fn release(version: &str, features: &[String]) -> String {
    if features.is_empty() { format!("{version} of the first release") } else { version.to_owned() }
}

fn network(config: &Config) -> Result<String, String> {
    let network = Network::new(config.network.clone(), config.root.join("networks"), config.timeout_scale);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(|error| error.to_string())?;
    runtime.block_on(network.status()).map_err(|error| error.to_string())?;
    Ok(format!("configured in {}", config.network.conf_directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_virtualisation_is_told_from_software() {
        assert_eq!(classify("flags\t\t: fpu vmx sse"), Virtualisation::Hardware("Intel VT-x"));
        assert_eq!(classify("flags\t\t: fpu svm"), Virtualisation::Hardware("AMD-V"));
        assert_eq!(classify("flags\t\t: fpu vmxoff svm_lock\nvmx flags : ept"), Virtualisation::Software);
    }

    #[test]
    fn a_handler_without_its_kernel_is_told_by_its_name_and_key() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let with = |kernel: &Path| {
            let guest = GuestConfig { kernel: kernel.into(), initramfs: file.clone(), ..GuestConfig::default() };
            GuestHandler { guest, ..GuestHandler::default() }
        };
        let mut handlers = BTreeMap::from([("kata".to_owned(), with(&file))]);
        handlers_can_run(&handlers).unwrap();
        handlers.insert("own".into(), with(Path::new("/no/such/vmlinux")));
        let error = handlers_can_run(&handlers).unwrap_err();
        assert!(error.starts_with("own: /no/such/vmlinux") && error.contains("handlers.own.kernel"), "{error}");
    }

    #[test]
    fn a_hierarchy_for_few_changes_is_seen() {
        let plain = "sysfs /sys sysfs rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nsdelegate 0 0\n";
        let favoured = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,favordynmods 0 0\n";
        assert!(slow_to_change(plain, "6.1.0-57-amd64"));
        assert!(!slow_to_change(plain, "5.10.0-30-amd64"));
        assert!(!slow_to_change(favoured, "6.1.0-57-amd64"));
    }

    #[test]
    fn pods_are_counted_by_the_release_of_their_parts() {
        let of = |vmm: &str, agent: &str, feature: Option<&str>, kernel: &str| Versions {
            vmm: vmm.into(),
            vmm_features: feature.iter().map(ToString::to_string).collect(),
            agent: agent.into(),
            agent_features: feature.iter().map(ToString::to_string).collect(),
            kernel: kernel.into(),
        };
        assert_eq!(kinds(&BTreeMap::new(), 0).unwrap(), "none");
        let known = BTreeMap::from([
            (of("0.0.9", "0.1.0", None, ""), 1),
            (of("0.1.0", "0.1.0", Some("clock"), "6.12.1"), 2),
            (of("0.1.0", "0.1.0", Some("clock"), "6.12.2"), 3),
            (Versions::default(), 4),
        ]);
        let expected = "1 (VMM 0.0.9 of the first release, agent 0.1.0 of the first release), \
                        5 (VMM 0.1.0, agent 0.1.0), 4 (not asked yet)";
        assert_eq!(kinds(&known, 0).unwrap(), expected);
        assert!(kinds(&known, 2).unwrap_err().contains("2 with records"));
    }

    #[test]
    fn a_missing_kvm_names_a_remedy_that_fits() {
        let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let absent = std::io::Error::from(std::io::ErrorKind::NotFound);
        assert!(no_kvm("flags : svm", &denied).contains("group kvm"));
        assert!(no_kvm("flags : svm", &absent).contains("kvm_amd"));
        assert!(no_kvm("flags : fpu", &absent).contains("firmware"));
    }
}
