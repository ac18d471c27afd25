//! A pod in the words of the CNI conventions: arguments, and what plugins may be told.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// Annotations of a pod that bound its bandwidth, in bits a second as a Kubernetes quantity.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// What makes sense there: 1 kbit/s to 1 Pbit/s.
const BANDWIDTH: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;
/// How much may come at once, in bits, beside what the rate gives in a second: not less than the largest packet that is cut
/// only behind the queue, which would never get through, nor more than plugins can count.
const BURST: std::ops::RangeInclusive<u64> = (64 << 10) * 8..=u32::MAX as u64;
/// The capability that passes the pod's annotations on, as other runtimes name it.
const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// A transport protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A port of the host that leads to one of the pod's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Of this protocol.
    pub protocol: Protocol,
    /// The pod's port, 1 to 65535.
    pub container_port: u16,
    /// The host's, 1 to 65535.
    pub host_port: u16,
    /// The host's address; all of them if none.
    pub host_ip: Option<IpAddr>,
}

/// Name resolution.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

/// A pod, as far as its network is concerned.
#[derive(Debug, Clone, Default)]
pub struct Pod {
    /// The sandbox id: 64 hexadecimal digits.
    pub id: String,
    /// Name of the pod.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its unique id.
    pub uid: String,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Ports of the host that lead to it.
    pub ports: Vec<PortMapping>,
    /// Its name resolution.
    pub dns: Dns,
    /// Its cgroup, if the caller has named one.
    pub cgroup_parent: String,
}

impl Pod {
    /// `CNI_ARGS`: who the pod is.
    ///
    /// # Errors
    /// A value has a `;`, which would end it there.
    pub(crate) fn args(&self) -> Result<String> {
        let pairs = [
            ("K8S_POD_NAMESPACE", &self.namespace),
            ("K8S_POD_NAME", &self.name),
            ("K8S_POD_INFRA_CONTAINER_ID", &self.id),
            ("K8S_POD_UID", &self.uid),
        ];
        let mut text = "IgnoreUnknown=1".to_owned();
        for (key, value) in pairs {
            if value.contains([';', '\0']) {
                return Err(Error::Invalid(format!(
                    "{value:?} cannot be told to CNI plugins: it must not contain ';'"
                )));
            }
            text.push_str(&format!(";{key}={value}"));
        }
        Ok(text)
    }

    /// What plugins may be told, by capability.
    ///
    /// # Errors
    /// An annotation on bandwidth that makes no sense.
    pub(crate) fn capabilities(&self) -> Result<Map<String, Value>> {
        let mut map = Map::new();
        if !self.ports.is_empty() {
            let ports: Vec<_> = self.ports.iter().map(port).collect();
            map.insert("portMappings".into(), ports.into());
        }
        let (ingress, egress) = (self.bandwidth(INGRESS)?, self.bandwidth(EGRESS)?);
        if ingress.is_some() || egress.is_some() {
            let mut bandwidth = Map::new();
            for (name, rate) in [("ingress", ingress), ("egress", egress)] {
                if let Some(rate) = rate {
                    bandwidth.insert(format!("{name}Rate"), rate.into());
                    // A second's worth: more, and a limit of 1 Mbit/s would begin to hold after an hour.
                    let burst = rate.clamp(*BURST.start(), *BURST.end());
                    bandwidth.insert(format!("{name}Burst"), burst.into());
                }
            }
            map.insert("bandwidth".into(), bandwidth.into());
        }
        if self.dns != Dns::default() {
            let Dns { servers, searches, options } = &self.dns;
            map.insert("dns".into(), json!({ "servers": servers, "searches": searches, "options": options }));
        }
        if !self.annotations.is_empty() {
            map.insert(POD_ANNOTATIONS.into(), json!(self.annotations));
        }
        if !self.cgroup_parent.is_empty() {
            map.insert("cgroupPath".into(), self.cgroup_parent.clone().into());
        }
        Ok(map)
    }

    fn bandwidth(&self, key: &str) -> Result<Option<u64>> {
        let Some(text) = self.annotations.get(key) else { return Ok(None) };
        match quantity(text).filter(|rate| BANDWIDTH.contains(rate)) {
            Some(rate) => Ok(Some(rate)),
            None => Err(Error::Invalid(format!(
                "annotation {key}: {text:?} must be bits a second from 1k to 1P, for example 10M"
            ))),
        }
    }
}

fn port(mapping: &PortMapping) -> Value {
    let mut value = json!({
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": mapping.protocol,
    });
    if let (Some(ip), Value::Object(map)) = (mapping.host_ip, &mut value) {
        map.insert("hostIP".into(), ip.to_string().into());
    }
    value
}

/// A Kubernetes quantity, rounded up to a whole number: `10M`, `1.5Gi`, `2e6`.
fn quantity(text: &str) -> Option<u64> {
    const SUFFIXES: [(&str, f64); 13] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
        ("m", 1e-3),
    ];
    let suffix = SUFFIXES.iter().find_map(|(suffix, factor)| text.strip_suffix(suffix).map(|rest| (rest, *factor)));
    let (number, factor) = suffix.unwrap_or((text, 1.0));
    if !number.bytes().all(|byte| byte.is_ascii_digit() || b".+-eE".contains(&byte)) {
        return None;
    }
    let value = (number.parse::<f64>().ok()? * factor).ceil();
    // The whole range of what makes sense is exact in it.
    (0.0..=1e18).contains(&value).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, value) in
            [("10M", 10_000_000), ("1Ki", 1024), ("1.5G", 1_500_000_000), ("2e6", 2_000_000), ("1001m", 2), ("7", 7)]
        {
            assert_eq!(quantity(text), Some(value), "{text}");
        }
        for text in ["", "M", "-1", "ten", "1 M", "inf", "nan", "1MM", "0x10"] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    #[test]
    fn a_plugin_is_told_of_ports_bandwidth_and_names() {
        let mapping = |host_ip| PortMapping { protocol: Protocol::Udp, container_port: 53, host_port: 5353, host_ip };
        let pod = Pod {
            annotations: BTreeMap::from([(EGRESS.to_owned(), "10M".to_owned())]),
            ports: vec![mapping(None), mapping(Some([127, 0, 0, 1].into()))],
            dns: Dns { servers: vec!["10.0.0.1".into()], ..Dns::default() },
            ..Pod::default()
        };
        let capabilities = Value::from(pod.capabilities().unwrap());
        assert_eq!(
            capabilities["portMappings"],
            json!([
                { "hostPort": 5353, "containerPort": 53, "protocol": "udp" },
                { "hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1" },
            ])
        );
        assert_eq!(capabilities["bandwidth"], json!({ "egressRate": 10_000_000, "egressBurst": 10_000_000 }));
        assert_eq!(capabilities["dns"]["servers"], json!(["10.0.0.1"]));
        assert!(Pod::default().capabilities().unwrap().is_empty());
    }

    #[test]
    fn what_may_come_at_once_is_a_second_of_the_rate() {
        let burst = |rate: &str| {
            let annotations = BTreeMap::from([(INGRESS.to_owned(), rate.to_owned())]);
            let capabilities = Pod { annotations, ..Pod::default() }.capabilities().unwrap();
            capabilities["bandwidth"]["ingressBurst"].as_u64().unwrap()
        };
        assert_eq!((burst("2M"), burst("1G")), (2_000_000, 1_000_000_000));
        assert_eq!(burst("1k"), 64 * 1024 * 8, "a packet gets through");
        assert_eq!(burst("100G"), u64::from(u32::MAX), "as much as plugins can count");
    }

    #[test]
    fn bandwidth_that_makes_no_sense_and_names_that_cannot_be_told_are_refused() {
        let annotations = BTreeMap::from([(INGRESS.to_owned(), "12".to_owned())]);
        let error = Pod { annotations, ..Pod::default() }.capabilities().unwrap_err().to_string();
        assert!(error.contains(INGRESS) && error.contains("12"), "{error}");
        assert!(Pod { name: "a;B=c".into(), ..Pod::default() }.args().is_err());
        let pod = Pod { id: "ab".into(), name: "web".into(), namespace: "default".into(), ..Pod::default() };
        assert!(pod.args().unwrap().starts_with("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;"));
    }
}
