//! The state in which the boot processor enters a 64-bit kernel: long mode, paging on
//! with the first GiB mapped to itself, flat segments, interrupts off
//! (Documentation/arch/x86/boot.rst of Linux, "64-bit boot protocol").

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::CpuError;
use crate::layout;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
/// Null, unused, 64-bit code, data, and a task segment (two entries).
const GDT: [u64; 6] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff, 0];

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

const PRESENT_WRITABLE: u64 = 0x3;
const HUGE: u64 = 1 << 7;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// MTRRs on, everything write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Writes the tables that [`set_boot_state`] points the processor to.
pub fn write_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_obj(GDT, GuestAddress(layout::GDT))?;
    memory.write_obj(0_u64, GuestAddress(layout::IDT))?;
    let (pml4, pdpt, directory) = (layout::PAGE_TABLES, layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt))?;
    let entries: Vec<u8> =
        (0..512_u64).flat_map(|index| (index << 21 | PRESENT_WRITABLE | HUGE).to_le_bytes()).collect();
    memory.write_slice(&entries, GuestAddress(directory))
}

/// Puts the boot processor at `entry` with `boot_params` in its hands.
pub fn set_boot_state(vcpu: &VcpuFd, entry: u64) -> Result<(), CpuError> {
    let failed = |what| move |source| CpuError::Kvm { what, id: 0, source };
    let mut special = vcpu.get_sregs().map_err(failed("get the special registers"))?;
    special.gdt.base = layout::GDT;
    special.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    special.idt.base = layout::IDT;
    special.idt.limit = 7;
    special.cs = segment(CODE_SELECTOR, 0xb, true);
    special.ds = segment(DATA_SELECTOR, 0x3, false);
    special.es = special.ds;
    special.fs = special.ds;
    special.gs = special.ds;
    special.ss = special.ds;
    special.tr = kvm_segment { s: 0, g: 0, limit: 0xffff, ..segment(TASK_SELECTOR, 0xb, false) };
    special.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
    special.cr3 = layout::PAGE_TABLES;
    special.cr4 = CR4_PAE;
    special.efer = EFER_LONG_MODE;
    vcpu.set_sregs(&special).map_err(failed("set the special registers"))?;
    let registers = kvm_regs {
        rflags: 2,
        rip: entry,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::BOOT_PARAMS,
        ..Default::default()
    };
    vcpu.set_regs(&registers).map_err(failed("set the registers"))
}

fn segment(selector: u16, kind: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

/// Registers that every processor starts with: memory is cached, and on Intel, string
/// instructions are fast.
pub fn set_msrs(vcpu: &VcpuFd, id: u8, intel: bool) -> Result<(), CpuError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let mut entries = vec![entry(MSR_MTRR_DEFAULT, MTRR_WRITE_BACK)];
    if intel {
        entries.push(entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING));
    }
    let unset = |index: usize| CpuError::Msr { register: entries.get(index).map_or(0, |entry| entry.index), id };
    let msrs = Msrs::from_entries(&entries).map_err(|_| unset(0))?;
    let set = vcpu.set_msrs(&msrs).map_err(|source| CpuError::Kvm {
        what: "set the machine-specific registers",
        id,
        source,
    })?;
    if set == entries.len() { Ok(()) } else { Err(unset(set)) }
}
