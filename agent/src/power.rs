//! The end of the guest.

use std::io;

use nacelle_proto::power;
use rustix::system::{RebootCommand, reboot};

/// Ends the machine. Returns only if neither the VMM nor the kernel does so.
pub fn off() -> io::Error {
    tell_vmm();
    // Another VMM than ours, or a kernel without I/O ports for us: a reset by the keyboard
    // controller makes most machine monitors exit.
    match reboot(RebootCommand::Restart) {
        Ok(()) => io::Error::other("the kernel returned from a reset"),
        Err(error) => error.into(),
    }
}

#[cfg(target_arch = "x86_64")]
fn tell_vmm() {
    // SAFETY: ioperm changes nothing but this thread's right to use one I/O port.
    let allowed = unsafe { libc::ioperm(power::PORT.into(), 1, 1) } == 0;
    if allowed {
        // SAFETY: the kernel just allowed this port to this thread; no PC device claims
        // it, and the instruction touches no memory.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") power::PORT, in("al") power::OFF, options(nomem, nostack, preserves_flags));
        }
    }
}
