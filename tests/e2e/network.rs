//! Pods and their network, as a cluster would use it.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nacelle_proto::runtime::v1 as cri;
use serde_json::{Value, json};
use tonic::Code;

use nacelle_tests::client::{Client, limit, pod_config};
use nacelle_tests::daemon::Daemon;

/// The gateway of the node's network, see hack/node.
const GATEWAY: &str = "10.244.0.1";
/// Bytes of a transfer.
const TRANSFER: usize = 4 << 20;

/// A pod with a web server on port 8080 that serves its /tmp.
async fn server(client: &Client, config: cri::PodSandboxConfig) -> (String, String) {
    let pod = client.run_pod_as(config).await.unwrap();
    let container = client.create(&pod, "busybox", &["httpd", "-f", "-p", "8080", "-h", "/tmp"]).await.unwrap();
    client.start(&container).await.unwrap();
    (pod, container)
}

/// The addresses of a pod, as the kubelet asks for them.
async fn addresses(client: &Client, pod: &str) -> Vec<IpAddr> {
    let network = client.pod_status(pod).await.unwrap().network.unwrap();
    let ips = [network.ip].into_iter().chain(network.additional_ips.into_iter().map(|ip| ip.ip));
    ips.filter(|ip| !ip.is_empty()).map(|ip| ip.parse().unwrap()).collect()
}

/// Sends `data` to whoever connects first; takes what the second sends. Returns the ports.
fn exchange(address: IpAddr, data: Vec<u8>) -> (u16, u16, thread::JoinHandle<Vec<u8>>) {
    let listen = || TcpListener::bind((address, 0)).unwrap();
    let (give, take) = (listen(), listen());
    let ports = (give.local_addr().unwrap().port(), take.local_addr().unwrap().port());
    let server = thread::spawn(move || {
        give.accept().unwrap().0.write_all(&data).unwrap();
        let mut received = Vec::new();
        take.accept().unwrap().0.read_to_end(&mut received).unwrap();
        received
    });
    (ports.0, ports.1, server)
}

/// What a web server answers, or none if nobody listens.
fn get(address: SocketAddr, path: &str) -> Option<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, limit(5)).ok()?;
    stream.set_read_timeout(Some(limit(20))).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    Some(answer.split_off(body + 4))
}

/// The same, patiently: a server needs a moment to listen.
fn get_soon(address: SocketAddr, path: &str) -> Vec<u8> {
    let deadline = std::time::Instant::now() + limit(20);
    loop {
        if let Some(body) = get(address, path) {
            return body;
        }
        assert!(std::time::Instant::now() < deadline, "{address} does not answer");
        thread::sleep(Duration::from_millis(20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_reach_the_host_and_each_other_and_the_host_reaches_them() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let mut config = pod_config(logs.path());
    config.hostname = "web".into();
    let mapping = |host_port, host_ip: &str| cri::PortMapping {
        container_port: 8080,
        host_port,
        host_ip: host_ip.into(),
        ..Default::default()
    };
    config.port_mappings = vec![mapping(31_080, ""), mapping(31_081, "127.0.0.1")];
    config.dns_config = Some(cri::DnsConfig { servers: vec!["10.96.0.10".into()], ..Default::default() });
    let ((pod, web), (other, peer)) = tokio::join!(server(&client, config), server(&client, pod_config(logs.path())));
    let ip = addresses(&client, &pod).await[0];
    let peer_ip = addresses(&client, &other).await[0];
    assert!(ip != peer_ip && ip.to_string().starts_with("10.244."), "{ip} {peer_ip}");

    let seen = client.shell(&web, "ip -4 addr show dev eth0; ip route; cat /etc/hosts /etc/resolv.conf").await;
    for word in [&format!("{ip}/16"), &format!("default via {GATEWAY}"), &format!("{ip}\tweb"), "nameserver 10.96.0.10"]
    {
        assert!(seen.contains(word), "no {word:?} in {seen}");
    }
    client.shell(&web, &format!("ping -c 1 -W 20 {GATEWAY} && ping -c 1 -W 20 {peer_ip}")).await;

    // From the host, back to it, and on to the other pod: what arrives is what was sent.
    let data: Vec<u8> = (0..TRANSFER as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (give, take, host) = exchange(GATEWAY.parse().unwrap(), data.clone());
    let script = format!("nc {GATEWAY} {give} >/tmp/f && nc {GATEWAY} {take} </tmp/f && md5sum </tmp/f");
    let sum = client.shell(&web, &script).await;
    assert!(host.join().unwrap() == data, "what came back differs");
    let script = format!("wget -q -O /tmp/g http://{ip}:8080/f && md5sum </tmp/g");
    assert_eq!(client.shell(&peer, &script).await, sum);
    client.shell(&peer, "mv /tmp/g /tmp/h").await;
    let script = format!("wget -q -O - http://{peer_ip}:8080/h | md5sum");
    assert_eq!(client.shell(&web, &script).await, sum);

    // Host ports, on every address and on loopback alone.
    for address in
        [format!("{ip}:8080"), "127.0.0.1:31080".into(), format!("{GATEWAY}:31080"), "127.0.0.1:31081".into()]
    {
        assert!(get_soon(address.parse().unwrap(), "/f") == data, "{address}");
    }
    assert!(get(format!("{GATEWAY}:31081").parse().unwrap(), "/f").is_none(), "bound to loopback");

    client.remove_pod(&pod).await.unwrap();
    client.remove_pod(&other).await.unwrap();
    assert!(get("127.0.0.1:31080".parse().unwrap(), "/f").is_none(), "the host port is free again");
    let netns: Vec<_> = fs::read_dir("/run/netns").unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(!netns.iter().any(|name| name.to_string_lossy().contains(&pod)), "{netns:?}");
    assert!(!Path::new("/var/lib/cni/networks/node").join(ip.to_string()).exists(), "the address is free again");
}

/// A network of a daemon's own.
struct Network<'a> {
    daemon: &'a Daemon,
    /// Its bridge, named by who asks.
    bridge: &'static str,
    /// The third byte of its addresses, 10.245.x.0/24.
    number: u8,
}

impl Network<'_> {
    /// Writes its configuration, with further plugins after the bridge's.
    fn write(&self, file: &str, ranges: Value, more: &[Value]) {
        let mut plugins = vec![json!({
            "type": "bridge", "bridge": self.bridge, "isGateway": true, "ipMasq": true,
            "ipam": { "type": "host-local", "ranges": ranges, "dataDir": self.daemon.path().join("ipam") },
        })];
        plugins.extend_from_slice(more);
        let list = json!({ "cniVersion": "1.0.0", "name": self.bridge, "plugins": plugins });
        fs::write(self.daemon.path().join("cni").join(file), list.to_string()).unwrap();
    }

    fn range(&self) -> Value {
        json!([[{ "subnet": format!("10.245.{}.0/24", self.number) }]])
    }

    /// Addresses that are given out.
    fn taken(&self) -> Vec<String> {
        let directory = self.daemon.path().join("ipam").join(self.bridge);
        let names = fs::read_dir(directory).into_iter().flatten().flatten();
        let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.parse::<IpAddr>().is_ok()).collect()
    }
}

/// Puts a plugin into a daemon's directory, with a copy of the bridge's result as its own.
fn plugin(daemon: &Daemon, name: &str, on_add: &str) {
    script(daemon, name, &format!("[ $CNI_COMMAND = ADD ] || exit 0\n{on_add}"));
}

/// Puts a plugin into a daemon's directory, which it starts in.
fn script(daemon: &Daemon, name: &str, commands: &str) {
    let path = daemon.path().join("plugins").join(name);
    fs::write(&path, format!("#!/bin/sh\ncd {}\nconfig=$(cat)\n{commands}\n", daemon.path().display())).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A plugin that fails to ADD while there is a file `sick`, fails to DEL while there is a file `stuck`, and has a
/// file `held` from the one to the other.
fn moody(daemon: &Daemon) -> Value {
    let commands = r#"
fail() { echo "{\"code\":11,\"msg\":\"$1\"}"; exit 1; }
case $CNI_COMMAND in
ADD) : >held; [ ! -e sick ] || fail "no weather" ;;
DEL) [ ! -e stuck ] || fail "no server"; rm -f held ;;
esac"#;
    script(daemon, "moody", commands);
    json!({ "type": "moody" })
}

/// Waits for something that happens by itself.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + limit(60);
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn network_condition(client: &Client) -> cri::RuntimeCondition {
    let status = client.runtime.clone().status(cri::StatusRequest { verbose: true }).await.unwrap().into_inner();
    assert!(status.info["cniconfig"].contains("PluginConfDir"));
    let mut conditions = status.status.unwrap().conditions.into_iter();
    conditions.find(|condition| condition.r#type == "NetworkReady").unwrap()
}

#[tokio::test]
async fn what_fails_is_undone_and_a_configuration_counts_at_once() {
    let mut daemon = Daemon::networked("").unwrap();
    plugin(&daemon, "broken", r#"echo '{"code":101,"msg":"no such weather","details":"try the sea"}'; exit 1"#);
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();

    let condition = network_condition(&client).await;
    assert!(!condition.status && condition.reason == "NetworkPluginNotReady", "{condition:?}");
    let error = client.run_pod(logs.path()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    for said in [condition.message.as_str(), error.message()] {
        assert!(said.contains("install a network plugin"), "{said}");
    }
    assert_eq!(daemon.leftovers(), [""; 0]);

    let network = Network { daemon: &daemon, bridge: "nt-broken", number: 1 };
    network.write("10.conflist", network.range(), &[json!({ "type": "absent" })]);
    let condition = network_condition(&client).await;
    assert!(!condition.status && condition.message.contains("\"absent\""), "{condition:?}");

    network.write("10.conflist", network.range(), &[json!({ "type": "broken" })]);
    let condition = network_condition(&client).await;
    assert!(condition.status, "{condition:?}");
    let error = client.run_pod(logs.path()).await.unwrap_err();
    for word in ["broken", "no such weather", "try the sea", "101"] {
        assert!(error.message().contains(word), "{}", error.message());
    }
    assert_eq!((daemon.leftovers(), network.taken()), (vec![], vec![]));
}

/// What a plugin was last told of which pods there are.
fn told(log: &Path) -> Vec<Value> {
    let deadline = std::time::Instant::now() + limit(60);
    loop {
        // It may be writing still.
        if let Some(told) = fs::read(log).ok().and_then(|told| serde_json::from_slice::<Value>(&told).ok()) {
            fs::remove_file(log).unwrap();
            return told["cni.dev/valid-attachments"].as_array().unwrap().clone();
        }
        assert!(std::time::Instant::now() < deadline, "nothing told");
        thread::sleep(Duration::from_millis(20));
    }
}

#[tokio::test]
async fn plugins_are_told_at_the_start_which_pods_there_are() {
    let mut daemon = Daemon::networked("").unwrap();
    let log = daemon.path().join("told");
    let path = daemon.path().join("plugins/keeper");
    let script = format!("#!/bin/sh\nconfig=$(cat)\n[ $CNI_COMMAND != GC ] || echo \"$config\" > {}\n", log.display());
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let network = Network { daemon: &daemon, bridge: "nt-gc", number: 5 };
    network.write("10.conflist", network.range(), &[]);
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    assert!(!log.exists());
    // From here on of a version that has the command.
    let list = json!({ "cniVersion": "1.1.0", "name": "nt-gc", "plugins": [{ "type": "keeper" }] });
    fs::write(daemon.path().join("cni/10.conflist"), list.to_string()).unwrap();
    daemon.kill();
    daemon.restart().await.unwrap();
    assert!(told(&log).contains(&json!({ "containerID": pod, "ifname": "eth0" })));
    let client = daemon.client().await;
    client.remove_pod(&pod).await.unwrap();
    daemon.terminate().unwrap();
    daemon.restart().await.unwrap();
    assert_eq!(told(&log), [Value::Null; 0]);
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_pod_has_both_families_and_several_interfaces() {
    let mut daemon = Daemon::networked("network.networks = 2").unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let first = Network { daemon: &daemon, bridge: "nt-dual", number: 2 };
    let six = json!([{ "subnet": "fd00:245:2::/64" }]);
    first.write("10.conflist", json!([first.range()[0], six]), &[json!({
        "type": "tuning", "mtu": 1400,
        "sysctl": { "net.core.somaxconn": "500", "net.ipv4.conf.eth0.rp_filter": "2", "net.ipv4.tcp_fin_timeout": "7" }
    })]);
    let second = Network { daemon: &daemon, bridge: "nt-second", number: 3 };
    second.write("20.conflist", second.range(), &[]);
    let logs = tempfile::tempdir().unwrap();
    let mut config = pod_config(logs.path());
    let own = HashMap::from([("net.ipv4.tcp_fin_timeout".to_owned(), "9".to_owned())]);
    config.linux.get_or_insert_default().sysctls = own;
    let (pod, container) = server(&client, config).await;
    let set = "cd /proc/sys/net; cat core/somaxconn ipv4/conf/eth0/rp_filter ipv4/tcp_fin_timeout";
    assert_eq!(client.shell(&container, set).await, "500\n2\n9", "as the plugin has set them, but for the pod's own");
    let ips: Vec<_> = addresses(&client, &pod).await.iter().map(ToString::to_string).collect();
    assert!(
        matches!(&ips[..], [four, six] if four.starts_with("10.245.2.") && six.starts_with("fd00:245:2::")),
        "{ips:?}"
    );
    let seen = client.shell(&container, "ip addr; cat /etc/hosts; ls /sys/class/net | xargs echo has").await;
    assert!(seen.lines().any(|line| line == "has eth0 eth1 lo"), "{seen}");
    for word in [ips[0].as_str(), ips[1].as_str(), "inet 10.245.3.", "mtu 1400", "inet6 ::1"] {
        assert!(seen.contains(word), "no {word:?} in {seen}");
    }
    assert!(!seen.contains("tentative"), "{seen}");
    client.shell(&container, "ping -c 1 -W 20 10.245.2.1 && ping -c 1 -W 20 10.245.3.1").await;
    client.shell(&container, "ping6 -c 1 -W 20 fd00:245:2::1 || ping -6 -c 1 -W 20 fd00:245:2::1").await;
    client.remove_pod(&pod).await.unwrap();
    assert_eq!((daemon.leftovers(), first.taken(), second.taken()), (vec![], vec![], vec![]));
}

#[tokio::test]
async fn a_daemon_may_be_killed_while_a_plugin_works_and_while_pods_talk() {
    let mut daemon = Daemon::networked("").unwrap();
    let marker = daemon.path().join("working");
    plugin(&daemon, "slow", &format!("touch {}; sleep 1000", marker.display()));
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    Network { daemon: &daemon, bridge: "nt-killed", number: 4 }.write(
        "10.conflist",
        json!([[{ "subnet": "10.245.4.0/24" }]]),
        &[],
    );
    let (pod, container) = server(&client, pod_config(logs.path())).await;
    client.shell(&container, "echo still here >/tmp/f").await;
    let address = SocketAddr::new(addresses(&client, &pod).await[0], 8080);

    let network = Network { daemon: &daemon, bridge: "nt-killed", number: 4 };
    network.write("10.conflist", network.range(), &[json!({ "type": "slow" })]);
    let config = pod_config(logs.path());
    let starting = tokio::spawn(async move { client.run_pod_as(config).await });
    let deadline = tokio::time::Instant::now() + limit(60);
    while !marker.exists() {
        assert!(tokio::time::Instant::now() < deadline && !starting.is_finished(), "the plugin was not run");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    daemon.kill();
    assert!(starting.await.unwrap().is_err());
    // Without a daemon, too.
    assert_eq!(get_soon(address, "/f"), b"still here\n");

    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    assert_eq!(client.pods().await.unwrap().iter().map(|pod| &pod.id).collect::<Vec<_>>(), [&pod]);
    assert_eq!(addresses(&client, &pod).await, [address.ip()]);
    assert_eq!(get_soon(address, "/f"), b"still here\n");
    let deadline = tokio::time::Instant::now() + limit(60);
    while daemon.netns().len() != 1 {
        assert!(tokio::time::Instant::now() < deadline, "what was half made is there: {:?}", daemon.netns());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let network = Network { daemon: &daemon, bridge: "nt-killed", number: 4 };
    assert_eq!(network.taken(), [address.ip().to_string()]);

    // What a pod joined is what it leaves, whatever the configuration says by then.
    fs::remove_file(daemon.path().join("cni/10.conflist")).unwrap();
    client.remove_pod(&pod).await.unwrap();
    assert_eq!((daemon.leftovers(), network.taken()), (vec![], vec![]));
}

#[tokio::test]
async fn a_plugin_that_does_not_undo_keeps_nobody_from_it_and_is_asked_again() {
    let mut daemon = Daemon::networked("").unwrap();
    let network = Network { daemon: &daemon, bridge: "nt-moody", number: 6 };
    network.write("10.conflist", network.range(), &[moody(&daemon), json!({ "type": "tuning" })]);
    let file = |name: &str| daemon.path().join(name);
    let (sick, stuck, held) = (file("sick"), file("stuck"), file("held"));
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let network = Network { daemon: &daemon, bridge: "nt-moody", number: 6 };
    let pod = client.run_pod(logs.path()).await.unwrap();
    assert!(held.exists() && network.taken().len() == 1);
    fs::write(&stuck, "").unwrap();
    for _ in 0..2 {
        let error = client.remove_pod(&pod).await.unwrap_err();
        for word in ["\"moody\"", "\"nt-moody\"", "no server"] {
            assert!(error.message().contains(word), "no {word:?} in {}", error.message());
        }
        assert_eq!(network.taken(), [""; 0], "the bridge's turn comes after it, and its address is free");
        assert_eq!(client.pods().await.unwrap().len(), 1);
    }
    fs::remove_file(&stuck).unwrap();
    client.remove_pod(&pod).await.unwrap();
    assert_eq!((daemon.leftovers(), held.exists()), (vec![], false));

    // Neither joined nor left.
    fs::write(&sick, "").unwrap();
    fs::write(&stuck, "").unwrap();
    let error = client.run_pod(logs.path()).await.unwrap_err();
    for word in ["no weather", "no server"] {
        assert!(error.message().contains(word), "no {word:?} in {}", error.message());
    }
    assert!(held.exists());
    daemon.kill();
    daemon.restart().await.unwrap();
    assert!(held.exists(), "it is not forgotten");
    fs::remove_file(&stuck).unwrap();
    let client = daemon.client().await;
    for pod in client.pods().await.unwrap() {
        client.remove_pod(&pod.id).await.unwrap();
    }
    daemon.terminate().unwrap();
    daemon.restart().await.unwrap();
    until("what was left is taken back", || !held.exists() && daemon.there().is_empty()).await;
}

#[tokio::test]
async fn a_pod_goes_in_the_end_without_a_plugin_that_never_undoes() {
    let mut daemon = Daemon::networked("network.del_seconds = 1").unwrap();
    let network = Network { daemon: &daemon, bridge: "nt-stuck", number: 7 };
    network.write("10.conflist", network.range(), &[moody(&daemon)]);
    let (stuck, held) = (daemon.path().join("stuck"), daemon.path().join("held"));
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    fs::write(&stuck, "").unwrap();
    let deadline = tokio::time::Instant::now() + limit(60);
    let mut refused = 0;
    while let Err(error) = client.remove_pod(&pod).await {
        assert!(error.message().contains("no server"), "{}", error.message());
        assert!(tokio::time::Instant::now() < deadline, "it stays for ever");
        refused += 1;
    }
    assert!(refused >= 2, "it is tried again first");
    assert_eq!((daemon.leftovers(), client.pods().await.unwrap().len()), (vec![], 0));
    let record = daemon.path().join(format!("root/networks/{pod}.json"));
    assert!(held.exists() && record.exists() && daemon.log().contains("no server"));
    daemon.terminate().unwrap();
    fs::remove_file(&stuck).unwrap();
    daemon.restart().await.unwrap();
    until("it is asked again", || !held.exists() && !record.exists()).await;
}

#[tokio::test]
async fn a_healthy_pod_is_not_called_broken_after_a_restart_and_a_damaged_one_is() {
    let mut daemon = Daemon::networked("").unwrap();
    // The last one to be asked.
    script(&daemon, "marker", "[ $CNI_COMMAND != CHECK ] || echo asked >>marker");
    let network = Network { daemon: &daemon, bridge: "nt-check", number: 8 };
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    network.write("10.conflist", network.range(), &[portmap, json!({ "type": "marker" })]);
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let logs = tempfile::tempdir().unwrap();
    let mut config = pod_config(logs.path());
    config.port_mappings = vec![cri::PortMapping { container_port: 80, host_port: 31_088, ..Default::default() }];
    let pod = client.run_pod_as(config).await.unwrap();
    let record = daemon.path().join(format!("root/pods/{pod}/network.json"));
    let checks = || {
        let record: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
        record["attachments"][0]["checks"].clone()
    };
    until("the plugins are asked for the first time", || !checks().is_null()).await;
    // Debian's portmap finds something amiss in whatever it has just made.
    assert_eq!(checks(), json!({ "0": "passed", "1": "wrong", "2": "passed" }));
    let marker = daemon.path().join("marker");
    let asked = || fs::read_to_string(&marker).unwrap_or_default().lines().count();
    assert_eq!(asked(), 1);
    daemon.kill();
    daemon.restart().await.unwrap();
    until("they are asked again", || asked() == 2).await;
    daemon.terminate().unwrap();

    let netns = format!("--net={}", daemon.netns()[0].display());
    nacelle_tests::host::run("nsenter", &[&netns, "ip", "addr", "flush", "dev", "eth0"]);
    daemon.restart().await.unwrap();
    until("they are asked once more", || daemon.log().contains("not as it was made")).await;
    let log = daemon.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains("as it was made")).collect();
    assert!(told.len() == 1 && told[0].contains("\"bridge\"") && told[0].contains(&pod), "{told:?}");
    daemon.client().await.remove_pod(&pod).await.unwrap();
    assert_eq!(daemon.leftovers(), [""; 0]);
}

#[tokio::test]
async fn the_status_is_told_though_a_plugin_hangs() {
    let mut daemon = Daemon::networked("").unwrap();
    script(&daemon, "hangs", "echo asked >>asked; [ $CNI_COMMAND != STATUS ] || sleep 100000");
    let list = json!({ "cniVersion": "1.1.0", "name": "nt-hangs", "plugins": [{ "type": "hangs" }] });
    fs::write(daemon.path().join("cni/10.conflist"), list.to_string()).unwrap();
    daemon.restart().await.unwrap();
    let client = daemon.client().await;
    let asked = || fs::read_to_string(daemon.path().join("asked")).unwrap_or_default().lines().count();
    // GC, at the start.
    until("told of no pods", || asked() == 1).await;
    for _ in 0..2 {
        let told = tokio::time::timeout(limit(10), network_condition(&client)).await.expect("no answer");
        assert!(!told.status && told.message.contains("takes long"), "{told:?}");
    }
    assert_eq!(asked(), 2, "it is asked once");
}
