//! The pod's network interfaces: what plugins made on the host, made again in the guest.

use std::fs;
use std::net::IpAddr;

use nacelle_netlink::{Address, Interface, Link, Mac, Neighbour, Netlink, Route, Scope};
use nacelle_proto::agent::v1 as api;

use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::namespaces::PodNamespaces;

/// The longest name of an interface in bytes.
const NAME_LIMIT: usize = 15;

impl Agent {
    /// Finds the interfaces' devices and configures them. Doing so again changes nothing.
    /// Blocks, up to seconds.
    pub fn configure_network(&self, interfaces: &[api::NetworkInterface]) -> Result<()> {
        let wanted = interfaces.iter().map(parse).collect::<Result<Vec<_>>>()?;
        if wanted.is_empty() {
            return Ok(());
        }
        match self.sandbox.namespaces() {
            None => {
                let mut netlink = Netlink::open()?;
                for (slot, interface) in &wanted {
                    let link = self.find_interface(&mut netlink, *slot)?;
                    configure(&mut netlink, &link, interface)?;
                }
                Ok(())
            }
            Some(namespaces) => {
                self.move_interfaces(namespaces, &wanted)?;
                let moved = namespaces.interfaces().clone();
                namespaces.inside(|| configure_moved(&moved, &wanted))?
            }
        }
    }

    /// The interface in `slot`, which is in the guest's own network namespace.
    fn find_interface(&self, netlink: &mut Netlink, slot: u32) -> Result<Link> {
        let name = self.bus.network_interface(slot)?;
        let found = netlink.links()?.into_iter().find(|link| link.name == name);
        found.filter(|link| link.mac.is_some()).ok_or_else(|| gone(slot))
    }

    /// Moves the interfaces into the pod's network namespace that are not there yet.
    fn move_interfaces(&self, namespaces: &PodNamespaces, wanted: &[(u32, Interface)]) -> Result<()> {
        let mut moved = namespaces.interfaces();
        let mut netlink = Netlink::open()?;
        for (slot, _) in wanted {
            if moved.iter().any(|(there, _)| there == slot) {
                continue;
            }
            let link = self.find_interface(&mut netlink, *slot)?;
            netlink.move_to(&link, namespaces.network())?;
            moved.push((*slot, link.mac.unwrap_or_default()));
        }
        Ok(())
    }
}

/// In the pod's network namespace.
fn configure_moved(moved: &[(u32, Mac)], wanted: &[(u32, Interface)]) -> Result<()> {
    let mut netlink = Netlink::open()?;
    for (slot, interface) in wanted {
        let mac = moved.iter().find(|(there, _)| there == slot).map(|(_, mac)| *mac);
        let link = netlink.links()?.into_iter().find(|link| link.mac.is_some() && link.mac == mac);
        configure(&mut netlink, &link.ok_or_else(|| gone(*slot))?, interface)?;
    }
    Ok(())
}

/// Makes an interface of the calling thread's network namespace what it is to be.
fn configure(netlink: &mut Netlink, link: &Link, wanted: &Interface) -> Result<()> {
    // Whoever gave the addresses out knows that nobody else has them.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{}/accept_dad", link.name), "0");
    let wanted = Interface { mac: link.mac.unwrap_or_default(), ..wanted.clone() };
    Ok(netlink.configure(link, &wanted)?)
}

fn gone(slot: u32) -> Error {
    Error::Device { kind: "network interface", slot, reason: "it has gone".into() }
}

fn parse(interface: &api::NetworkInterface) -> Result<(u32, Interface)> {
    let invalid = |reason: String| Error::invalid("interfaces", format!("{:?}: {reason}", interface.name));
    let slot = interface.device.as_ref().ok_or_else(|| invalid("there is no device".into()))?.slot;
    let name = &interface.name;
    let bad = |byte: u8| byte == b'/' || byte == b':' || byte.is_ascii_whitespace() || byte == 0;
    if name.is_empty() || name.len() > NAME_LIMIT || name.bytes().any(bad) || name == "." || name == ".." {
        return Err(invalid(format!("a name has 1 to {NAME_LIMIT} bytes, without '/', ':' and blanks")));
    }
    let address = |address: &api::IpAddress| parse_address(address).map_err(invalid);
    let ip = |text: &str| parse_ip(text).map_err(invalid);
    let optional = |text: &str| if text.is_empty() { Ok(None) } else { ip(text).map(Some) };
    let routes = interface.routes.iter().map(|route| {
        let destination = route.destination.as_ref().ok_or_else(|| invalid("a route has no destination".into()))?;
        Ok(Route {
            destination: address(destination)?,
            gateway: optional(&route.gateway)?,
            source: optional(&route.source)?,
            scope: if route.link_scope { Scope::Link } else { Scope::Universe },
            onlink: route.onlink,
            metric: route.metric,
            mtu: route.mtu,
        })
    });
    let neighbours = interface.neighbours.iter().map(|neighbour| {
        let mac = neighbour.mac.parse().map_err(|error: nacelle_netlink::MacError| invalid(error.to_string()))?;
        Ok(Neighbour { ip: ip(&neighbour.ip)?, mac })
    });
    let parsed = Interface {
        name: name.clone(),
        mac: Mac::default(),
        mtu: interface.mtu,
        arp: !interface.no_arp,
        addresses: interface.addresses.iter().map(address).collect::<Result<_>>()?,
        routes: routes.collect::<Result<_>>()?,
        neighbours: neighbours.collect::<Result<_>>()?,
    };
    Ok((slot, parsed))
}

fn parse_ip(text: &str) -> std::result::Result<IpAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is no IP address"))
}

fn parse_address(address: &api::IpAddress) -> std::result::Result<Address, String> {
    let ip = parse_ip(&address.ip)?;
    let most = if ip.is_ipv4() { 32 } else { 128 };
    match u8::try_from(address.prefix) {
        Ok(prefix) if prefix <= most => Ok(Address { ip, prefix }),
        _ => Err(format!("{}/{}: a prefix has at most {most} bits", address.ip, address.prefix)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> api::NetworkInterface {
        let address = |ip: &str, prefix| api::IpAddress { ip: ip.into(), prefix };
        api::NetworkInterface {
            device: Some(api::Device { slot: 3 }),
            name: "eth0".into(),
            mtu: 1500,
            addresses: vec![address("10.0.0.2", 24), address("fd00::2", 64)],
            routes: vec![api::IpRoute {
                destination: Some(address("0.0.0.0", 0)),
                gateway: "10.0.0.1".into(),
                ..api::IpRoute::default()
            }],
            neighbours: vec![api::IpNeighbour { ip: "10.0.0.1".into(), mac: "02:00:00:00:00:01".into() }],
            ..api::NetworkInterface::default()
        }
    }

    #[test]
    fn an_interface_is_read_with_all_that_is_on_it() {
        let (slot, parsed) = parse(&interface()).unwrap();
        assert_eq!((slot, parsed.name.as_str(), parsed.mtu, parsed.arp), (3, "eth0", 1500, true));
        assert_eq!(parsed.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.2/24", "fd00::2/64"]);
        assert_eq!(parsed.routes[0].gateway, Some([10, 0, 0, 1].into()));
        assert_eq!(parsed.neighbours[0].mac, Mac([2, 0, 0, 0, 0, 1]));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let broken = |change: fn(&mut api::NetworkInterface)| {
            let mut interface = interface();
            change(&mut interface);
            parse(&interface).unwrap_err().to_string()
        };
        assert!(broken(|i| i.device = None).contains("device"));
        assert!(broken(|i| i.name = "../../x".into()).contains("name"));
        assert!(broken(|i| i.addresses[0].prefix = 33).contains("/33"));
        assert!(broken(|i| i.addresses[0].ip = "ten".into()).contains("ten"));
        assert!(broken(|i| i.routes[0].gateway = "there".into()).contains("there"));
        assert!(broken(|i| i.neighbours[0].mac = "xx".into()).contains("xx"));
    }
}
