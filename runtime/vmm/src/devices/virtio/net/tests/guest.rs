//! A guest with an interface, and the wire at its other end.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::devices::virtio::device::{DeviceError, VirtioDevice};
use crate::devices::virtio::net::{HEADER_SIZE, Net, Tap};
use crate::devices::virtio::testing::{Driver, FEATURES, Interrupts, activation, memory, readable, writable};

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// `VIRTIO_NET_F_MRG_RXBUF`.
pub const MERGEABLE: u64 = 1 << 15;
/// A type of frame that no stack has a use for.
const EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];
const RECEIVE_BASE: u64 = 0x10_0000;
const TRANSMIT_BASE: u64 = 0x30_0000;
/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The end of a tap's cable: sends to and hears from the guest.
pub struct Wire {
    socket: OwnedFd,
    /// A netlink socket of its namespace, and the tap's number there.
    routes: OwnedFd,
    index: libc::c_int,
}

impl Wire {
    /// A tap in a network namespace of its own, and its other end. None where that cannot
    /// be made.
    pub fn new() -> Option<(OwnedFd, Self)> {
        let made = std::thread::spawn(|| {
            // SAFETY: the thread ends here and shares no state that a network namespace holds.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
            let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
            let mut request = named(b"tap");
            request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
            ioctl(&tun, libc::TUNSETIFF, &mut request)?;
            let control =
                std::net::UdpSocket::bind("127.0.0.1:0").or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0"))?;
            std::fs::write("/proc/sys/net/ipv6/conf/tap/disable_ipv6", "1").ok();
            request.ifr_ifru.ifru_mtu = 65_000;
            ioctl(&control, libc::SIOCSIFMTU, &mut request)?;
            request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
            ioctl(&control, libc::SIOCSIFFLAGS, &mut request)?;
            ioctl(&control, libc::SIOCGIFINDEX, &mut request)?;
            // SAFETY: the kernel has set the index.
            let index = unsafe { request.ifr_ifru.ifru_ifindex };
            // NETLINK_ROUTE is the first of its protocols.
            let routes = rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
            io::Result::Ok((OwnedFd::from(tun), Self { socket: packet_socket(index)?, routes, index }))
        });
        match made.join().unwrap() {
            Ok(made) => Some(made),
            Err(error) => {
                eprintln!("skipped: this machine gives no tap ({error})");
                None
            }
        }
    }

    /// Removes the tap's interface, as the end of a pod's network does.
    pub fn cut(&self) {
        // RTM_DELLINK with NLM_F_REQUEST and NLM_F_ACK, of an interface by its number (rtnetlink(7)).
        let mut message = [0; 32];
        message[..4].copy_from_slice(&32_u32.to_ne_bytes());
        message[4..6].copy_from_slice(&17_u16.to_ne_bytes());
        message[6..8].copy_from_slice(&5_u16.to_ne_bytes());
        message[20..24].copy_from_slice(&self.index.to_ne_bytes());
        assert_eq!(rustix::net::send(&self.routes, &message, SendFlags::empty()).unwrap(), message.len());
        let mut answer = [0; 256];
        rustix::net::recv(&self.routes, &mut answer[..], RecvFlags::empty()).unwrap();
        // NLMSG_ERROR with the number of none.
        assert_eq!((answer[4], &answer[16..20]), (2, &[0; 4][..]));
    }

    /// Sends a frame towards the guest.
    pub fn send(&self, frame: &[u8]) {
        assert_eq!(rustix::io::write(&self.socket, frame).unwrap(), frame.len());
    }

    /// The next frame from the guest.
    pub fn receive(&self) -> Vec<u8> {
        assert!(readable_soon(&self.socket), "no frame");
        let mut frame = vec![0; 70_000];
        let length = rustix::io::read(&self.socket, &mut frame[..]).unwrap();
        frame.truncate(length);
        frame
    }
}

fn named(name: &[u8]) -> libc::ifreq {
    // SAFETY: an interface request of zeros is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    request
}

fn ioctl(fd: &impl AsRawFd, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the calls here read and write one interface request.
    if unsafe { libc::ioctl(fd.as_raw_fd(), number, request) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn packet_socket(index: libc::c_int) -> io::Result<OwnedFd> {
    let protocol = u16::from_ne_bytes(EXPERIMENTAL);
    // SAFETY: the call takes numbers; the descriptor it returns is nobody else's.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::c_int::from(protocol));
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: an address of zeros is a valid one.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index;
    let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is of that size and outlives the call.
    match unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits for input, as long as patience lasts.
pub fn readable_soon(fd: &impl AsFd) -> bool {
    ready(fd, PATIENCE)
}

/// Whether there is input now.
pub fn readable_now(fd: &impl AsFd) -> bool {
    ready(fd, Duration::ZERO)
}

fn ready(fd: &impl AsFd, limit: Duration) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: 0 };
    poll(&mut fds, Some(&limit)).unwrap() > 0
}

/// A frame to or from the guest, of `length` bytes that differ.
pub fn frame(length: usize) -> Vec<u8> {
    let mut frame = [[0xff; 6], MAC].concat();
    frame.extend(EXPERIMENTAL);
    frame.extend((frame.len()..length).map(|at| (at * 7 % 251) as u8));
    frame
}

pub struct Guest {
    pub net: Net,
    pub memory: GuestMemoryMmap,
    pub to_guest: Driver,
    pub from_guest: Driver,
    pub interrupts: Arc<Interrupts>,
    buffers: HashMap<u16, (u64, u32)>,
    next: u64,
    features: u64,
}

impl Guest {
    pub fn new(tap: OwnedFd, features: u64) -> Self {
        let net = Net::new(Tap::new(tap).unwrap(), MAC, 1500).unwrap();
        let memory = memory(0x80_0000);
        let mut guest = Self {
            net,
            to_guest: Driver::new(&memory, 0x1000, 256),
            from_guest: Driver::new(&memory, 0x8000, 256),
            memory,
            interrupts: Arc::default(),
            buffers: HashMap::new(),
            next: RECEIVE_BASE,
            features,
        };
        guest.activate().unwrap();
        guest
    }

    /// Gets the device ready, with the queues as they are.
    ///
    /// # Errors
    /// Those of the device.
    pub fn activate(&mut self) -> Result<(), DeviceError> {
        let queues = [&self.to_guest, &self.from_guest];
        let activation = activation(&self.memory, &queues, FEATURES | self.features, &self.interrupts);
        self.net.activate(activation)
    }

    /// Gives the device buffers to fill, and tells it.
    pub fn offer(&mut self, sizes: &[u32]) {
        for size in sizes {
            let head = self.to_guest.add(&[writable(self.next, *size)]);
            self.buffers.insert(head, (self.next, *size));
            self.next += u64::from(*size);
        }
        self.net.queue_notified(0).unwrap();
    }

    /// Sends a packet: header and frame in buffers of these sizes, the last holding the rest.
    pub fn send(&mut self, frame: &[u8], sizes: &[usize]) {
        let packet = [&[0; HEADER_SIZE], frame].concat();
        self.memory.write_slice(&packet, GuestAddress(TRANSMIT_BASE)).unwrap();
        let (mut at, mut buffers) = (0, Vec::new());
        for size in sizes.iter().copied().chain([usize::MAX]) {
            let size = size.min(packet.len() - at);
            if size > 0 {
                buffers.push(readable(TRANSMIT_BASE + at as u64, size as u32));
            }
            at += size;
        }
        self.from_guest.add(&buffers);
        self.net.queue_notified(1).unwrap();
        assert!(self.from_guest.take().is_some(), "the buffers come back");
    }

    /// Lets the device do what it waits for.
    pub fn poll(&mut self) {
        assert!(readable_soon(&self.net.poll_fd().unwrap()), "the device waits for nothing");
        self.net.poll_ready().unwrap();
    }

    /// The next packet: its frame, and in how many buffers it lay.
    pub fn receive(&mut self) -> Option<(Vec<u8>, usize)> {
        let mut packet = Vec::new();
        let mut count = 1;
        let mut seen = 0;
        while seen < count {
            let (head, written) = self.to_guest.take()?;
            let (at, size) = self.buffers.remove(&head).unwrap();
            assert!(written <= size);
            let mut bytes = vec![0; written as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            packet.extend(bytes);
            seen += 1;
            if seen == 1 && packet.len() >= HEADER_SIZE {
                count = usize::from(u16::from_le_bytes([packet[10], packet[11]]));
            }
        }
        Some((packet.split_off(HEADER_SIZE.min(packet.len())), count))
    }
}
