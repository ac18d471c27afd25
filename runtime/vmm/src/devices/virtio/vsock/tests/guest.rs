//! A guest for the tests: a driver with its three queues, and sockets that keep to the
//! credit they are given, as Linux does.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::devices::virtio::device::{DeviceError, VirtioDevice};
use crate::devices::virtio::testing::{Driver, FEATURES, Interrupts, activation, memory, readable, writable};
use crate::devices::virtio::vsock::host::Listener;
use crate::devices::virtio::vsock::packet::{
    GUEST_CID, HEADER_SIZE, HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use crate::devices::virtio::vsock::{Vsock, VsockState};

/// What Linux fits into a page.
pub const RX_BUFFER: u32 = 3776;
const RX_BASE: u64 = 0x10_0000;
const TX_BASE: u64 = 0x20_0000;
const TX_BUFFER: u64 = 0x1_1000;
const TX_BUFFERS: u64 = 32;
/// What Linux gives a socket.
pub const ROOM: u32 = 256 * 1024;
/// How long anything in these tests may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// One of the guest's sockets.
#[derive(Debug, Default)]
pub struct Socket {
    pub room: u32,
    pub taken: u32,
    pub told: u32,
    pub given: u32,
    pub peer_room: u32,
    pub peer_taken: u32,
    pub received: VecDeque<u8>,
    pub open: bool,
    pub reset: bool,
    /// The flags of the shutdowns that came.
    pub shutdown: u32,
    pub credit_requests: u32,
}

/// Guest port and host port.
pub type Ports = (u32, u32);

pub struct Guest {
    pub vsock: Vsock,
    pub memory: GuestMemoryMmap,
    pub to_guest: Driver,
    pub from_guest: Driver,
    pub events: Driver,
    pub interrupts: Arc<Interrupts>,
    pub sockets: BTreeMap<Ports, Socket>,
    pub listening: BTreeSet<u32>,
    /// Ports whose requests are left without an answer.
    pub ignored: BTreeSet<u32>,
    pub packets: Vec<Header>,
    /// Does not complain about streams that its own nonsense broke.
    pub lenient: bool,
    rx: HashMap<u16, u64>,
    tx_free: Vec<u64>,
    tx_busy: HashMap<u16, u64>,
    pub directory: TempDir,
}

impl Guest {
    pub fn new() -> Self {
        let mut guest = Self::inactive(None);
        guest.activate().unwrap();
        guest.offer_buffers(128);
        guest
    }

    pub fn inactive(state: Option<&VsockState>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let vsock = match state {
            Some(state) => Vsock::restore(Listener::new(&path).unwrap(), state).unwrap(),
            None => Vsock::new(Listener::new(&path).unwrap()).unwrap(),
        };
        let memory = memory(0x50_0000);
        Self {
            vsock,
            to_guest: Driver::new(&memory, 0x1000, 128),
            from_guest: Driver::new(&memory, 0x3000, 128),
            events: Driver::new(&memory, 0x5000, 8),
            memory,
            interrupts: Arc::default(),
            sockets: BTreeMap::new(),
            listening: BTreeSet::new(),
            ignored: BTreeSet::new(),
            packets: Vec::new(),
            lenient: false,
            rx: HashMap::new(),
            tx_free: (0..TX_BUFFERS).map(|index| TX_BASE + index * TX_BUFFER).collect(),
            tx_busy: HashMap::new(),
            directory,
        }
    }

    pub fn activate(&mut self) -> Result<(), DeviceError> {
        let queues = [&self.to_guest, &self.from_guest, &self.events];
        self.vsock.activate(activation(&self.memory, &queues, FEATURES, &self.interrupts))
    }

    /// Resets the device and takes it again, with new queues.
    pub fn restart(&mut self) {
        self.vsock.reset();
        self.sockets.clear();
        self.packets.clear();
        self.rx.clear();
        self.tx_busy.clear();
        self.tx_free = (0..TX_BUFFERS).map(|index| TX_BASE + index * TX_BUFFER).collect();
        self.to_guest = Driver::new(&self.memory, 0x1000, 128);
        self.from_guest = Driver::new(&self.memory, 0x3000, 128);
        self.events = Driver::new(&self.memory, 0x5000, 8);
        self.activate().unwrap();
        self.offer_buffers(128);
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("v")
    }

    pub fn listener_path(&self, port: u32) -> PathBuf {
        self.directory.path().join(format!("v_{port}"))
    }

    /// Gives the device `count` buffers to fill.
    pub fn offer_buffers(&mut self, count: usize) {
        for _ in 0..count.min(self.to_guest.free()) {
            let address = RX_BASE + 4096 * self.rx.len() as u64;
            let head = self.to_guest.add(&[writable(address, RX_BUFFER)]);
            self.rx.insert(head, address);
        }
        if self.to_guest.wants_notification(count as u16) {
            self.vsock.queue_notified(0).unwrap();
        }
    }

    /// A header of a packet from the guest.
    pub fn header(ports: Ports, op: u16) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: ports.0,
            dst_port: ports.1,
            kind: TYPE_STREAM,
            op,
            buf_alloc: ROOM,
            ..Header::default()
        }
    }

    /// Sends a packet whatever it says.
    pub fn send_raw(&mut self, header: Header, data: &[u8]) -> Result<(), DeviceError> {
        while let Some((head, _)) = self.from_guest.take() {
            self.tx_free.extend(self.tx_busy.remove(&head));
        }
        let address = self.tx_free.pop().unwrap();
        self.memory.write_slice(&header.to_bytes(), GuestAddress(address)).unwrap();
        self.memory.write_slice(data, GuestAddress(address + 0x100)).unwrap();
        let mut chain = vec![readable(address, HEADER_SIZE as u32)];
        if !data.is_empty() {
            chain.push(readable(address + 0x100, data.len() as u32));
        }
        let head = self.from_guest.add(&chain);
        self.tx_busy.insert(head, address);
        if self.from_guest.wants_notification(1) { self.vsock.queue_notified(1) } else { Ok(()) }
    }

    /// Sends a packet of a socket, with its credit.
    pub fn send(&mut self, ports: Ports, op: u16, flags: u32, data: &[u8]) {
        let mut header = Self::header(ports, op);
        header.flags = flags;
        header.len = data.len() as u32;
        if let Some(socket) = self.sockets.get_mut(&ports) {
            header.buf_alloc = socket.room;
            header.fwd_cnt = socket.taken;
            socket.told = socket.taken;
            socket.given = socket.given.wrapping_add(header.len);
        }
        self.send_raw(header, data).unwrap();
    }

    /// Asks the host for a connection.
    pub fn connect(&mut self, ports: Ports) {
        self.sockets.insert(ports, Socket { room: ROOM, ..Socket::default() });
        self.send(ports, op::REQUEST, 0, &[]);
    }

    /// Writes as much as there is credit for, in packets as large as Linux'.
    pub fn write(&mut self, ports: Ports, data: &[u8]) -> usize {
        let mut written = 0;
        while written < data.len() {
            let socket = &self.sockets[&ports];
            let credit = socket.peer_room.saturating_sub(socket.given.wrapping_sub(socket.peer_taken)) as usize;
            let count = (data.len() - written).min(credit).min(64 * 1024);
            if count == 0 {
                break;
            }
            self.send(ports, op::RW, 0, &data[written..written + count]);
            written += count;
        }
        written
    }

    /// Reads up to `limit` bytes of what came, and tells of the room as Linux does.
    pub fn read(&mut self, ports: Ports, limit: usize) -> Vec<u8> {
        let Some(socket) = self.sockets.get_mut(&ports) else { return Vec::new() };
        let count = limit.min(socket.received.len());
        let data: Vec<u8> = socket.received.drain(..count).collect();
        socket.taken = socket.taken.wrapping_add(count as u32);
        let untold = socket.taken.wrapping_sub(socket.told);
        if untold > 0 && !socket.reset && (socket.room - untold < 64 * 1024 || socket.received.is_empty()) {
            self.send(ports, op::CREDIT_UPDATE, 0, &[]);
        }
        data
    }

    pub fn shut_down(&mut self, ports: Ports, flags: u32) {
        self.send(ports, op::SHUTDOWN, flags, &[]);
    }

    /// Lets the device and the guest's driver do what there is to do, and waits a little for
    /// it. True if a packet came.
    pub fn turn(&mut self) -> bool {
        let any = self.take_packets();
        let timeout = Timespec { tv_sec: 0, tv_nsec: if any { 0 } else { 5_000_000 } };
        let ready = {
            let fd = self.vsock.poll_fd().unwrap();
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
        };
        if ready {
            self.vsock.poll_ready().unwrap();
        }
        self.take_packets() || any
    }

    pub fn take_packets(&mut self) -> bool {
        let mut any = false;
        while let Some((head, written)) = self.to_guest.take() {
            any = true;
            let address = self.rx.remove(&head).unwrap();
            assert!((HEADER_SIZE as u32..=RX_BUFFER).contains(&written), "{written}");
            let mut bytes = [0; HEADER_SIZE];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            let header = Header::from_bytes(&bytes);
            assert_eq!(written, HEADER_SIZE as u32 + header.len);
            let mut data = vec![0; header.len as usize];
            self.memory.read_slice(&mut data, GuestAddress(address + HEADER_SIZE as u64)).unwrap();
            let head = self.to_guest.add(&[writable(address, RX_BUFFER)]);
            self.rx.insert(head, address);
            if self.to_guest.wants_notification(1) {
                self.vsock.queue_notified(0).unwrap();
            }
            self.packet(header, &data);
        }
        any
    }

    fn packet(&mut self, header: Header, data: &[u8]) {
        assert_eq!(header.dst_cid, GUEST_CID);
        self.packets.push(header);
        let ports = (header.dst_port, header.src_port);
        if header.op == op::REQUEST {
            if self.ignored.contains(&ports.0) {
                return;
            }
            let in_use = self.sockets.get(&ports).is_some_and(|socket| socket.open);
            assert!(self.lenient || !in_use, "{ports:?} is in use");
            if !self.listening.contains(&ports.0) {
                return self.send(ports, op::RST, 0, &[]);
            }
            let socket = Socket { room: ROOM, open: true, ..Socket::default() };
            self.sockets.insert(ports, socket);
            self.send(ports, op::RESPONSE, 0, &[]);
        }
        let Some(socket) = self.sockets.get_mut(&ports) else {
            if header.op != op::RST {
                self.send(ports, op::RST, 0, &[]);
            }
            return;
        };
        socket.peer_room = header.buf_alloc;
        socket.peer_taken = header.fwd_cnt;
        match header.op {
            op::RESPONSE => socket.open = true,
            op::RW => {
                assert!(self.lenient || socket.shutdown & SHUTDOWN_SEND == 0, "data after the end");
                socket.received.extend(data);
                let used = socket.received.len();
                assert!(self.lenient || used <= socket.room as usize, "{used} bytes in a room of {}", socket.room);
            }
            op::SHUTDOWN => {
                socket.shutdown |= header.flags;
                if socket.shutdown & SHUTDOWN_BOTH == SHUTDOWN_BOTH {
                    socket.reset = true;
                    self.send(ports, op::RST, 0, &[]);
                }
            }
            op::RST => {
                socket.reset = true;
                socket.open = false;
            }
            op::CREDIT_REQUEST => {
                socket.credit_requests += 1;
                self.send(ports, op::CREDIT_UPDATE, 0, &[]);
            }
            _ => {}
        }
    }

    /// Turns until `done`, which has to come true.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
            self.turn();
        }
    }

    /// Turns for a while, for what must not happen.
    pub fn settle(&mut self) {
        for _ in 0..4 {
            while self.turn() {}
        }
    }

    /// Whether a reset came for a stream.
    pub fn reset_of(&self, ports: Ports) -> bool {
        self.packets.iter().any(|header| header.op == op::RST && (header.dst_port, header.src_port) == ports)
    }
}

/// A host's connection to guest port `port`, once the guest accepted it.
pub fn connect(guest: &mut Guest, port: u32) -> (UnixStream, Ports) {
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let before: BTreeSet<_> = guest.sockets.keys().copied().collect();
    guest.until("the guest accepts", |guest| guest.sockets.keys().any(|ports| !before.contains(ports)));
    let ports = *guest.sockets.keys().find(|ports| !before.contains(ports)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(read_line(&stream), format!("OK {}\n", ports.1));
    guest.settle();
    (stream, ports)
}

/// One line, and not a byte more.
pub fn read_line(stream: &UnixStream) -> String {
    let mut line = Vec::new();
    let mut stream = stream;
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
        if byte[0] == b'\n' {
            break;
        }
    }
    String::from_utf8(line).unwrap()
}

/// What is left until the end of the stream.
pub fn read_rest(stream: &UnixStream) -> Vec<u8> {
    let mut rest = Vec::new();
    let mut stream = stream;
    stream.read_to_end(&mut rest).unwrap();
    rest
}

/// Bytes in which a lost, doubled or misplaced piece shows.
pub fn pattern(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut data = Vec::with_capacity(length);
    while data.len() < length {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        data.extend(state.to_le_bytes());
    }
    data.truncate(length);
    data
}
