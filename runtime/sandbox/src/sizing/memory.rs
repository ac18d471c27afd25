//! The arithmetic of a guest's memory, in MiB: what containers can use of it, and what it takes
//! of the host.
//!
//! ```text
//! inside the guest    containers | base: kernel, agent | 1/50 of all | what the kernel keeps free
//! on the host         all of the guest's memory | page tables, 1/256 of it | the VMM's own
//! ```
//!
//! Every page of a guest is touched sooner or later, and stays the guest's. So all of it has to
//! fit into the pod's cgroup on the host, with what describes it there: eight bytes for each
//! 4 KiB in the tables by which the processor finds a guest's page, and as many in the VMM's own.
//!
//! Inside, as seen in guests of 131 MiB to 16 GiB with one idle container: kernel and agent take
//! 17 to 28 MiB. The kernel's descriptors of pages are 1/64 of all; hash tables, which it makes by
//! the size of memory, make it 1/50. And it gives no process the last 22 MiB of each of its two
//! zones, of which the second begins at 3 GiB, from 512 MiB on; less in a smaller guest, and more
//! in one of hundreds of GiB.

/// What a guest's kernel and agent need at least, beside what grows with its memory.
pub const LEAST_BASE: u64 = 36;
/// What containers are left at least in a guest that is worth starting.
pub const LEAST_LEFT: u64 = 16;
/// What a VMM has beside its guest's memory, with all devices.
const VMM: u64 = 8;
/// One part in so many describes the others.
const DESCRIBED: u64 = 50;
/// Twice 8 bytes for each page of 4096.
const MAPPED: u64 = 256;
/// What the kernel keeps free of a zone, and the part of a small zone that this is.
const KEPT: u64 = 24;
const KEPT_PART: u64 = 23;
/// A little less than where the second zone begins.
const SECOND_ZONE: u64 = 2560;
const KIB: u64 = 1024;

/// The least guest in which containers can use so much beside `base`.
pub fn guest_for(containers: u64, base: u64) -> u64 {
    let net = containers.saturating_add(base);
    let mut guest = net;
    // By what is lacking, of which some lacks again: never more than it takes.
    loop {
        let lacking = net.saturating_sub(guest.saturating_sub(own_of(guest)));
        match guest.checked_add(lacking) {
            Some(more) if lacking > 0 => guest = more,
            _ => return guest,
        }
    }
}

/// What containers can use of a guest at most.
pub fn left_in(guest: u64) -> u64 {
    guest.saturating_sub(own_of(guest)).saturating_sub(LEAST_BASE)
}

/// What the kernel has of a guest because the guest is so large.
fn own_of(guest: u64) -> u64 {
    let part = |of: u64, parts: u64| of.saturating_mul(KIB) / parts;
    let kept = |zone: u64| part(zone, KEPT_PART).min(KEPT * KIB);
    let zones = kept(guest).saturating_add(kept(guest.saturating_sub(SECOND_ZONE)));
    // min_free_kbytes, the square root of 16 times the memory in KiB.
    let root = guest.saturating_mul(KIB).saturating_mul(16).isqrt();
    part(guest, DESCRIBED).saturating_add(zones.max(root)).div_ceil(KIB)
}

/// What a guest takes of the host at most.
pub fn taken_by(guest: u64) -> u64 {
    guest.saturating_add(guest.div_ceil(MAPPED)).saturating_add(VMM)
}

/// The largest guest that takes no more of the host than this; 0 if there is none.
pub fn guest_within(host: u64) -> u64 {
    let net = host.saturating_sub(VMM);
    net.saturating_sub(net.div_ceil(MAPPED + 1))
}

/// What a pod needs on the host beside its containers' limits, for these to be of use.
pub fn overhead_for(containers: u64) -> u64 {
    taken_by(guest_for(containers, LEAST_BASE)).saturating_sub(containers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MOST: u64 = 512 << 10;

    proptest! {
        #[test]
        fn containers_can_use_what_they_may_in_the_least_guest(containers in 0..MOST) {
            let guest = guest_for(containers, LEAST_BASE);
            prop_assert!(left_in(guest) >= containers);
            prop_assert!(containers == 0 || left_in(guest - 1) < containers);
        }

        #[test]
        fn the_largest_guest_that_fits_fits_and_no_larger_one(host in 0..MOST) {
            let guest = guest_within(host);
            prop_assert!(guest == 0 || taken_by(guest) <= host);
            prop_assert!(taken_by(guest + 1) > host);
        }

        #[test]
        fn the_overhead_that_is_named_is_what_it_takes(containers in 1..MOST) {
            let overhead = overhead_for(containers);
            prop_assert!(left_in(guest_within(containers + overhead)) >= containers);
            prop_assert!(left_in(guest_within(containers + overhead - 1)) < containers);
        }
    }

    #[test]
    fn no_number_is_too_large() {
        for number in [0, u64::MAX] {
            let _ = (
                guest_for(number, number),
                left_in(number),
                taken_by(number),
                guest_within(number),
                overhead_for(number),
            );
        }
    }

    #[test]
    fn it_is_no_less_than_what_guests_were_seen_to_have() {
        // Memory, and what of it was neither free nor to be freed, nor given to a process; in MiB.
        for (guest, own) in [(131, 35), (358, 38), (2179, 96), (8420, 242), (16742, 400)] {
            let reckoned = guest - left_in(guest);
            assert!((own..own + own / 4 + 24).contains(&reckoned), "{guest}: {reckoned}, seen {own}");
        }
    }

    #[test]
    fn what_the_documentation_says_of_an_overhead_holds() {
        // docs/kubernetes.md and hack/kubernetes/runtimeclass.yaml.
        for (overhead, pod) in [(64, 200), (128, 2304), (256, 6600), (512, 16 << 10), (1024, 37 << 10)] {
            assert!(overhead_for(pod) <= overhead, "{pod} MiB need {}", overhead_for(pod));
        }
    }
}
