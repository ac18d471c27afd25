//! Kernel parameters that plugins have set in a pod's network namespace (`tuning` and its like), for the guest, in whose kernel
//! they take effect.
//!
//! What a plugin has set is what differs from before it was called; of an interface that came since, from the namespace's default
//! for interfaces. Reading all parameters twice takes some milliseconds, so it is not done for plugins that are known to set
//! none that matter to a guest.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::cni::NetworkList;

/// Parameters of a network namespace: their files below /proc/sys, and their values.
pub type Parameters = BTreeMap<String, String>;

const SYSTEM: &str = "/proc/sys";
const NETWORK: &str = "net";
/// Deepest directory: `net/ipv4/conf/eth0`.
const DEPTH: usize = 4;
/// Plugins that set at most what the interface of the host's side needs.
const QUIET: [&str; 12] = [
    "bandwidth",
    "bridge",
    "dummy",
    "firewall",
    "host-device",
    "ipvlan",
    "loopback",
    "macvlan",
    "portmap",
    "ptp",
    "tap",
    "vlan",
];
/// What is not set but follows from the interface, of which the guest has the same.
const FOLLOWS: [&str; 1] = ["mtu"];

/// Whether a plugin of these networks may set parameters.
pub fn may_change(lists: &[NetworkList]) -> bool {
    let quiet = |plugin: &serde_json::Map<String, serde_json::Value>| {
        plugin.get("type").and_then(serde_json::Value::as_str).is_some_and(|kind| QUIET.contains(&kind))
    };
    lists.iter().flat_map(|list| &list.plugins).any(|plugin| !quiet(plugin))
}

/// The parameters of the calling thread's network namespace that can be set.
pub fn read() -> Parameters {
    let mut found = Parameters::new();
    read_below(Path::new(SYSTEM), NETWORK, 1, &mut found);
    found
}

fn read_below(top: &Path, name: &str, depth: usize, found: &mut Parameters) {
    for entry in fs::read_dir(top.join(name)).into_iter().flatten().flatten() {
        let (Ok(kind), Ok(own)) = (entry.file_type(), entry.file_name().into_string()) else { continue };
        let name = format!("{name}/{own}");
        if kind.is_dir() {
            if depth < DEPTH {
                read_below(top, &name, depth + 1, found);
            }
        } else if entry.metadata().is_ok_and(|metadata| metadata.permissions().mode() & 0o600 == 0o600)
            // Some cannot be read as long as they are not set.
            && let Ok(value) = fs::read_to_string(entry.path())
        {
            found.insert(name, value.trim().to_owned());
        }
    }
}

/// What was set between `before` and `after`.
pub fn changed(before: &Parameters, after: Parameters) -> Parameters {
    let was = |name: &str| before.get(name).cloned().or_else(|| before.get(&of_any_interface(name)?).cloned());
    let follows = |name: &str| name.rsplit('/').next().is_some_and(|own| FOLLOWS.contains(&own));
    after
        .into_iter()
        .filter(|(name, value)| !follows(name) && was(name).is_some_and(|before| before != *value))
        .collect()
}

/// The default of an interface's parameter: `net/ipv4/conf/default/rp_filter` of `net/ipv4/conf/eth0/rp_filter`.
fn of_any_interface(name: &str) -> Option<String> {
    match name.split('/').collect::<Vec<_>>()[..] {
        [net, family, kind @ ("conf" | "neigh"), _, own] => Some(format!("{net}/{family}/{kind}/default/{own}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(list: &[(&str, &str)]) -> Parameters {
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn what_was_set_is_what_differs_from_before_or_from_any_interface_s() {
        let before = parameters(&[
            ("net/core/somaxconn", "4096"),
            ("net/ipv4/tcp_rmem", "4096\t131072\t6291456"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/default/arp_notify", "0"),
            ("net/ipv6/conf/default/mtu", "1280"),
        ]);
        let mut after = before.clone();
        after.extend(parameters(&[
            ("net/core/somaxconn", "500"),
            ("net/ipv4/conf/eth0/rp_filter", "2"),
            ("net/ipv4/conf/eth0/arp_notify", "0"),
            ("net/ipv6/conf/eth0/mtu", "1500"),
            ("net/ipv4/something/new", "1"),
        ]));
        let expected = parameters(&[("net/core/somaxconn", "500"), ("net/ipv4/conf/eth0/rp_filter", "2")]);
        assert_eq!(changed(&before, after), expected);
        assert!(changed(&before, before.clone()).is_empty());
    }

    #[test]
    fn parameters_that_can_be_set_are_read_with_their_directories() {
        let top = tempfile::tempdir().unwrap();
        let eth0 = top.path().join("net/ipv4/conf/eth0");
        fs::create_dir_all(eth0.join("too/deep")).unwrap();
        fs::write(eth0.join("rp_filter"), "1\n").unwrap();
        fs::write(eth0.join("too/deep/x"), "1\n").unwrap();
        fs::write(top.path().join("net/count"), "7\n").unwrap();
        fs::set_permissions(top.path().join("net/count"), fs::Permissions::from_mode(0o444)).unwrap();
        let mut found = Parameters::new();
        read_below(top.path(), NETWORK, 1, &mut found);
        assert_eq!(found, parameters(&[("net/ipv4/conf/eth0/rp_filter", "1")]));
    }

    #[test]
    fn parameters_are_read_for_plugins_that_may_set_some() {
        let list = |plugins: &str| {
            let text = format!(r#"{{"cniVersion": "1.0.0", "name": "n", "plugins": [{plugins}]}}"#);
            vec![NetworkList::parse(Path::new("/n.conflist"), text.as_bytes()).unwrap()]
        };
        assert!(!may_change(&list(r#"{"type": "bridge"}, {"type": "portmap"}"#)));
        assert!(may_change(&list(r#"{"type": "bridge"}, {"type": "tuning"}"#)));
        assert!(may_change(&list(r#"{"type": "somebody-s"}"#)));
    }
}
