//! Pods and their networks, with plugins as they behave.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::check::Checks;
use crate::{Error, Network, NetworkConfig, Pod, PortMapping, Protocol};

/// A host with a directory of its own.
struct Host {
    directory: TempDir,
    network: Network,
    id: String,
}

impl Host {
    /// With these limits; none if network namespaces cannot be made.
    fn new(plugin_seconds: u64, del_seconds: u64, scale: f64) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let config = NetworkConfig {
            conf_directory: path.join("net.d"),
            plugin_directories: vec![path.join("plugins")],
            netns_directory: path.join("netns"),
            plugin_seconds,
            del_seconds,
            ..NetworkConfig::default()
        };
        for name in ["net.d", "plugins", "pod"] {
            fs::create_dir(path.join(name)).unwrap();
        }
        let mut network = Network::new(config, path.join("left"), scale);
        let shared = Arc::get_mut(&mut network.shared).unwrap();
        shared.lock = path.join("lock");
        shared.checks = Checks::at_once();
        let host = Self { network, id: "5a".repeat(32), directory };
        let probe = crate::netns::Netns::at(path_of(&host, "probe"));
        match probe.create() {
            Err(error) if error.to_string().contains("not permitted") => {
                eprintln!("skipped: {error}");
                None
            }
            made => {
                made.unwrap();
                probe.remove().unwrap();
                Some(host)
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        path_of(self, name)
    }

    fn pod(&self) -> Pod {
        let port = PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port: 8080, host_ip: None };
        Pod { id: self.id.clone(), ports: vec![port], ..Pod::default() }
    }

    fn record(&self) -> PathBuf {
        self.path("pod/network.json")
    }

    fn netns(&self) -> PathBuf {
        self.path("netns").join(format!("nacelle-{}", self.id))
    }

    /// A plugin that logs its command and configuration, has an interface and a file for an address on ADD, and does what
    /// `script` says before.
    fn plugin(&self, name: &str, script: &str) {
        let (path, directory) = (self.path("plugins").join(name), self.directory.path().display());
        let text = format!(
            "#!/bin/sh\ncd {directory}\nconfig=$(cat)\necho \"{name} $CNI_COMMAND $config\" >>log\n{script}\n\
             [ $CNI_COMMAND != DEL ] || rm -f {name}.address\n[ $CNI_COMMAND = ADD ] || exit 0\n: >{name}.address\n\
             nsenter --net=$CNI_NETNS ip link add $CNI_IFNAME type bridge 2>/dev/null\n\
             echo '{{\"cniVersion\":\"1.1.0\",\"ips\":[{{\"address\":\"10.0.0.2/24\"}}]}}'\n"
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn configure(&self, name: &str, kinds: &[&str]) {
        let plugin = |kind| json!({ "type": kind, "capabilities": { "portMappings": true } });
        let plugins: Vec<_> = kinds.iter().map(plugin).collect();
        let list = json!({ "cniVersion": "1.1.0", "name": name, "plugins": plugins });
        fs::write(self.path("net.d/10.conflist"), list.to_string()).unwrap();
    }

    fn touch(&self, name: &str) {
        fs::write(self.path(name), "").unwrap();
    }

    /// How often a command was given since this was asked last.
    fn calls(&self, start: &str) -> Vec<String> {
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        log.lines().filter(|line| line.starts_with(start)).map(str::to_owned).collect()
    }

    async fn attach(&self) -> crate::Result<()> {
        self.network.attach(self.pod(), self.record()).await.map(drop)
    }

    async fn detach(&self) -> crate::Result<()> {
        self.network.detach(self.pod(), self.record()).await
    }

    fn nothing_is_left(&self) {
        let entries = fs::read_dir(self.directory.path()).unwrap().map(|entry| entry.unwrap().path());
        for path in entries
            .filter(|path| path.extension().is_some_and(|end| end == "address"))
            .chain([self.record(), self.netns()])
        {
            assert!(!path.exists(), "{}", path.display());
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = crate::netns::Netns::at(self.netns()).remove();
    }
}

fn path_of(host: &Host, name: &str) -> PathBuf {
    host.directory.path().join(name)
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Fails to DEL until there is a file `repaired`.
const FAILS_TO_DEL: &str =
    "[ $CNI_COMMAND != DEL ] || [ -e repaired ] || { echo '{\"code\":11,\"msg\":\"no server\"}'; exit 1; }";
/// Fails to ADD.
const FAILS_TO_ADD: &str = "[ $CNI_COMMAND != ADD ] || { echo '{\"code\":11,\"msg\":\"no weather\"}'; exit 1; }";

#[tokio::test]
async fn what_cannot_be_undone_stays_on_record_until_it_can() {
    let Some(host) = Host::new(60, 1000, 1.0) else { return };
    host.plugin("keeps", FAILS_TO_DEL);
    host.plugin("fails", FAILS_TO_ADD);
    host.configure("net", &["keeps", "fails"]);
    let error = host.attach().await.unwrap_err();
    let words = error.to_string();
    assert!(error.is_left() && words.contains("no weather") && words.contains("no server"), "{words}");
    for _ in 0..5 {
        let error = host.detach().await.unwrap_err();
        assert!(error.is_left() && error.to_string().contains("no server"), "{error}");
        assert!(host.record().exists() && host.netns().exists() && host.path("keeps.address").exists());
    }
    assert_eq!(host.calls("fails DEL").len(), 1, "what has undone its part is not asked again");
    host.touch("repaired");
    host.detach().await.unwrap();
    host.nothing_is_left();
    host.detach().await.expect("again is no error");
}

#[tokio::test]
async fn a_pod_goes_in_the_end_and_what_it_had_is_asked_for_again() {
    let Some(host) = Host::new(60, 0, 1.0) else { return };
    host.plugin("keeps", FAILS_TO_DEL);
    host.configure("net", &["keeps"]);
    host.attach().await.unwrap();
    for _ in 0..2 {
        assert!(host.detach().await.unwrap_err().is_left());
    }
    host.detach().await.unwrap();
    assert!(!host.record().exists() && !host.netns().exists());
    let left = host.path("left").join(format!("{}.json", host.id));
    assert!(left.exists() && host.path("keeps.address").exists());
    assert!(host.calls("keeps DEL").iter().all(|call| call.contains("10.0.0.2")), "with its result");
    let described = host.network.describe().await["Left"].to_string();
    assert!(described.contains("no server") && described.contains(&host.id), "{described}");
    assert_eq!(host.network.settle().await.unwrap(), 1);

    // GC does not hold on to it.
    host.network.collect_garbage(|| Ok(Vec::new())).await.unwrap();
    assert!(host.calls("keeps GC")[0].contains(r#""cni.dev/valid-attachments":[]"#), "{:?}", host.calls("keeps GC"));
    host.touch("repaired");
    until("settled", async || host.network.settle().await.unwrap() == 0).await;
    assert!(!left.exists());
    host.nothing_is_left();
}

#[tokio::test]
async fn stopping_a_pod_does_not_wait_for_a_plugin_that_hangs() {
    let Some(host) = Host::new(1000, 1000, 1.0) else { return };
    host.plugin("first", "");
    host.plugin("hangs", "[ $CNI_COMMAND != ADD ] || { touch hanging; sleep 1000; }");
    host.configure("net", &["first", "hangs"]);
    let attaching = tokio::spawn({
        let (network, pod, record) = (host.network.clone(), host.pod(), host.record());
        async move { network.attach(pod, record).await.map(drop) }
    });
    until("ADD", async || host.path("hanging").exists()).await;
    host.detach().await.unwrap();
    assert!(matches!(attaching.await.unwrap(), Err(Error::Cancelled)));
    host.nothing_is_left();

    // The same when whoever began goes away.
    fs::remove_file(host.path("hanging")).unwrap();
    let (network, pod, record) = (host.network.clone(), host.pod(), host.record());
    let attaching = tokio::spawn(async move { network.attach(pod, record).await.map(drop) });
    until("ADD", async || host.path("hanging").exists()).await;
    attaching.abort();
    until("undone", async || host.calls("first DEL").len() == 2 && !host.record().exists()).await;
    host.nothing_is_left();
}

#[tokio::test]
async fn a_record_that_is_lost_or_newer_loses_nothing() {
    let Some(host) = Host::new(60, 1000, 1.0) else { return };
    host.plugin("keeps", "");
    host.configure("net", &["keeps"]);
    host.attach().await.unwrap();
    let whole = fs::read(host.record()).unwrap();
    let newer = String::from_utf8(whole).unwrap().replacen("\"version\": 1", "\"version\": 2", 1);
    fs::write(host.record(), &newer).unwrap();
    let error = host.detach().await.unwrap_err();
    assert!(matches!(error, Error::OtherVersion { version: 2, .. }), "{error}");
    assert_eq!((fs::read_to_string(host.record()).unwrap(), host.calls("keeps DEL").len()), (newer, 0));
    assert!(host.netns().exists());

    fs::write(host.record(), "").unwrap();
    host.detach().await.unwrap();
    let calls = host.calls("keeps DEL");
    assert!(calls.len() == 1 && calls[0].contains("\"hostPort\":8080"), "{calls:?}");
    host.nothing_is_left();
}

#[tokio::test]
async fn a_healthy_pod_is_not_called_broken_and_a_broken_one_is() {
    let Some(host) = Host::new(60, 1000, 1.0) else { return };
    host.plugin("right", "[ $CNI_COMMAND != CHECK ] || [ ! -e damaged ] || { echo no route >&2; exit 1; }");
    host.plugin("wrong", "[ $CNI_COMMAND != CHECK ] || { echo no rule >&2; exit 1; }");
    host.configure("net", &["wrong", "right"]);
    host.attach().await.unwrap();
    let read = || serde_json::from_slice::<Value>(&fs::read(host.record()).unwrap()).unwrap();
    until("asked", async || read()["attachments"][0]["checks"] == json!({ "0": "wrong", "1": "passed" })).await;
    let check = async || host.network.check(host.id.clone(), host.record()).await.unwrap();
    // The thread that has asked is done with the pod a moment later.
    until("asked", async || host.network.shared.turns.try_take(&host.record(), cancel()).is_some()).await;
    assert_eq!(check().await, crate::Checked::default());
    host.touch("damaged");
    let checked = check().await;
    assert_eq!((checked.amiss.len(), checked.unsure.len()), (1, 0), "{checked:?}");
    assert!(checked.amiss[0].plugin == "right" && checked.amiss[0].what.contains("no route"), "{checked:?}");

    // As a daemon that ended before has left it: nobody knows.
    let mut unknown = read();
    unknown["attachments"][0].as_object_mut().unwrap().remove("checks");
    fs::write(host.record(), unknown.to_string()).unwrap();
    let checked = check().await;
    assert_eq!((checked.amiss.len(), checked.unsure.len()), (0, 2), "{checked:?}");
    fs::remove_file(host.path("damaged")).unwrap();
    assert_eq!(check().await.unsure.len(), 1);
    host.touch("damaged");
    assert_eq!(check().await.amiss.len(), 1, "what has found it in order is believed");

    // What can be seen without them.
    let deleted = std::process::Command::new("nsenter")
        .arg(format!("--net={}", host.netns().display()))
        .args(["ip", "link", "del", "eth0"])
        .status();
    assert!(deleted.unwrap().success());
    assert!(check().await.amiss.iter().any(|finding| finding.what.contains("eth0 is gone")));
    crate::netns::Netns::at(host.netns()).remove().unwrap();
    assert!(check().await.amiss.iter().any(|finding| finding.what.contains("namespace")));
    host.detach().await.unwrap();
}

fn cancel() -> Arc<crate::cancel::Cancel> {
    Arc::new(crate::cancel::Cancel::new().unwrap())
}

#[tokio::test]
async fn the_status_is_there_soon_and_no_plugin_is_asked_twice_at_once() {
    // A fiftieth of the time: 40 ms.
    let Some(host) = Host::new(3600, 1000, 0.02) else { return };
    host.plugin("slow", "[ $CNI_COMMAND != STATUS ] || until [ -e go ]; do sleep 0.01; done; [ ! -e bad ] || exit 1");
    host.configure("net", &["slow"]);
    let status = async || host.network.status().await;
    let ask = async || tokio::join!(status(), status(), status());
    for _ in 0..2 {
        let (one, two, three) = ask().await;
        for answer in [one, two, three] {
            assert!(matches!(*answer.unwrap_err(), Error::Asking(_)));
        }
    }
    assert_eq!(host.calls("slow STATUS").len(), 1);
    host.touch("go");
    until("ready", async || status().await.is_ok()).await;
    // It counts for a while; but not for another network, or when a program is gone.
    host.touch("bad");
    status().await.unwrap();
    assert_eq!(host.calls("slow STATUS").len(), 1);
    fs::remove_file(host.path("go")).unwrap();
    host.configure("other", &["slow"]);
    status().await.expect("the answer before, while the plugin is asked");
    host.touch("go");
    until("not ready", async || matches!(status().await, Err(error) if matches!(*error, Error::Plugin { .. }))).await;
    assert_eq!(host.calls("slow STATUS").len(), 2);
    fs::remove_file(host.path("plugins/slow")).unwrap();
    until("missing", async || matches!(status().await, Err(error) if matches!(*error, Error::PluginMissing { .. })))
        .await;
}

/// Debian's plugins, in a network namespace of the test's own: portmap 1.1.1 looks for the rules of an IPv4 address
/// among those of IPv6, too, and finds none.
#[test]
fn debian_s_portmap_is_not_believed_and_its_bridge_is() {
    let installed = PathBuf::from("/usr/lib/cni");
    let Some(mut host) = Host::new(60, 1000, 1.0).filter(|_| installed.join("portmap").exists()) else { return };
    let mut config = (*host.network.config).clone();
    config.plugin_directories = vec![installed.clone()];
    host.network.config = Arc::new(config);
    host.network.plugins =
        Arc::new(crate::cni::Plugins { directories: vec![installed], ..(*host.network.plugins).clone() });
    let ipam = json!({ "type": "host-local", "ranges": [[{ "subnet": "10.9.0.0/24" }]], "dataDir": host.path("ipam") });
    let list = json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [
        { "type": "bridge", "bridge": "b0", "isGateway": true, "ipam": ipam },
        { "type": "portmap", "capabilities": { "portMappings": true } },
    ] });
    let list = crate::cni::NetworkList::parse(Path::new("x"), list.to_string().as_bytes()).unwrap();
    let run = |program: &str, args: &[&str]| {
        let done = std::process::Command::new(program).args(args).output().unwrap();
        assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: the thread shares nothing with others that the network namespace holds, and ends with this.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
            let (network, netns) = (&host.network, crate::netns::Netns::at(host.netns()));
            let mut record = crate::record::Record::new(host.netns());
            let capabilities = host.pod().capabilities().unwrap();
            let (args, id) = (host.pod().args().unwrap(), host.id.clone());
            let mut attachment = crate::cni::Attachment::new(list, "eth0".into(), id, args, capabilities);
            netns.create().unwrap();
            let name = netns.path().to_str().unwrap().to_owned();
            crate::cni::Chain::new(&network.plugins).add(&mut attachment, &name).unwrap();
            record.attachments.push(attachment);
            record.write(&host.record(), crate::record::Durable::Yes).unwrap();

            network.check_now(&host.id, &host.record(), true).unwrap();
            let checked = network.check_now(&host.id, &host.record(), false).unwrap();
            assert_eq!(checked, crate::Checked::default());
            run("nsenter", &[&format!("--net={name}"), "ip", "addr", "flush", "dev", "eth0"]);
            let checked = network.check_now(&host.id, &host.record(), false).unwrap();
            assert!(checked.amiss.len() == 1 && checked.amiss[0].plugin == "bridge", "{checked:?}");
            network.detach_by(&host.pod(), &host.record()).unwrap();
            host.nothing_is_left();
        });
    });
}
