//! The end of the guest.

use std::io;

use nacelle_proto::power;
use rustix::system::{RebootCommand, reboot};

/// Tells the VMM that this is no crash, and resets the machine. Returns only if the
/// kernel refuses.
///
/// Without ACPI the kernel cannot power off; it resets by the keyboard controller
/// (`reboot=k`), which makes the VMM exit, just as it does after a crash. The write to
/// the port before it is what tells the two apart.
pub fn off() -> io::Error {
    announce();
    match reboot(RebootCommand::Restart) {
        Ok(()) => io::Error::other("the kernel returned from a reset"),
        Err(error) => error.into(),
    }
}

#[cfg(target_arch = "x86_64")]
fn announce() {
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
