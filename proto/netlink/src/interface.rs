//! An interface with all that is configured on it: read in one place, made in another.

use serde::{Deserialize, Serialize};

use crate::link::{Link, Mac};
use crate::{Address, Neighbour, Netlink, Result, Route};

/// What a guest's interface takes over from the one that a plugin made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its address.
    pub mac: Mac,
    /// The longest packet, in bytes.
    pub mtu: u32,
    /// Whether neighbours are asked for their addresses.
    pub arp: bool,
    /// Its addresses, in the order they were given.
    pub addresses: Vec<Address>,
    /// Routes by it.
    pub routes: Vec<Route>,
    /// Neighbours known for good.
    pub neighbours: Vec<Neighbour>,
}

impl Netlink {
    /// Reads an Ethernet interface. None if `link` is of another kind.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn interface(&mut self, link: &Link) -> Result<Option<Interface>> {
        let Some(mac) = link.mac else { return Ok(None) };
        Ok(Some(Interface {
            name: link.name.clone(),
            mac,
            mtu: link.mtu,
            arp: link.arp,
            addresses: self.addresses(link)?,
            routes: self.routes(link)?,
            neighbours: self.neighbours(link)?,
        }))
    }

    /// Makes an interface of this machine into `wanted`, except for its MAC. Doing so again
    /// changes nothing.
    ///
    /// # Errors
    /// If the kernel refuses a step; those before it stay done.
    pub fn configure(&mut self, link: &Link, wanted: &Interface) -> Result<()> {
        let mut link = link.clone();
        if link.name != wanted.name {
            self.set_up(&link, false)?;
            self.rename(&link, &wanted.name)?;
            link.name.clone_from(&wanted.name);
        }
        if link.mtu != wanted.mtu {
            self.set_mtu(&link, wanted.mtu)?;
        }
        if link.arp != wanted.arp {
            self.set_arp(&link, wanted.arp)?;
        }
        // Addresses first: bringing the interface up makes the routes that follow from them.
        for address in &wanted.addresses {
            self.add_address(&link, *address)?;
        }
        self.set_up(&link, true)?;
        for neighbour in &wanted.neighbours {
            self.add_neighbour(&link, neighbour)?;
        }
        for route in &wanted.routes {
            self.add_route(&link, route)?;
        }
        Ok(())
    }
}
