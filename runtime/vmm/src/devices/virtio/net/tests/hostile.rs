//! Nothing a guest puts into its rings harms more than its own interface.

use std::time::Instant;

use proptest::prelude::*;

use super::guest::{Guest, MERGEABLE, PATIENCE, Wire, frame, readable_now};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::net::receive::LOOKS;

/// One entry of a descriptor table: address, length, flags, next.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![0_u64..0x90_0000, Just(u64::MAX), (1_u64 << 32)..(1 << 32) + 0x90_0000];
    let length = prop_oneof![0_u32..5000, Just(u32::MAX), Just(0x80_0000)];
    (address, length, 0_u16..8, 0_u16..260)
}

#[test]
fn buffers_that_hold_nothing_keep_nobody_for_longer_than_a_go() {
    let Some((tap, _wire)) = Wire::new() else { return };
    let mut guest = Guest::new(tap, MERGEABLE);
    let _feeder = guest.to_guest.feed();
    let (mut all, begun) = (0, Instant::now());
    while all < 100_000 {
        let before = guest.to_guest.used_index();
        guest.net.queue_notified(0).unwrap();
        let given_back = usize::from(guest.to_guest.used_index().wrapping_sub(before));
        assert!(given_back <= LOOKS, "{given_back} in one go");
        all += given_back;
        assert!(begun.elapsed() < PATIENCE, "the guest's other processor does nothing");
    }
}

#[test]
fn an_interface_that_is_gone_keeps_nobody_busy() {
    // Waiting for a driver, for buffers, for packets, and with a driver that starts over.
    for (buffers, restart) in [(None, false), (Some(0), false), (Some(40), false), (Some(40), true)] {
        let Some((tap, wire)) = Wire::new() else { return };
        let mut guest = Guest::new(tap, MERGEABLE);
        match buffers {
            None => guest.net.reset(),
            Some(count) => guest.offer(&vec![0x1000; count]),
        }
        assert!(!readable_now(&guest.net.poll_fd().unwrap()));
        wire.cut();
        if restart {
            guest.net.reset();
            // It cannot: there is nobody to agree on offloads with.
            guest.activate().unwrap_err();
        }
        for _ in 0..3 {
            if readable_now(&guest.net.poll_fd().unwrap()) {
                guest.net.poll_ready().unwrap();
            }
        }
        assert!(!readable_now(&guest.net.poll_fd().unwrap()), "{buffers:?} {restart}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_ring_content_panics_or_hangs_the_device(
        table in prop::collection::vec(descriptor(), 1..20),
        heads in prop::collection::vec(0_u16..300, 1..40),
        jump in prop::option::of(any::<u16>()),
        mergeable in any::<bool>(),
    ) {
        let Some((tap, wire)) = Wire::new() else { return Ok(()) };
        let mut guest = Guest::new(tap, if mergeable { MERGEABLE } else { 0 });
        for (index, (address, length, flags, next)) in (0..).zip(&table) {
            guest.to_guest.descriptor(index, *address, *length, *flags, *next);
            guest.from_guest.descriptor(index, *address, *length, *flags, *next);
        }
        for head in heads {
            guest.to_guest.push(head);
            guest.from_guest.push(head);
        }
        if let Some(index) = jump {
            guest.to_guest.set_available_index(index);
            guest.from_guest.set_available_index(index);
        }
        wire.send(&frame(100));
        wire.send(&frame(5000));
        // An error is a device that needs a reset: the transport sees to it.
        for queue in [0, 1] {
            if guest.net.queue_notified(queue).is_err() {
                guest.net.reset();
            }
        }
        if guest.net.poll_ready().is_err() {
            guest.net.reset();
        }
    }
}
