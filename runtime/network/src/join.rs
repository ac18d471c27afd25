//! Joins what plugins made to taps. Everything here happens inside the pod's network
//! namespace.

use std::os::fd::OwnedFd;

use nacelle_netlink::{Interface, Link, Netlink};

use crate::{Error, Result, tap};

/// Digits of the sandbox id in a tap's name, which has at most 15 characters.
const ID_DIGITS: usize = 8;

/// An interface of the guest to be, and its tap.
#[derive(Debug)]
pub struct Joined {
    /// What the guest takes over.
    pub interface: Interface,
    /// The other end.
    pub tap: OwnedFd,
}

/// Joins every interface that there is, or that `named` says there should be, to a tap.
pub fn join_all(id: &str, named: &[String]) -> Result<Vec<Joined>> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    for name in named {
        let refused = |reason: &str| Err(Error::Interface { interface: name.clone(), reason: reason.into() });
        match links.iter().find(|link| link.name == *name) {
            None => return refused("is in the plugin's result, but not in the pod's network namespace"),
            Some(link) if !link.loopback && link.mac.is_none() => {
                return refused(
                    "is no Ethernet interface, and a guest can have no other: choose a network plugin that makes one",
                );
            }
            Some(_) => {}
        }
    }
    // The kernel makes some by itself, for tunnels; they are no Ethernet interfaces, or down.
    let wanted = |link: &&Link| !link.loopback && link.mac.is_some() && (link.up || named.contains(&link.name));
    let mut wanted: Vec<_> = links.iter().filter(wanted).collect();
    // The guest finds its interfaces in this order: those of the result, then the rest.
    wanted.sort_by_key(|link| named.iter().position(|name| *name == link.name).unwrap_or(usize::MAX));
    wanted.into_iter().enumerate().map(|(number, link)| join(&mut netlink, id, number, link)).collect()
}

fn join(netlink: &mut Netlink, id: &str, number: usize, link: &Link) -> Result<Joined> {
    let missing = |name: &str| Error::Interface { interface: name.into(), reason: "has gone".into() };
    let interface = netlink.interface(link)?.ok_or_else(|| missing(&link.name))?;
    let name = format!("nac{}-{number}", id.get(..ID_DIGITS).unwrap_or(id));
    let tap = tap::create(&name)?;
    // The namespace's own stack has nothing to say to the guest.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    let other = netlink.links()?.into_iter().find(|link| link.name == name).ok_or_else(|| missing(&name))?;
    if other.mtu != link.mtu {
        netlink.set_mtu(&other, link.mtu)?;
    }
    netlink.set_up(&other, true)?;
    netlink.set_up(link, true)?;
    netlink.redirect(link, &other)?;
    netlink.redirect(&other, link)?;
    Ok(Joined { interface, tap })
}
