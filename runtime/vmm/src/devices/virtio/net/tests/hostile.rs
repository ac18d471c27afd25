//! Nothing a guest puts into its rings harms more than its own interface.

use proptest::prelude::*;

use super::guest::{Guest, MERGEABLE, Wire, frame};
use crate::devices::virtio::device::VirtioDevice;

/// One entry of a descriptor table: address, length, flags, next.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![0_u64..0x90_0000, Just(u64::MAX), (1_u64 << 32)..(1 << 32) + 0x90_0000];
    let length = prop_oneof![0_u32..5000, Just(u32::MAX), Just(0x80_0000)];
    (address, length, 0_u16..8, 0_u16..260)
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
