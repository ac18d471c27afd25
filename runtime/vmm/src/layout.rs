//! Where things lie in the guest's physical memory and I/O port space.
//!
//! ```text
//! 0x0000_0500  GDT, and an empty IDT                     (boot processor only)
//! 0x0000_7000  boot_params, the "zero page"
//! 0x0000_8000  boot stack, growing down from 0x9000
//! 0x0000_9000  page tables: identity map of the first GiB
//! 0x0002_0000  kernel command line, then setup_data
//! 0x0009_f000  MP configuration table; its floating pointer at 0x9fc00
//! 0x0010_0000  kernel (where its program headers say); behind it the initramfs
//! 0xc000_0000  PCI memory window, to 0xfec0_0000
//! 0xfee0_0000  local APICs
//! 0x1_0000_0000  memory beyond 3 GiB
//! ```

/// Global descriptor table of the boot processor.
pub const GDT: u64 = 0x500;
/// Interrupt descriptor table of the boot processor: empty.
pub const IDT: u64 = 0x540;
/// `boot_params`.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Top of the boot stack.
pub const BOOT_STACK: u64 = 0x9000;
/// Page map level 4; the tables below it follow in the next pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line with its terminating zero, the limit of the kernel itself.
pub const COMMAND_LINE_SIZE: u64 = 2048;
/// `setup_data` entries.
pub const SETUP_DATA: u64 = 0x2_1000;
/// First byte of the reserved range at the end of conventional memory.
pub const CONVENTIONAL_END: u64 = 0x9_f000;
/// MP configuration table.
pub const MP_TABLE: u64 = CONVENTIONAL_END;
/// MP floating pointer, in the last KiB of conventional memory, where kernels look.
pub const MP_FLOATING_POINTER: u64 = 0x9_fc00;
/// Start of memory above the legacy hole.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Start of the PCI memory window: memory ends here or goes on at [`ABOVE_4G`].
pub const PCI_WINDOW: u64 = 0xc000_0000;
/// End of the PCI memory window.
pub const PCI_WINDOW_END: u64 = 0xfec0_0000;
/// The local APICs' registers.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Three pages that KVM needs on some Intel processors, and the one after for its identity map.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// See [`KVM_TSS`].
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Where the memory goes on that does not fit below [`PCI_WINDOW`].
pub const ABOVE_4G: u64 = 0x1_0000_0000;

/// First serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Keyboard controller: only its reset command exists.
pub const KEYBOARD_PORT: u16 = 0x64;
/// PCI configuration address and data, 4 bytes each.
pub const PCI_CONFIG_ADDRESS: u16 = 0xcf8;
/// See [`PCI_CONFIG_ADDRESS`].
pub const PCI_CONFIG_DATA: u16 = 0xcfc;
/// First I/O port of the PCI devices.
pub const PCI_PORTS: u16 = 0x1000;
