//! Neighbours that are known without asking.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use serde::{Deserialize, Serialize};

use crate::address::family;
use crate::link::{Link, Mac};
use crate::{Netlink, Result};

/// A neighbour whose address somebody set for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its IP address.
    pub ip: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
}

impl Netlink {
    /// The permanent neighbours on an interface.
    pub(crate) fn neighbours(&mut self, link: &Link) -> Result<Vec<Neighbour>> {
        let action = format!("list the neighbours on {}", link.name);
        let entries = self.dump(&action, RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()))?;
        Ok(entries.into_iter().filter_map(|entry| neighbour(entry, link.index)).collect())
    }

    /// Adds a permanent neighbour, or replaces the one there is.
    pub(crate) fn add_neighbour(&mut self, link: &Link, neighbour: &Neighbour) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(neighbour.ip);
        message.header.ifindex = link.index;
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::Destination(neighbour.ip.into()));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(neighbour.mac.0.to_vec()));
        let action = format!("add the neighbour {} on {}", neighbour.ip, link.name);
        self.request(&action, RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }
}

fn neighbour(entry: RouteNetlinkMessage, index: u32) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = entry else { return None };
    if message.header.ifindex != index || message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => ip = Some(address.into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => ip = Some(address.into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.try_into().ok().map(Mac),
            _ => {}
        }
    }
    Some(Neighbour { ip: ip?, mac: mac? })
}
