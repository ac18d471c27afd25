//! What a machine starts from, on disk, with a kernel of a few instructions.

use std::path::PathBuf;

use nacelle_vmm::config::{MachineConfig, Start};
use tempfile::TempDir;

/// Where the code is loaded and entered.
const LOAD: u64 = 0x20_0000;

/// The machine code of some lines of assembler, for a guest that starts there in 64-bit
/// mode with the first GiB of memory mapped to itself.
macro_rules! code {
    ($($line:expr),*) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: the block computes the bounds of code that it jumps over.
        unsafe {
            std::arch::asm!(
                "lea {start}, [rip + 98f]",
                "lea {end}, [rip + 99f]",
                "jmp 99f",
                "98:",
                $($line,)*
                "99:",
                start = out(reg) start,
                end = out(reg) end,
                options(nomem, nostack, preserves_flags)
            );
            std::slice::from_raw_parts(start, end.offset_from(start) as usize)
        }
    }};
}
pub(crate) use code;

/// Everything that a machine needs, and nothing running.
pub struct Prepared {
    pub config: MachineConfig,
    pub directory: TempDir,
}

impl Prepared {
    pub fn new(code: &[u8]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| -> PathBuf { directory.path().join(name) };
        std::fs::write(path("kernel"), kernel(code)).unwrap();
        std::fs::write(path("initramfs"), b"070701 is all that is looked at").unwrap();
        let config = MachineConfig {
            id: "test".into(),
            kernel: path("kernel"),
            initramfs: path("initramfs"),
            cmdline: String::new(),
            memory_mib: 32,
            vcpus: 1,
            vsock: path("vsock"),
            control: path("control"),
            console: path("console"),
            start: Start::Boot,
        };
        Self { config, directory }
    }
}

/// An ELF file with `code` at its entry point.
fn kernel(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    let mut put = |offset: usize, bytes: &[u8]| file[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2_u16.to_le_bytes());
    put(18, &62_u16.to_le_bytes());
    put(24, &LOAD.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(54, &56_u16.to_le_bytes());
    put(56, &1_u16.to_le_bytes());
    put(64, &1_u32.to_le_bytes());
    put(72, &0x1000_u64.to_le_bytes());
    put(88, &LOAD.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64).to_le_bytes());
    file.extend_from_slice(code);
    file
}
