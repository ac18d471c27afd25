//! Taps: the host's end of a guest's interface.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::{Error, Result};

const DEVICE: &str = "/dev/net/tun";

/// Makes a tap in the calling thread's network namespace. It is there as long as the
/// descriptor is open in any process.
///
/// Its frames have virtio's header before them, for whoever reads them to see what has been
/// left to it.
pub fn create(name: &str) -> Result<OwnedFd> {
    let file = File::options().read(true).write(true).open(DEVICE).map_err(Error::path("open", DEVICE))?;
    // SAFETY: an interface request of zeros is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL) as libc::c_short;
    // SAFETY: the request reads one interface request, which outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(Error::Interface {
            interface: name.into(),
            reason: format!("cannot be made: {}", io::Error::last_os_error()),
        });
    }
    Ok(file.into())
}
