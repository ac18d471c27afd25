//! What a guest learns from the CPUID instruction: what KVM supports on this host of what is
//! [`offered`], with the topology of this guest (one package, one thread a core) in place of the
//! host's.

mod offered;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_INTEL_CACHES: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const FEATURE_ECX_X2APIC: u32 = 1 << 21;
const FEATURE_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURE_EDX_HYPER_THREADING: u32 = 1 << 28;
const AMD_ECX_LEGACY_CORES: u32 = 1 << 1;

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Subleaves of the topology: two levels, and one that says that there are no more.
const LEVELS: u32 = 3;

/// What a guest is offered on this host, before it is fitted to a processor.
#[derive(Debug, Clone)]
pub struct Template {
    offered: Vec<kvm_cpuid_entry2>,
    deadline_timer: bool,
}

impl Template {
    /// Asks KVM.
    pub fn read(kvm: &Kvm) -> Result<Self, kvm_ioctls::Error> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        Ok(Self::new(supported.as_slice(), kvm.check_extension(Cap::TscDeadlineTimer)))
    }

    /// Of what is supported, what is offered. In place of each leaf of the topology, of which KVM has no or one entry, come
    /// those of its levels.
    fn new(supported: &[kvm_cpuid_entry2], deadline_timer: bool) -> Self {
        let is_topology = |function| [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2].contains(&function);
        let mut offered: Vec<_> = supported.iter().copied().filter_map(offered::offered).collect();
        offered.retain(|entry| !is_topology(entry.function) || entry.index == 0);
        let leaves: Vec<u32> = offered.iter().map(|entry| entry.function).filter(|leaf| is_topology(*leaf)).collect();
        offered.retain(|entry| !is_topology(entry.function));
        for function in leaves {
            let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            offered.extend((0..LEVELS).map(|index| kvm_cpuid_entry2 { function, index, flags, ..Default::default() }));
        }
        Self { offered, deadline_timer }
    }

    /// What processor `id` of `count` answers.
    ///
    /// # Errors
    /// If that is more than KVM takes.
    pub(super) fn for_processor(&self, id: u8, count: u8) -> Result<CpuId, kvm_ioctls::Error> {
        let mut entries = self.offered.clone();
        for entry in &mut entries {
            fit(entry, id, count);
            if entry.function == LEAF_FEATURES && self.deadline_timer {
                entry.ecx |= FEATURE_ECX_TSC_DEADLINE;
            }
        }
        CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
    }

    /// Whether the processors come from Intel, whose string instructions are slow unless
    /// IA32_MISC_ENABLE says otherwise.
    pub(super) fn is_intel(&self) -> bool {
        self.offered.iter().any(|entry| entry.function == 0 && entry.ebx == u32::from_le_bytes(*b"Genu"))
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
        LEAF_AMD_FEATURES => {
            entry.ecx &= !AMD_ECX_LEGACY_CORES;
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

    /// The answer of a processor to a leaf and subleaf; zeros where it has none.
    fn answer(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let entry = cpuid.as_slice().iter().find(|entry| {
            let by_index = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == function && (!by_index || entry.index == index)
        });
        entry.copied().unwrap_or_default()
    }

    /// What a system concludes from a leaf of the topology (Intel's manual, volume 3, 9.9): the package, the processor in it
    /// and how many are there. None if the leaf says nothing.
    fn place(cpuid: &CpuId, leaf: u32) -> Option<(u32, u32, u32)> {
        let mut found = None;
        for index in 0..8 {
            let entry = answer(cpuid, leaf, index);
            if entry.ecx >> 8 & 0xff == 0 || entry.ebx & 0xffff == 0 {
                return found;
            }
            let shift = entry.eax & 0x1f;
            found = Some((entry.edx >> shift, entry.edx & ((1 << shift) - 1), entry.ebx & 0xffff));
        }
        panic!("the levels have no end")
    }

    #[test]
    fn processors_are_of_one_package_by_what_this_hosts_kvm_supports() {
        let kvm = Kvm::new().unwrap();
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let highest = answer(&supported, 0, 0).eax;
        let template = Template::read(&kvm).unwrap();
        for count in [1, 2, 3, 5, 64] {
            for id in 0..count {
                let cpuid = template.for_processor(id, count).unwrap();
                for leaf in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2].into_iter().filter(|leaf| *leaf <= highest) {
                    assert_eq!(place(&cpuid, leaf), Some((0, id.into(), count.into())), "{id} of {count}, {leaf:#x}");
                }
                assert_eq!(answer(&cpuid, LEAF_FEATURES, 0).ebx >> 24, u32::from(id));
            }
        }
    }

    #[test]
    fn kvm_takes_what_is_offered_and_no_virtual_machine_is_among_it() {
        let (kvm, vm) = crate::machine::create_vm().unwrap();
        let template = Template::read(&kvm).unwrap();
        let cpuid = template.for_processor(0, 2).unwrap();
        vm.create_vcpu(0).unwrap().set_cpuid2(&cpuid).unwrap();
        let (features, amd) = (answer(&cpuid, LEAF_FEATURES, 0), answer(&cpuid, LEAF_AMD_FEATURES, 0));
        assert_eq!((features.ecx & 1 << 5, amd.ecx & 1 << 2), (0, 0));
        assert_ne!(answer(&cpuid, 0x4000_0000, 0).ebx, 0, "KVM's signature stays");
    }

    /// A host whose KVM has levels of its own: before 6.2, or of a later kernel.
    #[test]
    fn levels_of_the_host_are_none_of_the_guest() {
        let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        let level = |index| kvm_cpuid_entry2 {
            function: LEAF_TOPOLOGY,
            index,
            flags,
            eax: 7,
            ebx: 96,
            ecx: (index + 1) << 8 | index,
            ..Default::default()
        };
        let features = kvm_cpuid_entry2 { function: LEAF_FEATURES, ..Default::default() };
        let supported = [features, level(0), level(1), level(2), level(3)];
        let cpuid = Template::new(&supported, true).for_processor(3, 5).unwrap();
        assert_eq!(place(&cpuid, LEAF_TOPOLOGY), Some((0, 3, 5)));
        assert_eq!(place(&cpuid, LEAF_TOPOLOGY_V2), None, "which this host has not");
        assert_eq!(cpuid.as_slice().len(), 4);
    }

    #[test]
    fn id_bits_hold_every_id() {
        for count in 1..=64_u8 {
            assert!(u32::from(count - 1) < 1 << id_bits(count));
        }
        assert_eq!((id_bits(1), id_bits(2), id_bits(64)), (0, 1, 6));
    }
}
