//! The tap: a host's network interface whose cable ends here.

use std::ffi::c_uint;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

use super::HEADER_SIZE;

/// The device of all taps: character device 10, 200.
const TUN_DEVICE: u64 = libc::makedev(10, 200);
/// Frames with their Ethernet header, without another one before it, with virtio's.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// What every kernel since 2.6.33 can leave to the other side of a tap.
const OFFLOADS: c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
/// Segmentation of UDP, for both families at once: Linux 6.2.
const USO: c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;
/// The feature bits of it (virtio 1.3, section 5.1.3): newer than the bindings.
const VIRTIO_NET_F_GUEST_USO4: u32 = 54;
const VIRTIO_NET_F_GUEST_USO6: u32 = 55;
const VIRTIO_NET_F_HOST_USO: u32 = 56;

/// Why a descriptor is no tap that a guest can have.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is something else.
    #[error("the descriptor is no tap: open /dev/net/tun and attach it to an interface (TUNSETIFF)")]
    NotATap,
    /// It was made in a way that does not fit.
    #[error("the tap has the flags {0:#x}: make it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Flags(i32),
    /// The kernel refused.
    #[error("cannot {what} the tap")]
    Setup {
        /// The step.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A tap with virtio's headers. Reading and writing never wait.
#[derive(Debug)]
pub struct Tap {
    file: File,
    segments_udp: bool,
}

impl Tap {
    /// Takes over a descriptor of `/dev/net/tun` that is attached to an interface.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        let failed = |what| move |source| TapError::Setup { what, source };
        let metadata = file.metadata().map_err(failed("look at"))?;
        if !metadata.file_type().is_char_device() || metadata.rdev() != TUN_DEVICE {
            return Err(TapError::NotATap);
        }
        // SAFETY: an interface request of zeros is a valid one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the request is written to one interface request, which outlives the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) } != 0 {
            return Err(TapError::NotATap);
        }
        // SAFETY: the kernel has set the flags.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags }) & 0xffff;
        if flags & (libc::IFF_TUN | FLAGS) != FLAGS {
            return Err(TapError::Flags(flags));
        }
        let header = HEADER_SIZE as libc::c_int;
        // SAFETY: the request reads one int, which outlives the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) } != 0 {
            return Err(failed("set the length of the headers of")(io::Error::last_os_error()));
        }
        // Virtio 1.0 is little-endian; so is every x86 host, whose taps follow by default.
        let flags = fcntl_getfl(&file).map_err(|error| failed("look at")(error.into()))?;
        fcntl_setfl(&file, flags | OFlags::NONBLOCK).map_err(|error| failed("set up")(error.into()))?;
        let mut tap = Self { file, segments_udp: false };
        tap.segments_udp = tap.set_offloads(OFFLOADS | USO).is_ok();
        tap.set_offloads(0).map_err(failed("set the offloads of"))?;
        Ok(tap)
    }

    /// The features that the tap can do on behalf of the device.
    pub fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_GUEST_ECN
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_HOST_ECN;
        if self.segments_udp {
            features |= 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6 | 1 << VIRTIO_NET_F_HOST_USO;
        }
        features
    }

    /// Leaves to the guest what it agreed to do; the rest is done before a packet gets here.
    pub fn negotiate(&self, features: u64) -> io::Result<()> {
        let has = |feature: u32| features & (1 << feature) != 0;
        let mut offloads = 0;
        // Without checksums the kernel refuses the rest.
        if has(VIRTIO_NET_F_GUEST_CSUM) {
            offloads |= libc::TUN_F_CSUM;
            for (feature, offload) in
                [(VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4), (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6)]
            {
                if has(feature) {
                    offloads |= offload;
                }
            }
            if has(VIRTIO_NET_F_GUEST_ECN) && offloads != libc::TUN_F_CSUM {
                offloads |= libc::TUN_F_TSO_ECN;
            }
            // The kernel knows both or none.
            if has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6) && self.segments_udp {
                offloads |= USO;
            }
        }
        self.set_offloads(offloads)
    }

    fn set_offloads(&self, offloads: c_uint) -> io::Result<()> {
        // SAFETY: the request takes a number.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Reads one packet with its header. Returns its length.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        rustix::io::retry_on_intr(|| rustix::io::read(&self.file, &mut *buffer)).map_err(Into::into)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
