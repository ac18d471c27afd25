//! Networks: the CRI's words to ours, our state to the CRI's.

use std::net::IpAddr;

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{Network, PortMapping, Protocol};
use tonic::Status;

use crate::status::{bounded, invalid};

/// The condition that tells whether pods can join a network, or why not.
pub async fn condition(network: &Network) -> cri::RuntimeCondition {
    match network.status().await {
        Ok(()) => cri::RuntimeCondition { r#type: "NetworkReady".into(), status: true, ..Default::default() },
        Err(error) => not_ready(error.to_string()),
    }
}

/// The condition that tells why pods cannot join a network.
pub fn not_ready(message: String) -> cri::RuntimeCondition {
    cri::RuntimeCondition {
        r#type: "NetworkReady".into(),
        status: false,
        reason: "NetworkPluginNotReady".into(),
        message: bounded(message),
    }
}

/// The ports of the host that lead to the pod. One without a host port is for display only.
pub fn ports(mappings: &[cri::PortMapping]) -> Result<Vec<PortMapping>, Status> {
    let mapped = mappings.iter().enumerate().filter(|(_, mapping)| mapping.host_port != 0);
    mapped
        .map(|(index, mapping)| {
            let field = |name: &str| format!("config.port_mappings[{index}].{name}");
            let port = |name: &str, port: i32| {
                u16::try_from(port)
                    .ok()
                    .filter(|port| *port > 0)
                    .ok_or_else(|| invalid(&field(name), format!("{port} is no port: use 1 to 65535")))
            };
            let protocol = match cri::Protocol::try_from(mapping.protocol) {
                Ok(cri::Protocol::Tcp) => Protocol::Tcp,
                Ok(cri::Protocol::Udp) => Protocol::Udp,
                Ok(cri::Protocol::Sctp) => Protocol::Sctp,
                Err(_) => return Err(invalid(&field("protocol"), format!("{} is no protocol", mapping.protocol))),
            };
            let host_ip = match mapping.host_ip.as_str() {
                "" => None,
                text => Some(
                    text.parse::<IpAddr>()
                        .map_err(|_| invalid(&field("host_ip"), format!("{text:?} is no IP address")))?,
                ),
            };
            Ok(PortMapping {
                protocol,
                container_port: port("container_port", mapping.container_port)?,
                host_port: port("host_port", mapping.host_port)?,
                // Any address is every address.
                host_ip: host_ip.filter(|ip| !ip.is_unspecified()),
            })
        })
        .collect()
}

/// A pod's addresses.
pub fn status(ips: &[IpAddr]) -> cri::PodSandboxNetworkStatus {
    let mut ips = ips.iter().map(ToString::to_string);
    cri::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
    }
}

/// What the kubelet knows of the node's network. It is checked and passed over: plugins
/// bring their own configuration.
pub fn update(request: &cri::UpdateRuntimeConfigRequest) -> Result<(), Status> {
    let network = request.runtime_config.as_ref().and_then(|config| config.network_config.as_ref());
    let ranges = network.map(|network| network.pod_cidr.as_str()).unwrap_or_default();
    for range in ranges.split(',').filter(|range| !range.is_empty()) {
        let valid = range.trim().split_once('/').is_some_and(|(ip, prefix)| {
            let most = ip.parse::<IpAddr>().map(|ip| if ip.is_ipv4() { 32 } else { 128 });
            prefix.parse::<u8>().is_ok_and(|prefix| most.is_ok_and(|most| prefix <= most))
        });
        if !valid {
            let problem = format!("{range:?} is no range of addresses, such as 10.244.0.0/24");
            return Err(invalid("runtime_config.network_config.pod_cidr", problem));
        }
    }
    tracing::info!(pod_cidr = ranges, "the node's range of pod addresses");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(host_port: i32) -> cri::PortMapping {
        cri::PortMapping { container_port: 80, host_port, ..cri::PortMapping::default() }
    }

    #[test]
    fn ports_of_the_host_are_taken_over_and_others_are_not() {
        let udp = cri::PortMapping { protocol: cri::Protocol::Udp.into(), host_ip: "127.0.0.1".into(), ..mapping(53) };
        let any = cri::PortMapping { host_ip: "0.0.0.0".into(), ..mapping(81) };
        let ports = ports(&[mapping(0), udp, any]).unwrap();
        assert_eq!(ports.iter().map(|port| port.host_port).collect::<Vec<_>>(), [53, 81]);
        assert_eq!((ports[0].protocol, ports[0].host_ip), (Protocol::Udp, Some([127, 0, 0, 1].into())));
        assert_eq!((ports[1].protocol, ports[1].host_ip), (Protocol::Tcp, None));
    }

    #[test]
    fn a_port_that_cannot_be_is_named_with_its_field() {
        for (mapping, field) in [
            (mapping(-1), "host_port"),
            (mapping(65_536), "host_port"),
            (cri::PortMapping { container_port: 0, ..mapping(80) }, "container_port"),
            (cri::PortMapping { protocol: 9, ..mapping(80) }, "protocol"),
            (cri::PortMapping { host_ip: "localhost".into(), ..mapping(80) }, "host_ip"),
        ] {
            let status = ports(&[mapping]).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().starts_with(&format!("config.port_mappings[0].{field}:")), "{}", status.message());
        }
    }

    #[test]
    fn the_nodes_range_is_checked() {
        let with = |range: &str| {
            let network_config = Some(cri::NetworkConfig { pod_cidr: range.into() });
            update(&cri::UpdateRuntimeConfigRequest { runtime_config: Some(cri::RuntimeConfig { network_config }) })
        };
        with("").unwrap();
        with("10.244.0.0/24,fd00::/64").unwrap();
        assert!(with("10.244.0.0/33").unwrap_err().message().contains("pod_cidr"));
        assert!(with("pods").is_err());
    }
}
