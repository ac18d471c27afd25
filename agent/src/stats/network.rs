//! What went over the pod's interfaces, as the kernel's files tell it.

use std::collections::HashSet;
use std::fs;

use nacelle_netlink::Netlink;
use nacelle_proto::agent::v1::{InterfaceUsage, TrafficUsage};

/// Most interfaces that are told of: a privileged container may make any number.
const LIMIT: usize = 64;

/// All interfaces of the calling thread's network namespace but loopback and those that are
/// not in use, which a kernel may have from the start; those with a default route first.
pub fn interfaces() -> Vec<InterfaceUsage> {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let (ipv4, ipv6) = (read("/proc/thread-self/net/route"), read("/proc/thread-self/net/ipv6_route"));
    let default = default_interfaces(&ipv4, &ipv6);
    let mut interfaces = parse(&read("/proc/thread-self/net/dev"), &default);
    let up = up();
    interfaces.retain(|interface| up.contains(&interface.name) || is_used(interface));
    // Stable: otherwise in the kernel's order.
    interfaces.sort_by_key(|interface| !interface.default_route);
    interfaces.truncate(LIMIT);
    interfaces
}

fn up() -> HashSet<String> {
    let links = Netlink::open().and_then(|mut netlink| netlink.links()).unwrap_or_default();
    links.into_iter().filter(|link| link.up).map(|link| link.name).collect()
}

fn is_used(interface: &InterfaceUsage) -> bool {
    [&interface.received, &interface.sent].into_iter().flatten().any(|traffic| traffic.packets > 0)
}

/// Two lines of headings, then `name: 8 numbers of what came, 8 of what went`.
fn parse(text: &str, default: &HashSet<&str>) -> Vec<InterfaceUsage> {
    let interface = |line: &str| {
        let (name, numbers) = line.rsplit_once(':')?;
        let name = name.trim();
        let numbers: Vec<u64> = numbers.split_ascii_whitespace().map_while(|number| number.parse().ok()).collect();
        let [bytes, packets, errors, dropped, _, _, _, _, sent @ ..] = numbers.as_slice() else { return None };
        let received = TrafficUsage { bytes: *bytes, packets: *packets, errors: *errors, dropped: *dropped };
        let [bytes, packets, errors, dropped, ..] = sent else { return None };
        let sent = TrafficUsage { bytes: *bytes, packets: *packets, errors: *errors, dropped: *dropped };
        let default_route = default.contains(name);
        (name != "lo").then(|| InterfaceUsage {
            name: name.to_owned(),
            default_route,
            received: Some(received),
            sent: Some(sent),
        })
    };
    text.lines().filter_map(interface).collect()
}

/// Names of interfaces that a default route leads to. In `/proc/net/route`: interface first,
/// destination second, mask eighth. In `/proc/net/ipv6_route`: destination and its prefix's
/// length first, the interface last; the kernel lists a route of its own by `lo`.
fn default_interfaces<'a>(ipv4: &'a str, ipv6: &'a str) -> HashSet<&'a str> {
    let four = ipv4.lines().filter_map(|line| {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let zero = |index: usize| words.get(index).is_some_and(|word| *word == "00000000");
        words.first().copied().filter(|_| zero(1) && zero(7))
    });
    let six = ipv6.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (destination, prefix) = (words.next()?, words.next()?);
        let all = destination.bytes().all(|digit| digit == b'0') && prefix == "00";
        words.last().filter(|name| all && *name != "lo")
    });
    four.chain(six).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEV: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0: 1234567     890    1    2    0     0          0         0     7654     321    3    4    0     0       0          0
 net1:5 1 0 0 0 0 0 0 6 1 0 0 0 0 0 0
 bad0: 1 2 3
";
    const ROUTE: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0100F40A\t0003\t0\t0\t0\t00000000\t0\t0\t0
net1\t0000F40A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
";

    #[test]
    fn interfaces_are_read_with_their_errors_and_the_default_one_is_known() {
        let zero = "0".repeat(32);
        let six = format!("{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo\n");
        let default = default_interfaces(ROUTE, &six);
        let found = parse(DEV, &default);
        assert_eq!(
            found.iter().map(|i| (i.name.as_str(), i.default_route)).collect::<Vec<_>>(),
            [("eth0", true), ("net1", false)]
        );
        let received = TrafficUsage { bytes: 1_234_567, packets: 890, errors: 1, dropped: 2 };
        let sent = TrafficUsage { bytes: 7654, packets: 321, errors: 3, dropped: 4 };
        assert_eq!((found[0].received, found[0].sent), (Some(received), Some(sent)));
        let six = format!("{zero} 00 {zero} 00 {zero} 00000400 00000001 00000000 00000003     net1\n");
        assert!(default_interfaces("", &six).contains("net1"));
    }
}
