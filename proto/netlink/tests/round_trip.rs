//! What is configured is what is read, by a real kernel: in a network namespace of the test's
//! own, with a veth pair.

#![allow(clippy::unwrap_used)]

use std::process::Command;

use nacelle_netlink::{Address, Interface, Link, Mac, Neighbour, Netlink, Route, Scope};
use rustix::thread::{UnshareFlags, unshare_unsafe};

fn address(ip: &str, prefix: u8) -> Address {
    Address { ip: ip.parse().unwrap(), prefix }
}

fn route(destination: Address) -> Route {
    Route { destination, gateway: None, source: None, scope: Scope::Universe, onlink: false, metric: 0, mtu: 0 }
}

fn find(netlink: &mut Netlink, name: &str) -> Link {
    netlink.links().unwrap().into_iter().find(|link| link.name == name).unwrap()
}

/// Runs a test in a network namespace with the interfaces `one` and `two`, or says why not.
fn in_namespace(test: fn(Netlink)) {
    let thread = std::thread::spawn(move || {
        // SAFETY: the thread ends with the test and shares nothing that the namespace holds.
        if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
            eprintln!("skipped: no network namespace ({error})");
            return;
        }
        let pair = Command::new("ip").args("link add one type veth peer two".split(' ')).output();
        match pair {
            Ok(output) if output.status.success() => test(Netlink::open().unwrap()),
            other => eprintln!("skipped: no veth pair ({other:?})"),
        }
    });
    thread.join().unwrap();
}

#[test]
fn an_interface_is_read_as_it_was_configured_and_configured_again_in_vain() {
    in_namespace(|mut netlink| {
        let (one, two) = (find(&mut netlink, "one"), find(&mut netlink, "two"));
        assert!(!one.up && !one.loopback && one.arp);
        netlink.set_up(&two, true).unwrap();
        let mut wanted = Interface {
            name: "eth0".into(),
            mac: one.mac.unwrap(),
            mtu: 1400,
            arp: true,
            addresses: vec![address("10.9.0.2", 24), address("10.9.1.2", 32), address("fd00:9::2", 64)],
            routes: vec![
                Route { scope: Scope::Link, mtu: 1300, ..route(address("10.8.0.0", 16)) },
                Route {
                    gateway: Some([10, 9, 0, 1].into()),
                    source: Some([10, 9, 1, 2].into()),
                    ..route(address("0.0.0.0", 0))
                },
                Route {
                    gateway: Some([169, 254, 1, 1].into()),
                    onlink: true,
                    metric: 7,
                    ..route(address("10.7.0.0", 16))
                },
                Route { gateway: "fd00:9::1".parse().ok(), metric: 1024, ..route(address("::", 0)) },
            ],
            neighbours: vec![Neighbour { ip: [10, 9, 0, 1].into(), mac: Mac([2, 0, 0, 0, 0, 9]) }],
        };
        netlink.configure(&one, &wanted).unwrap();
        let eth0 = find(&mut netlink, "eth0");
        assert!(eth0.up);
        netlink.configure(&eth0, &wanted).expect("again is fine");
        let mut read = netlink.interface(&eth0).unwrap().unwrap();
        // The kernel has an order of its own.
        for interface in [&mut wanted, &mut read] {
            interface.routes.sort_by_key(|route| route.destination.to_string());
            interface.addresses.sort_by_key(ToString::to_string);
        }
        assert_eq!(read, wanted);
    });
}

#[test]
fn what_the_kernel_refuses_is_told_with_what_was_tried() {
    in_namespace(|mut netlink| {
        let one = find(&mut netlink, "one");
        let error = netlink.rename(&one, "two").unwrap_err().to_string();
        assert!(error.contains("rename one to two"), "{error}");
        let gone = Link { index: 4_000_000, ..one };
        assert!(netlink.set_up(&gone, true).unwrap_err().is_not_found());
        let loopback = find(&mut netlink, "lo");
        assert!(loopback.loopback && netlink.interface(&loopback).unwrap().is_none());
    });
}
