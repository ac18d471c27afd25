//! The kernel's random number generator, of which the clones of one guest start with the same.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::error::{Error, Result};

const DEVICE: &str = "/dev/urandom";
/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of linux/random.h.
const ADD: libc::Ioctl = 0x4008_5203;
const RESEED: libc::Ioctl = 0x5207;
/// Most bytes taken at once.
const LIMIT: usize = 256;

/// `struct rand_pool_info`.
#[repr(C)]
struct Pool {
    bits: libc::c_int,
    bytes: libc::c_int,
    data: [u8; LIMIT],
}

/// Mixes `entropy`, as random as it is long, into the pool, and lets the generator start over
/// from there: nothing that it gives from now on depends on what it was before alone. No entropy
/// changes nothing.
///
/// # Errors
/// There is more than 256 bytes, or the kernel refuses.
pub fn start_over(entropy: &[u8]) -> Result<()> {
    if entropy.is_empty() {
        return Ok(());
    }
    let mut pool = Pool { bits: 0, bytes: 0, data: [0; LIMIT] };
    let Some(data) = pool.data.get_mut(..entropy.len()) else {
        return Err(Error::invalid("entropy", format!("{} bytes, at most {LIMIT} are taken", entropy.len())));
    };
    data.copy_from_slice(entropy);
    pool.bytes = entropy.len() as libc::c_int;
    pool.bits = pool.bytes * 8;
    let device = File::open(DEVICE).map_err(Error::path("open", DEVICE))?;
    // SAFETY: the request reads the two counts and `bytes` bytes after them, which `pool` has.
    let added = unsafe { libc::ioctl(device.as_raw_fd(), ADD, &raw const pool) };
    // SAFETY: the request takes no argument.
    if added != 0 || unsafe { libc::ioctl(device.as_raw_fd(), RESEED) } != 0 {
        return Err(Error::system("start the random number generator over")(io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_takes_what_it_is_given() {
        start_over(&[]).unwrap();
        // The machine that tests run on takes it as well, from root.
        start_over(&[7; 32]).unwrap();
        assert!(start_over(&[7; LIMIT + 1]).unwrap_err().to_string().contains("entropy"));
    }
}
