//! IP addresses of interfaces.

use std::fmt;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use serde::{Deserialize, Serialize};

use crate::link::Link;
use crate::{Netlink, Result};

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Bits of the prefix, at most 32 or 128.
    pub prefix: u8,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

pub(crate) fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// Whether the kernel makes this address by itself for every interface.
fn automatic(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

impl Netlink {
    /// The addresses of an interface, without the link-local ones that it gave itself.
    pub(crate) fn addresses(&mut self, link: &Link) -> Result<Vec<Address>> {
        let action = format!("list the addresses of {}", link.name);
        let entries = self.dump(&action, RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        Ok(entries.into_iter().filter_map(|entry| address(entry, link.index)).collect())
    }

    /// Gives an interface an address, usable at once: whether somebody else has it is the
    /// business of whoever gave it out.
    pub(crate) fn add_address(&mut self, link: &Link, address: Address) -> Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(address.ip);
        message.header.prefix_len = address.prefix;
        message.header.index = link.index;
        message.header.scope = AddressScope::Universe;
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Local(address.ip));
        message.attributes.push(AddressAttribute::Address(address.ip));
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        if let IpAddr::V4(ip) = address.ip
            && address.prefix < 31
        {
            let host = u32::MAX.checked_shr(u32::from(address.prefix)).unwrap_or(0);
            message.attributes.push(AddressAttribute::Broadcast((u32::from(ip) | host).into()));
        }
        let action = format!("give {} the address {address}", link.name);
        self.request(&action, RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
    }
}

fn address(entry: RouteNetlinkMessage, index: u32) -> Option<Address> {
    let RouteNetlinkMessage::NewAddress(message) = entry else { return None };
    if message.header.index != index {
        return None;
    }
    // Of a point-to-point interface ADDRESS is the peer's.
    let (mut own, mut peer) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => own = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            _ => {}
        }
    }
    let ip = own.or(peer)?;
    (!automatic(ip)).then_some(Address { ip, prefix: message.header.prefix_len })
}
