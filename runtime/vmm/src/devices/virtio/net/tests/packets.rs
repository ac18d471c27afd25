//! What goes through arrives whole, and what cannot go through stops nothing else.

use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::guest::{Guest, MAC, MERGEABLE, Wire, frame, readable_now};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::net::{Net, Tap};

#[test]
fn a_frame_of_the_guest_is_on_the_wire_however_it_lies_in_memory() {
    let Some((tap, wire)) = Wire::new() else { return };
    let mut guest = Guest::new(tap, MERGEABLE);
    for sizes in [vec![], vec![12], vec![5, 9, 1], vec![26, 100]] {
        let sent = frame(1000);
        guest.send(&sent, &sizes);
        assert_eq!(wire.receive(), sent, "{sizes:?}");
    }
    assert_eq!(guest.net.metrics().sent.load(Ordering::Relaxed), 4);
}

#[test]
fn a_short_or_endless_packet_is_lost_and_the_next_is_not() {
    let Some((tap, wire)) = Wire::new() else { return };
    let mut guest = Guest::new(tap, MERGEABLE);
    guest.send(&[], &[]);
    guest.send(&vec![0; 66_000], &[]);
    guest.send(&frame(60), &[]);
    assert_eq!(wire.receive(), frame(60));
    assert_eq!(guest.net.metrics().send_dropped.load(Ordering::Relaxed), 2);
}

#[test]
fn a_guest_without_room_is_not_woken_for_and_gets_the_packet_later() {
    let Some((tap, wire)) = Wire::new() else { return };
    let mut guest = Guest::new(tap, MERGEABLE);
    wire.send(&frame(3000));
    wire.send(&frame(100));
    assert!(!readable_now(&guest.net.poll_fd().unwrap()), "the event loop would spin");
    guest.offer(&[1500]);
    assert_eq!(guest.receive(), None);
    guest.offer(&[1500, 1500]);
    assert_eq!(guest.receive(), Some((frame(3000), 3)));
    assert_eq!(guest.receive(), None);
    guest.offer(&[1500]);
    assert_eq!(guest.receive(), Some((frame(100), 1)));
    assert!(guest.interrupts.take(0) > 0);
    guest.offer(&[65_536; 2]);
    wire.send(&frame(64));
    guest.poll();
    assert_eq!(guest.receive(), Some((frame(64), 1)));
}

#[test]
fn without_mergeable_buffers_a_packet_has_one_or_is_lost() {
    let Some((tap, wire)) = Wire::new() else { return };
    let mut guest = Guest::new(tap, 0);
    guest.offer(&[1526, 1526]);
    wire.send(&frame(4000));
    wire.send(&frame(1514));
    guest.poll();
    assert_eq!(guest.receive(), Some((frame(1514), 1)));
    assert_eq!(guest.net.metrics().receive_dropped.load(Ordering::Relaxed), 1);
}

#[test]
fn many_packets_in_a_row_keep_their_order() {
    let Some((tap, wire)) = Wire::new() else { return };
    let mut guest = Guest::new(tap, MERGEABLE);
    guest.offer(&[1536; 200]);
    for length in 100..400 {
        wire.send(&frame(length));
    }
    let mut received = 100;
    while received < 400 {
        guest.poll();
        while let Some((got, _)) = guest.receive() {
            assert_eq!(got, frame(received));
            received += 1;
            guest.offer(&[1536]);
        }
    }
}

#[test]
fn a_reset_device_starts_over() {
    let Some((tap, wire)) = Wire::new() else { return };
    let mut guest = Guest::new(tap, MERGEABLE);
    guest.offer(&[1536; 4]);
    guest.net.reset();
    wire.send(&frame(100));
    assert!(!readable_now(&guest.net.poll_fd().unwrap()));
    guest.net.poll_ready().unwrap();
}

#[test]
fn what_is_saved_comes_back_and_another_kind_of_file_is_refused() {
    let Some((tap, _wire)) = Wire::new() else { return };
    let net = Net::new(Tap::new(tap).unwrap(), MAC, 1400).unwrap();
    let text = serde_json::to_string(&net.state()).unwrap();
    let state = serde_json::from_str(&text).unwrap();
    let Some((tap, _wire)) = Wire::new() else { return };
    let back = Net::restore(Tap::new(tap).unwrap(), &state).unwrap();
    assert_eq!((back.state(), back.features()), (net.state(), net.features()));
    let mut config = [0; 12];
    back.read_config(0, &mut config);
    assert_eq!((&config[..6], &config[10..]), (&MAC[..], &1400_u16.to_le_bytes()[..]));

    let file = tempfile::tempfile().unwrap();
    assert!(Tap::new(file.into()).unwrap_err().to_string().contains("no tap"));
    let tun = std::fs::File::open("/dev/net/tun").unwrap();
    assert!(Tap::new(tun.into()).unwrap_err().to_string().contains("no tap"));
}

#[test]
fn an_address_of_a_group_and_a_tiny_mtu_are_refused() {
    for (mac, mtu, word) in [([1, 0, 0, 0, 0, 1], 1500, "MAC"), ([0; 6], 1500, "MAC"), (MAC, 67, "MTU")] {
        let Some((tap, _wire)) = Wire::new() else { return };
        let error = Net::new(Tap::new(tap).unwrap(), mac, mtu).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_frame_on_the_wire_is_in_the_guest_however_small_its_buffers(
        lengths in prop::collection::vec(14_usize..9000, 1..4),
        sizes in prop::collection::vec(64_u32..4096, 250),
    ) {
        let Some((tap, wire)) = Wire::new() else { return Ok(()) };
        let mut guest = Guest::new(tap, MERGEABLE);
        guest.offer(&sizes);
        for length in &lengths {
            wire.send(&frame(*length));
        }
        for length in lengths {
            let got = loop {
                match guest.receive() {
                    Some((got, _)) => break got,
                    None => guest.poll(),
                }
            };
            prop_assert_eq!(got, frame(length));
        }
    }
}
