//! What the plugins made, as far as it concerns us (specification, section 5). All
//! versions in one: what an older one lacks is empty.

use std::net::IpAddr;

use nacelle_netlink::Address;
use serde::Deserialize;
use serde_json::Value;

/// The result of ADD.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct AddResult {
    /// Interfaces, in the pod's namespace and on the host.
    pub interfaces: Vec<ResultInterface>,
    /// Addresses.
    pub ips: Vec<ResultIp>,
    /// Name resolution.
    pub dns: ResultDns,
}

/// An interface that a plugin made.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ResultInterface {
    /// Its name.
    pub name: String,
    /// The network namespace it is in; empty for the host's.
    pub sandbox: String,
}

/// An address that a plugin gave.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ResultIp {
    /// Address and prefix, as `10.1.2.3/24`.
    pub address: String,
    /// Which of the interfaces has it.
    pub interface: Option<i64>,
}

/// Name resolution as a plugin knows it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ResultDns {
    /// Name servers.
    pub nameservers: Vec<String>,
    /// Search domains.
    pub search: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

impl AddResult {
    /// Reads a result of any version.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(value: &Value) -> Result<Self, String> {
        let result = Self::deserialize(value).map_err(|error| error.to_string())?;
        for ip in &result.ips {
            parse_address(&ip.address)?;
        }
        Ok(result)
    }

    /// The addresses of the pod's interface `name`, in the plugin's order.
    #[must_use]
    pub fn addresses(&self, name: &str) -> Vec<IpAddr> {
        let of_interface = |ip: &&ResultIp| match ip.interface.and_then(|index| usize::try_from(index).ok()) {
            None => true,
            Some(index) => {
                self.interfaces.get(index).is_some_and(|found| found.name == name && !found.sandbox.is_empty())
            }
        };
        let ips = self.ips.iter().filter(of_interface);
        ips.filter_map(|ip| parse_address(&ip.address).ok()).map(|address| address.ip).collect()
    }

    /// Names of the interfaces in the pod's namespace.
    pub fn in_sandbox(&self) -> impl Iterator<Item = &str> {
        let inside = self.interfaces.iter().filter(|interface| !interface.sandbox.is_empty());
        inside.map(|interface| interface.name.as_str())
    }
}

/// Reads `ADDRESS/PREFIX`; without a prefix it is the address alone.
fn parse_address(text: &str) -> Result<Address, String> {
    let wrong = || format!("{text:?} is no address with a prefix, such as 10.1.2.3/24");
    let (ip, prefix) = text.split_once('/').unwrap_or((text, ""));
    let ip: IpAddr = ip.parse().map_err(|_| wrong())?;
    let all = if ip.is_ipv4() { 32 } else { 128 };
    let prefix = if prefix.is_empty() { all } else { prefix.parse().map_err(|_| wrong())? };
    if prefix > all { Err(wrong()) } else { Ok(Address { ip, prefix }) }
}
