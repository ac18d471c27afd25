//! Routes of the main table.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType,
};
use serde::{Deserialize, Serialize};

use crate::address::{Address, family};
use crate::link::Link;
use crate::{Netlink, Result};

/// How far away the destination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Anywhere, by a gateway.
    #[default]
    Universe,
    /// On the interface's own network.
    Link,
}

/// A route by an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to; a prefix of 0 bits is everywhere.
    pub destination: Address,
    /// By whom, if not directly.
    pub gateway: Option<IpAddr>,
    /// The address that packets come from, if not the kernel's choice.
    pub source: Option<IpAddr>,
    /// How far away it is.
    pub scope: Scope,
    /// Whether the gateway is reached by the interface although no address of it says so.
    pub onlink: bool,
    /// Routes with a lower one are preferred; 0 for the kernel's choice.
    pub metric: u32,
    /// The longest packet this way, in bytes; 0 for the interface's.
    pub mtu: u32,
}

impl Netlink {
    /// The routes by an interface that somebody set: those that follow from its addresses
    /// come with them. Routes to a link's own network come first, for gateways are looked
    /// for there.
    pub(crate) fn routes(&mut self, link: &Link) -> Result<Vec<Route>> {
        let action = format!("list the routes by {}", link.name);
        let entries = self.dump(&action, RouteNetlinkMessage::GetRoute(RouteMessage::default()))?;
        let mut routes: Vec<_> = entries.into_iter().filter_map(|entry| route(entry, link.index)).collect();
        routes.sort_by_key(|route| route.gateway.is_some());
        Ok(routes)
    }

    /// Adds a route, or replaces the one there is.
    pub(crate) fn add_route(&mut self, link: &Link, route: &Route) -> Result<()> {
        let mut message = RouteMessage::default();
        let header = &mut message.header;
        header.address_family = family(route.destination.ip);
        header.destination_prefix_length = route.destination.prefix;
        header.table = RouteHeader::RT_TABLE_MAIN;
        header.protocol = RouteProtocol::Static;
        header.kind = RouteType::Unicast;
        header.scope = if route.scope == Scope::Link { RouteScope::Link } else { RouteScope::Universe };
        if route.onlink {
            header.flags = RouteFlags::Onlink;
        }
        let attributes = &mut message.attributes;
        if route.destination.prefix > 0 {
            attributes.push(RouteAttribute::Destination(route.destination.ip.into()));
        }
        attributes.push(RouteAttribute::Oif(link.index));
        attributes.extend(route.gateway.map(|ip| RouteAttribute::Gateway(ip.into())));
        attributes.extend(route.source.map(|ip| RouteAttribute::PrefSource(ip.into())));
        if route.metric > 0 {
            attributes.push(RouteAttribute::Priority(route.metric));
        }
        if route.mtu > 0 {
            attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
        }
        let action = format!("add the route to {} by {}", route.destination, link.name);
        self.request(&action, RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn route(entry: RouteNetlinkMessage, index: u32) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(RouteMessage { header, attributes, .. }) = entry else { return None };
    let by_kernel = matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
    if header.kind != RouteType::Unicast || by_kernel || header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let everywhere = match header.address_family {
        netlink_packet_route::AddressFamily::Inet => IpAddr::from([0; 4]),
        netlink_packet_route::AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let mut route = Route {
        destination: Address { ip: everywhere, prefix: header.destination_prefix_length },
        gateway: None,
        source: None,
        scope: if header.scope == RouteScope::Link { Scope::Link } else { Scope::Universe },
        onlink: header.flags.contains(RouteFlags::Onlink),
        metric: 0,
        mtu: 0,
    };
    let mut by = None;
    for attribute in &attributes {
        match attribute {
            RouteAttribute::Oif(oif) => by = Some(*oif),
            RouteAttribute::Destination(address) => route.destination.ip = ip(address)?,
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                let mtu = |metric: &RouteMetric| if let RouteMetric::Mtu(mtu) = metric { Some(*mtu) } else { None };
                route.mtu = metrics.iter().find_map(mtu).unwrap_or(0);
            }
            _ => {}
        }
    }
    (by == Some(index)).then_some(route)
}
