//! Everything a virtual processor holds, taken from one and given to another.
//!
//! The order of both matters to KVM: reading the multiprocessing state may change others, the
//! local APIC is understood by the mode that the special registers set, and the deadline of
//! its timer by the time stamp counter and the APIC.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::CpuError;

const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The architecture's extended state as KVM_GET_XSAVE has it.
const XSAVE_SIZE: i32 = 4096;

/// A processor that does not run.
#[derive(Debug, Serialize, Deserialize)]
pub struct CpuState {
    running: kvm_mp_state,
    registers: kvm_regs,
    special: kvm_sregs,
    debug: kvm_debugregs,
    extended: kvm_xsave,
    extended_control: kvm_xcrs,
    apic: kvm_lapic_state,
    /// Numbers and values, in the order in which they are set.
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

/// The machine-specific registers that KVM says belong to a processor's state, in the order in
/// which they are to be set.
pub fn msr_list(kvm: &Kvm) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let mut list = kvm.get_msr_index_list()?.as_slice().to_vec();
    list.sort_by_key(|register| *register == MSR_TSC_DEADLINE);
    Ok(list)
}

impl CpuState {
    /// Takes the state of processor `id` of `vm`, whose thread has ended.
    pub(super) fn take(vm: &VmFd, fd: &VcpuFd, id: u8, msrs: &[u32]) -> Result<Self, CpuError> {
        let failed = |what| move |source| CpuError::Kvm { what, id, source };
        if vm.check_extension_int(Cap::Xsave2) > XSAVE_SIZE {
            return Err(CpuError::Extended { id });
        }
        Ok(Self {
            running: fd.get_mp_state().map_err(failed("get the multiprocessing state"))?,
            registers: fd.get_regs().map_err(failed("get the registers"))?,
            special: fd.get_sregs().map_err(failed("get the special registers"))?,
            debug: fd.get_debug_regs().map_err(failed("get the debug registers"))?,
            extended: fd.get_xsave().map_err(failed("get the extended state"))?,
            extended_control: fd.get_xcrs().map_err(failed("get the extended control registers"))?,
            apic: fd.get_lapic().map_err(failed("get the local interrupt controller"))?,
            msrs: get_msrs(fd, msrs).map_err(failed("get the machine-specific registers"))?,
            events: fd.get_vcpu_events().map_err(failed("get the pending events"))?,
        })
    }

    /// Gives it to processor `id`, which has its features and has never run.
    pub(super) fn give(&self, fd: &VcpuFd, id: u8) -> Result<(), CpuError> {
        let failed = |what| move |source| CpuError::Kvm { what, id, source };
        fd.set_mp_state(self.running).map_err(failed("set the multiprocessing state"))?;
        fd.set_regs(&self.registers).map_err(failed("set the registers"))?;
        fd.set_sregs(&self.special).map_err(failed("set the special registers"))?;
        // SAFETY: KVM reads as much as the structure has, for no larger state was saved.
        unsafe { fd.set_xsave(&self.extended) }.map_err(failed("set the extended state"))?;
        // A host without XSAVE has none, and refuses to be given none.
        if self.extended_control.nr_xcrs > 0 {
            fd.set_xcrs(&self.extended_control).map_err(failed("set the extended control registers"))?;
        }
        fd.set_debug_regs(&self.debug).map_err(failed("set the debug registers"))?;
        fd.set_lapic(&self.apic).map_err(failed("set the local interrupt controller"))?;
        set_msrs(fd, id, &self.msrs)?;
        fd.set_vcpu_events(&self.events).map_err(failed("set the pending events"))
    }
}

fn entries(registers: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, kvm_ioctls::Error> {
    let entries: Vec<_> = registers.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

/// Reads the registers. KVM stops at one that this processor does not have: it is left out.
fn get_msrs(fd: &VcpuFd, mut registers: &[u32]) -> Result<Vec<(u32, u64)>, kvm_ioctls::Error> {
    let mut values = Vec::with_capacity(registers.len());
    while !registers.is_empty() {
        let mut msrs = entries(registers.iter().map(|register| (*register, 0)))?;
        let got = fd.get_msrs(&mut msrs)?;
        values.extend(msrs.as_slice().iter().take(got).map(|entry| (entry.index, entry.data)));
        registers = registers.get(got + 1..).unwrap_or_default();
    }
    Ok(values)
}

/// Sets the registers. KVM stops at one that cannot be set: no harm if it has the value anyway.
fn set_msrs(fd: &VcpuFd, id: u8, mut registers: &[(u32, u64)]) -> Result<(), CpuError> {
    let failed = |what| move |source| CpuError::Kvm { what, id, source };
    while !registers.is_empty() {
        let msrs = entries(registers.iter().copied()).map_err(failed("set the machine-specific registers"))?;
        let set = fd.set_msrs(&msrs).map_err(failed("set the machine-specific registers"))?;
        if let Some((register, value)) = registers.get(set) {
            let has = get_msrs(fd, &[*register]).map_err(failed("get the machine-specific registers"))?;
            if has != [(*register, *value)] {
                return Err(CpuError::Msr { register: *register, id });
            }
        }
        registers = registers.get(set + 1..).unwrap_or_default();
    }
    Ok(())
}
