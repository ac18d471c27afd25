//! A sandbox's network: attached while its guest boots, handed to the guest, detached when
//! it has ended.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::fs::File;

use nacelle_network::{Attached, GuestInterface, Interface, Pod, Scope};
use nacelle_proto::agent::v1 as api;

use super::Sandbox;
use crate::model::{Dns, SandboxConfig};
use crate::vm::Vm;
use crate::{Error, Result};

/// Name resolution of the host, for pods that are given none.
const HOST_RESOLV_CONF: &str = "/etc/resolv.conf";

impl Sandbox {
    fn network_pod(&self, config: &SandboxConfig) -> Pod {
        network_pod(&self.id, config)
    }

    /// Attaches the pod to its networks. When it fails, the guest is not waited for.
    pub(super) async fn attach_network(&self, config: &SandboxConfig, vm: &Vm) -> Result<Option<Attached>> {
        let attached = self.network.attach(self.network_pod(config), self.paths.network()).await;
        if attached.is_err() {
            vm.kill().await?;
        }
        Ok(attached?)
    }

    /// Puts the interfaces on the guest's bus. Returns what the agent has to know of them.
    pub(super) async fn add_interfaces(
        &self,
        vm: &Vm,
        attached: Option<&Attached>,
    ) -> Result<Vec<api::NetworkInterface>> {
        let mut added = Vec::new();
        for GuestInterface { interface, tap } in attached.into_iter().flat_map(|attached| &attached.interfaces) {
            let tap = tap.try_clone().map_err(Error::io("hand over the tap of", &interface.name))?;
            let owner = format!("net/{}", interface.name);
            let slot = vm.add_net(owner, interface.mac.0, mtu(interface)?, File::from(tap)).await?;
            added.push(message(slot, interface));
        }
        Ok(added)
    }

    /// Takes the pod off its networks. Idempotent.
    pub(super) async fn detach_network(&self) -> Result<()> {
        let pod = self.network_pod(&self.record().config);
        self.network.detach(pod, self.paths.network()).await?;
        self.change(|record| record.ips.clear());
        Ok(())
    }

    /// Looks whether the network of a pod that was taken over is still as it was made, and says so if
    /// it is not.
    pub(super) fn check_network(&self) {
        let (network, record, id) = (self.network.clone(), self.paths.network(), self.id.clone());
        tokio::spawn(async move {
            match network.check(id.clone(), record).await {
                Ok(checked) => {
                    for finding in checked.amiss {
                        tracing::warn!(sandbox = id, "the pod's network is not as it was made: {finding}");
                    }
                    for finding in checked.unsure {
                        tracing::info!(
                            sandbox = id,
                            "the pod's network may be as it was made, or not: {finding}; whether that was so from the beginning was not looked at"
                        );
                    }
                }
                Err(error) => tracing::warn!(sandbox = id, %error, "the pod's network is not looked at"),
            }
        });
    }
}

/// A pod as far as its network is concerned.
pub fn network_pod(id: &str, config: &SandboxConfig) -> Pod {
    Pod {
        id: id.to_owned(),
        name: config.name.clone(),
        namespace: config.namespace.clone(),
        uid: config.uid.clone(),
        annotations: config.annotations.clone(),
        ports: config.ports.clone(),
        dns: nacelle_network::Dns {
            servers: config.dns.servers.clone(),
            searches: config.dns.searches.clone(),
            options: config.dns.options.clone(),
        },
        cgroup_parent: config.cgroup_parent.clone(),
    }
}

/// The pod's kernel parameters: those that its plugins have set in its namespace on the host, unless it sets them itself.
pub fn sysctls(config: &SandboxConfig, attached: Option<&Attached>) -> HashMap<String, String> {
    // As with sysctl(8), the first separator decides which one separates.
    let file = |name: &String| match name.find(['.', '/']).is_some_and(|at| name[at..].starts_with('.')) {
        true => name.replace('.', "/"),
        false => name.clone(),
    };
    let own: HashSet<_> = config.sysctls.keys().map(file).collect();
    let set = attached.into_iter().flat_map(|attached| &attached.parameters).filter(|(name, _)| !own.contains(*name));
    set.chain(&config.sysctls).map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn mtu(interface: &Interface) -> Result<u16> {
    u16::try_from(interface.mtu).map_err(|_| {
        let (name, mtu) = (&interface.name, interface.mtu);
        Error::Invalid(format!("interface {name} has an MTU of {mtu}: configure the network plugin for at most 65535"))
    })
}

/// An interface in the agent's words.
fn message(slot: u8, interface: &Interface) -> api::NetworkInterface {
    let address = |address: &nacelle_network::Address| api::IpAddress {
        ip: address.ip.to_string(),
        prefix: address.prefix.into(),
    };
    let routes = interface.routes.iter().map(|route| api::IpRoute {
        destination: Some(address(&route.destination)),
        gateway: route.gateway.map(|ip| ip.to_string()).unwrap_or_default(),
        source: route.source.map(|ip| ip.to_string()).unwrap_or_default(),
        link_scope: route.scope == Scope::Link,
        onlink: route.onlink,
        metric: route.metric,
        mtu: route.mtu,
    });
    let neighbours = interface
        .neighbours
        .iter()
        .map(|neighbour| api::IpNeighbour { ip: neighbour.ip.to_string(), mac: neighbour.mac.to_string() });
    api::NetworkInterface {
        device: Some(api::Device { slot: slot.into() }),
        name: interface.name.clone(),
        mtu: interface.mtu,
        no_arp: !interface.arp,
        addresses: interface.addresses.iter().map(address).collect(),
        routes: routes.collect(),
        neighbours: neighbours.collect(),
    }
}

/// `/etc/resolv.conf`: as the pod asks, or as its networks say, or the host's; empty for a
/// pod that asks for none and has no network.
pub(super) fn resolv_conf(asked: &Dns, attached: Option<&Attached>) -> String {
    let text = asked.resolv_conf();
    let Some(attached) = attached.filter(|_| text.is_empty()) else { return text };
    let dns = &attached.dns;
    let text = Dns { servers: dns.servers.clone(), searches: dns.searches.clone(), options: dns.options.clone() }
        .resolv_conf();
    if text.is_empty() { std::fs::read_to_string(HOST_RESOLV_CONF).unwrap_or_default() } else { text }
}

/// `/etc/hosts` with the pod's own name; empty for one without a network.
pub(super) fn hosts(config: &SandboxConfig, attached: Option<&Attached>) -> String {
    let ips = attached.map(|attached| attached.ips.as_slice()).unwrap_or_default();
    if ips.is_empty() {
        return String::new();
    }
    let mut text = "127.0.0.1\tlocalhost\n\
        ::1\tlocalhost ip6-localhost ip6-loopback\n\
        fe00::\tip6-localnet\n\
        ff00::\tip6-mcastprefix\n\
        ff02::1\tip6-allnodes\n\
        ff02::2\tip6-allrouters\n"
        .to_owned();
    let name = config.host_name();
    for ip in ips {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{ip}\t{name}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_finds_itself_by_its_name_at_each_of_its_addresses() {
        let config = SandboxConfig { name: "web-0".into(), hostname: "web".into(), ..SandboxConfig::default() };
        let attached =
            Attached { ips: vec![[10, 1, 0, 5].into(), [0xfd00, 0, 0, 0, 0, 0, 0, 5].into()], ..Attached::default() };
        let text = hosts(&config, Some(&attached));
        assert!(text.starts_with("127.0.0.1\tlocalhost\n::1\t"), "{text}");
        assert!(text.ends_with("10.1.0.5\tweb\nfd00::5\tweb\n"), "{text}");
        assert_eq!(hosts(&config, None), "");
    }

    #[test]
    fn parameters_that_plugins_have_set_are_the_pod_s_unless_it_sets_them_itself() {
        let list = |list: &[(&str, &str)]| list.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let config = SandboxConfig {
            sysctls: list(&[("net.core.somaxconn", "1"), ("net/ipv4/conf/eth0.5/rp_filter", "1")]),
            ..SandboxConfig::default()
        };
        let parameters = list(&[
            ("net/core/somaxconn", "500"),
            ("net/ipv4/conf/eth0.5/rp_filter", "2"),
            ("net/ipv4/tcp_fin_timeout", "7"),
        ]);
        let attached = Attached { parameters, ..Attached::default() };
        let mut all: Vec<_> = sysctls(&config, Some(&attached)).into_iter().collect();
        all.sort();
        let expected =
            [("net.core.somaxconn", "1"), ("net/ipv4/conf/eth0.5/rp_filter", "1"), ("net/ipv4/tcp_fin_timeout", "7")];
        assert_eq!(all, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn what_the_pod_asks_for_comes_before_what_its_network_says() {
        let dns = |server: &str| Dns { servers: vec![server.into()], ..Dns::default() };
        let of_network = nacelle_network::Dns { servers: vec!["10.0.0.2".into()], ..nacelle_network::Dns::default() };
        let attached = Attached { dns: of_network, ..Attached::default() };
        assert_eq!(resolv_conf(&dns("10.0.0.1"), Some(&attached)), "nameserver 10.0.0.1\n");
        assert_eq!(resolv_conf(&Dns::default(), Some(&attached)), "nameserver 10.0.0.2\n");
        assert_eq!(resolv_conf(&Dns::default(), None), "");
    }
}
