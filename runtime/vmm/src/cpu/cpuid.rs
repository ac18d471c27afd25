//! What a guest learns from the CPUID instruction: all that KVM supports on this host,
//! with the topology of this guest (one package, one thread a core) written over the
//! host's.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_INTEL_CACHES: u32 = 0x4;
const LEAF_PERFORMANCE_MONITORING: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const LEAF_AMD_PERFORMANCE_MONITORING: u32 = 0x8000_0022;

const FEATURE_ECX_X2APIC: u32 = 1 << 21;
const FEATURE_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURE_EDX_HYPER_THREADING: u32 = 1 << 28;
const AMD_ECX_LEGACY_CORES: u32 = 1 << 1;
const AMD_ECX_CORE_COUNTERS: u32 = 1 << 23;

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What KVM supports on this host, before it is fitted to a processor.
#[derive(Debug, Clone)]
pub struct Template {
    supported: CpuId,
    deadline_timer: bool,
}

impl Template {
    /// Asks KVM.
    pub fn read(kvm: &Kvm) -> Result<Self, kvm_ioctls::Error> {
        Ok(Self {
            supported: kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?,
            deadline_timer: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }

    /// What processor `id` of `count` answers.
    pub(super) fn for_processor(&self, id: u8, count: u8) -> CpuId {
        let mut cpuid = self.supported.clone();
        for entry in cpuid.as_mut_slice() {
            fit(entry, id, count);
            if entry.function == LEAF_FEATURES && self.deadline_timer {
                entry.ecx |= FEATURE_ECX_TSC_DEADLINE;
            }
        }
        cpuid
    }

    /// Whether the processors come from Intel, whose string instructions are slow unless
    /// IA32_MISC_ENABLE says otherwise.
    pub(super) fn is_intel(&self) -> bool {
        self.supported.as_slice().iter().any(|entry| entry.function == 0 && entry.ebx == u32::from_le_bytes(*b"Genu"))
    }
}

/// Bits of an APIC id that tell `count` processors apart.
fn id_bits(count: u8) -> u32 {
    u32::from(count.max(1)).next_power_of_two().trailing_zeros()
}

fn fit(entry: &mut kvm_cpuid_entry2, id: u8, count: u8) {
    let (id, count) = (u32::from(id), u32::from(count));
    match entry.function {
        LEAF_FEATURES => {
            entry.ebx = entry.ebx & 0xffff | count << 16 | id << 24;
            entry.ecx |= FEATURE_ECX_HYPERVISOR | FEATURE_ECX_X2APIC;
            if count > 1 {
                entry.edx |= FEATURE_EDX_HYPER_THREADING;
            } else {
                entry.edx &= !FEATURE_EDX_HYPER_THREADING;
            }
        }
        LEAF_INTEL_CACHES => {
            // Cores in the package, and for the last level (3) who shares it.
            let sharers = if entry.eax >> 5 & 0x7 >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharers << 14 | (count - 1) << 26;
        }
        LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => {
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, LEVEL_THREAD << 8),
                1 => (id_bits(count as u8), count, LEVEL_CORE << 8 | 1),
                index => (0, 0, index),
            };
            entry.edx = id;
        }
        // A guest's performance counters are not worth what probing them costs at boot.
        LEAF_PERFORMANCE_MONITORING | LEAF_AMD_PERFORMANCE_MONITORING => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        LEAF_AMD_FEATURES => {
            entry.ecx &= !(AMD_ECX_CORE_COUNTERS | AMD_ECX_LEGACY_CORES);
            if count > 1 && entry.ecx != 0 {
                entry.ecx |= AMD_ECX_LEGACY_CORES;
            }
        }
        LEAF_AMD_SIZES => entry.ecx = entry.ecx & !0xf0ff | id_bits(count as u8) << 12 | (count - 1),
        LEAF_AMD_CACHES => {
            let sharers = if entry.eax >> 5 & 0x7 >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharers << 14;
        }
        LEAF_AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitted(function: u32, index: u32, id: u8, count: u8) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 { function, index, eax: 0x163, ebx: 0x0800, ..Default::default() };
        fit(&mut entry, id, count);
        entry
    }

    #[test]
    fn processors_are_told_apart() {
        let features = fitted(LEAF_FEATURES, 0, 3, 4);
        assert_eq!(features.ebx, 3 << 24 | 4 << 16 | 0x0800);
        assert_ne!(features.ecx & FEATURE_ECX_HYPERVISOR, 0);
        let core = fitted(LEAF_TOPOLOGY, 1, 3, 5);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 5, 0x201, 3));
        let caches = fitted(LEAF_INTEL_CACHES, 3, 0, 4);
        assert_eq!((caches.eax >> 14 & 0xfff, caches.eax >> 26), (3, 3));
    }

    #[test]
    fn id_bits_hold_every_id() {
        for count in 1..=64_u8 {
            assert!(u32::from(count - 1) < 1 << id_bits(count));
        }
        assert_eq!((id_bits(1), id_bits(2), id_bits(64)), (0, 1, 6));
    }
}
