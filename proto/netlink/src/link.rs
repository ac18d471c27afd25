//! Interfaces as such: name, state, MTU, hardware address.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::str::FromStr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use serde::{Deserialize, Serialize};

use crate::{Netlink, Result};

/// An Ethernet address, written as `02:00:00:00:00:01`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mac(pub [u8; 6]);

/// Not an Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no MAC address: write it as 02:00:00:00:00:01")]
pub struct MacError(pub String);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> std::result::Result<Self, MacError> {
        let wrong = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> std::result::Result<Self, MacError> {
        text.parse()
    }
}

/// An interface, without what is configured on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number of it, in its network namespace.
    pub index: u32,
    /// Its name there.
    pub name: String,
    /// Its address, if it is an Ethernet interface.
    pub mac: Option<Mac>,
    /// The longest packet, in bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Whether it is the loopback interface.
    pub loopback: bool,
    /// Whether neighbours are asked for their addresses.
    pub arp: bool,
}

impl Netlink {
    /// All interfaces.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let entries = self.dump("list the network interfaces", request)?;
        Ok(entries.into_iter().filter_map(link).collect())
    }

    /// Brings an interface up or down.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_up(&mut self, link: &Link, up: bool) -> Result<()> {
        let mut message = of(link);
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        let action = format!("bring {} {}", link.name, if up { "up" } else { "down" });
        self.request(&action, RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Sets the longest packet, in bytes.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_mtu(&mut self, link: &Link, mtu: u32) -> Result<()> {
        let mut message = of(link);
        message.attributes.push(LinkAttribute::Mtu(mtu));
        let action = format!("set the MTU of {} to {mtu}", link.name);
        self.request(&action, RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Renames an interface, which must be down.
    ///
    /// # Errors
    /// If the kernel refuses: the name is taken, or no name.
    pub fn rename(&mut self, link: &Link, name: &str) -> Result<()> {
        let mut message = of(link);
        message.attributes.push(LinkAttribute::IfName(name.into()));
        let action = format!("rename {} to {name}", link.name);
        self.request(&action, RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Moves an interface to another network namespace, where it is down and has nothing
    /// configured on it. Its name must be free there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn move_to(&mut self, link: &Link, namespace: BorrowedFd<'_>) -> Result<()> {
        let mut message = of(link);
        message.attributes.push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
        let action = format!("move {} to another network namespace", link.name);
        self.request(&action, RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Says whether neighbours on this interface are asked for their addresses.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_arp(&mut self, link: &Link, arp: bool) -> Result<()> {
        let mut message = of(link);
        message.header.change_mask = LinkFlags::Noarp;
        message.header.flags = if arp { LinkFlags::empty() } else { LinkFlags::Noarp };
        let action = format!("set the use of ARP on {}", link.name);
        self.request(&action, RouteNetlinkMessage::SetLink(message), 0)
    }
}

fn of(link: &Link) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message
}

fn link(entry: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = entry else { return None };
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        loopback: flags.contains(LinkFlags::Loopback),
        arp: !flags.contains(LinkFlags::Noarp),
    };
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(bytes) if ethernet => link.mac = bytes.try_into().ok().map(Mac),
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_written_and_others_are_named() {
        let mac = Mac([2, 0, 0xab, 4, 5, 0xff]);
        assert_eq!(mac.to_string().parse(), Ok(mac));
        for wrong in ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:0", "02:00:00:00:00:0g", "02-00-00"] {
            assert!(wrong.parse::<Mac>().unwrap_err().to_string().contains(wrong));
        }
    }
}
