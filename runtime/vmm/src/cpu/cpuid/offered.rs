//! What of the host's processor a guest is offered: what is listed here, and nothing that is not.
//!
//! KVM supports more: above all virtual machines within virtual machines, which are the largest part of what a guest can
//! attack in the host's kernel, and whose state nobody here could save. So what a later processor or kernel has is offered
//! once somebody has looked at it. (Intel's manual, volume 2, CPUID; AMD's, volume 3, appendix E.)

use std::ops::RangeInclusive;

use kvm_bindings::kvm_cpuid_entry2;

use super::{LEAF_AMD_FEATURES, LEAF_FEATURES};

const LEAF_STRUCTURED_FEATURES: u32 = 0x7;

/// The leaves. Others answer with zeros: a processor without what they are about. Among those are performance counters (0xa,
/// 0x23, 0x8000_0022: not worth what probing them costs at boot), SGX (0x12), processor trace (0x14), the interface of SVM
/// (0x8000_000a), sampling (0x8000_001b) and encrypted memory (0x8000_001f).
const LEAVES: [RangeInclusive<u32>; 12] = [
    // The highest leaf and the maker, features, caches.
    0x0..=0x2,
    0x4..=0x4,
    // Whether the local timer runs always.
    0x6..=0x6,
    LEAF_STRUCTURED_FEATURES..=LEAF_STRUCTURED_FEATURES,
    // The topology, which is the guest's own.
    0xb..=0xb,
    // Extended state.
    0xd..=0xd,
    // Tiles, the topology again, and vectors.
    0x1d..=0x1f,
    0x24..=0x24,
    // KVM's own.
    0x4000_0000..=0x4000_0001,
    // The highest, features, the name, caches, power, sizes of addresses.
    0x8000_0000..=0x8000_0008,
    // Translation of large pages, hints on performance, caches and topology.
    0x8000_0019..=0x8000_001e,
    // More features.
    0x8000_0021..=0x8000_0021,
];
/// Of those ranges, the leaves of sampling by instructions and of light-weight profiling.
const EXCEPT: [u32; 2] = [0x8000_001b, 0x8000_001c];

/// Bits that are taken out of a leaf, by leaf and subleaf: of EAX, EBX, ECX and EDX.
const TAKEN: [(u32, u32, [u32; 4]); 3] = [
    (LEAF_FEATURES, 0, [0, 0, FEATURES_ECX, FEATURES_EDX]),
    (LEAF_STRUCTURED_FEATURES, 0, [0, STRUCTURED_EBX, STRUCTURED_ECX, STRUCTURED_EDX]),
    (LEAF_AMD_FEATURES, 0, [0, 0, AMD_ECX, 0]),
];
/// DTES64, MONITOR, DS-CPL, VMX, SMX, EST, TM2, SDBG, xTPR, PDCM, DCA.
const FEATURES_ECX: u32 = bits(&[2, 3, 4, 5, 6, 7, 8, 11, 14, 15, 18]);
/// DS, ACPI, TM, PBE.
const FEATURES_EDX: u32 = bits(&[21, 22, 29, 31]);
/// SGX, RDT-M, RDT-A, processor trace.
const STRUCTURED_EBX: u32 = bits(&[2, 12, 15, 25]);
/// ENQCMD, SGX launch control.
const STRUCTURED_ECX: u32 = bits(&[29, 30]);
/// PCONFIG, architectural last branch records.
const STRUCTURED_EDX: u32 = bits(&[18, 19]);
/// SVM, IBS, SKINIT, watchdog, LWP, counters of cores, of the northbridge, of time and of caches, MWAITX.
const AMD_ECX: u32 = bits(&[2, 10, 12, 13, 15, 23, 24, 27, 28, 29]);

const fn bits(numbers: &[u32]) -> u32 {
    let mut word = 0;
    let mut index = 0;
    while index < numbers.len() {
        word |= 1 << numbers[index];
        index += 1;
    }
    word
}

/// What a guest is offered of an entry of KVM's, if anything.
pub fn offered(mut entry: kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
    let listed = LEAVES.iter().any(|leaves| leaves.contains(&entry.function));
    if !listed || EXCEPT.contains(&entry.function) {
        return None;
    }
    let taken = TAKEN.iter().find(|(function, index, _)| (*function, *index) == (entry.function, entry.index));
    if let Some((_, _, [eax, ebx, ecx, edx])) = taken {
        entry.eax &= !eax;
        entry.ebx &= !ebx;
        entry.ecx &= !ecx;
        entry.edx &= !edx;
    }
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_all_ones(function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        let [eax, ebx, ecx, edx] = [u32::MAX; 4];
        offered(kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() })
    }

    #[test]
    fn no_processor_can_offer_a_guest_virtual_machines_or_enclaves_or_traces() {
        let features = of_all_ones(0x1, 0).unwrap();
        // VMX, SMX, DTES64, PDCM; DS.
        assert_eq!(features.ecx & (1 << 5 | 1 << 6 | 1 << 2 | 1 << 15), 0);
        assert_eq!(features.edx & 1 << 21, 0);
        // AES, XSAVE and AVX stay.
        let stays = 1 << 25 | 1 << 26 | 1 << 28;
        assert_eq!(features.ecx & stays, stays);
        let structured = of_all_ones(0x7, 0).unwrap();
        assert_eq!((structured.ebx & (1 << 2 | 1 << 25), structured.ecx & 1 << 30), (0, 0), "SGX, PT, SGX_LC");
        assert_eq!(of_all_ones(0x7, 1).unwrap().ebx, u32::MAX, "which is about something else");
        assert_eq!(of_all_ones(0x8000_0001, 0).unwrap().ecx & (1 << 2 | 1 << 12), 0, "SVM, SKINIT");
        for leaf in
            [0x3, 0x5, 0xa, 0xf, 0x10, 0x12, 0x14, 0x19, 0x23, 0x8000_000a, 0x8000_001b, 0x8000_001c, 0x8000_001f]
        {
            assert!(of_all_ones(leaf, 0).is_none(), "{leaf:#x}");
        }
        for leaf in [0x25, 0x3f, 0x4000_0002, 0x4000_0010, 0x8000_0026, 0xc000_0001, u32::MAX] {
            assert!(of_all_ones(leaf, 0).is_none(), "{leaf:#x} is not known");
        }
    }
}
