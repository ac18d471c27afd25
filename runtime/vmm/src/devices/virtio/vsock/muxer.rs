//! All streams of the device: which packet belongs to whom, and whose turn it is.

use std::collections::{HashMap, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::connection::{Connection, Key, Output, Verdict};
use super::credit::CreditPool;
use super::host::{Handshake, Listener, VsockError};
use super::metrics::VsockMetrics;
use super::packet::{GUEST_CID, HOST_CID, Header, TYPE_STREAM, op};
use crate::acceptor::Acceptor;
use crate::devices::virtio::chain::GuestBytes;
use crate::timer::Timer;

mod clients;

/// The most connections at a time, those that are being made or ended included. More are
/// refused.
pub const CONNECTIONS_LIMIT: usize = 1024;
/// The most resets that wait for the guest to fetch them.
pub const RESETS_LIMIT: usize = 2048;
/// Events taken in one go.
const EVENT_BATCH: usize = 64;
/// The host's ports: far from those that services have.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const OTHER: u64 = u64::MAX - 2;

/// A client, before and after it said which port it wants.
#[derive(Debug)]
enum Endpoint {
    Handshake(Handshake),
    Connection(Box<Connection>),
}

/// A place for an endpoint.
#[derive(Debug, Default)]
struct Slot {
    /// How many endpoints were here, so that an event of one is not taken for another's.
    generation: u32,
    endpoint: Option<Endpoint>,
    /// Whether it waits for its turn to send to the guest.
    queued: bool,
    /// Whether its socket tells when it takes data again.
    watches_writable: bool,
}

/// A reset to be sent to the guest.
#[derive(Debug, Clone, Copy)]
struct Reset {
    from_cid: u64,
    kind: u16,
    key: Key,
}

/// The streams.
#[derive(Debug)]
pub struct Muxer {
    epoll: OwnedFd,
    listener: Acceptor<Listener>,
    timer: Timer,
    slots: Vec<Slot>,
    free: Vec<usize>,
    keys: HashMap<Key, usize>,
    /// Who may have something for the guest, in the order of their turns.
    ready: VecDeque<usize>,
    resets: VecDeque<Reset>,
    next_port: u32,
    credit: CreditPool,
    active: bool,
    metrics: Arc<VsockMetrics>,
}

impl Muxer {
    /// Takes in the clients of `listener`. `other` wakes the device up as well.
    pub fn new(listener: Listener, other: BorrowedFd<'_>, metrics: Arc<VsockMetrics>) -> Result<Self, VsockError> {
        let events = |error: rustix::io::Errno| VsockError::Events(error.into());
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(events)?;
        let timer = Timer::new().map_err(VsockError::Events)?;
        let listener = Acceptor::new(listener).map_err(VsockError::Events)?;
        for (fd, data) in [(listener.as_fd(), LISTENER), (timer.as_fd(), TIMER), (other, OTHER)] {
            epoll::add(&epoll, fd, EventData::new_u64(data), EventFlags::IN).map_err(events)?;
        }
        Ok(Self {
            epoll,
            listener,
            timer,
            slots: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            credit: CreditPool::new(),
            active: false,
            metrics,
        })
    }

    /// Readable when [`Muxer::poll`] has something to do.
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// The host port that the next connection gets, if it is free.
    pub fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Goes on with the ports of another.
    pub fn set_next_port(&mut self, port: u32) {
        self.next_port = port.clamp(FIRST_PORT, LAST_PORT);
    }

    /// The guest's driver is up: who waited for it is asked for now.
    pub fn activate(&mut self) {
        self.active = true;
        for index in 0..self.slots.len() {
            if let Some(connection) = self.connection(index) {
                if connection.is_requested() {
                    connection.start_waiting();
                }
                self.settle(index);
            }
        }
    }

    /// The guest's driver is gone: what it had is closed, who waits for it goes on waiting.
    pub fn reset(&mut self) {
        self.active = false;
        self.resets.clear();
        for index in 0..self.slots.len() {
            match self.connection(index) {
                Some(connection) if connection.is_requested() => {
                    connection.request_again();
                    self.settle(index);
                }
                Some(_) => self.remove(index),
                None => {}
            }
        }
    }

    /// Whether [`Muxer::output`] may have something.
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest. Its data, if any, goes to the front of `room`, which
    /// has space for at least one byte.
    pub fn output(&mut self, room: &mut GuestBytes<'_>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset.header());
        }
        while let Some(index) = self.ready.pop_front() {
            if let Some(slot) = self.slots.get_mut(index) {
                slot.queued = false;
            }
            let Some(connection) = self.connection(index) else { continue };
            let output = connection.output(room);
            let Key { host_port, guest_port } = connection.key();
            let (buf_alloc, fwd_cnt) = (connection.share(), connection.taken());
            match output {
                Output::Packet { op, flags, len } => {
                    VsockMetrics::count(&self.metrics.to_guest, u64::from(len));
                    self.settle(index);
                    return Some(Header {
                        src_cid: HOST_CID,
                        dst_cid: GUEST_CID,
                        src_port: host_port,
                        dst_port: guest_port,
                        len,
                        kind: TYPE_STREAM,
                        op,
                        flags,
                        buf_alloc,
                        fwd_cnt,
                    });
                }
                Output::Nothing => self.settle(index),
                Output::Reset => {
                    self.apply(index, Verdict::Reset);
                    return self.resets.pop_front().map(Reset::header);
                }
            }
        }
        None
    }

    /// Takes a packet from the guest.
    pub fn input(&mut self, header: &Header, data: &mut GuestBytes<'_>) {
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        if header.src_cid != GUEST_CID || header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            VsockMetrics::count(&self.metrics.bad_packets, 1);
            // Nobody else is within reach, so that answer comes from us. A sender who is not
            // the guest gets none.
            if header.src_cid == GUEST_CID && header.op != op::RST {
                self.send_reset(Reset { from_cid: header.dst_cid, kind: header.kind, key });
            }
            return;
        }
        match (self.keys.get(&key).copied(), header.op) {
            (known, op::REQUEST) => {
                if let Some(index) = known {
                    // The guest forgot about the old one, or else it would not use the port.
                    self.remove(index);
                }
                self.connect(key, header);
            }
            (None, op::RST) => {}
            (None, _) => self.send_reset(Reset { from_cid: HOST_CID, kind: TYPE_STREAM, key }),
            (Some(index), _) => {
                let metrics = self.metrics.clone();
                if let Some(connection) = self.connection(index) {
                    let verdict = connection.input(header, data, &metrics);
                    self.apply(index, verdict);
                }
            }
        }
    }

    /// Handles what the sockets and the timer have to tell. True if the device was woken up
    /// as well.
    pub fn poll(&mut self) -> bool {
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; EVENT_BATCH];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        // It is interrupted or has something; what is left makes the descriptor readable again.
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut events, Some(&now)) else { return false };
        let mut woken = false;
        for event in events {
            match event.data.u64() {
                LISTENER => self.accept(),
                TIMER => self.expire(),
                OTHER => woken = true,
                data => self.socket_event(data, event.flags),
            }
        }
        woken
    }

    /// Whether nothing is left of any stream.
    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
            && self.slots.iter().all(|slot| slot.endpoint.is_none() && !slot.queued)
            && self.keys.is_empty()
            && self.ready.is_empty()
            && self.credit.is_full()
    }

    /// How many wait for their turn.
    #[cfg(test)]
    pub fn ready_count(&self) -> usize {
        self.ready.len()
    }

    fn socket_event(&mut self, data: u64, flags: EventFlags) {
        let Ok(index) = usize::try_from(data & u64::from(u32::MAX)) else { return };
        let Some(slot) = self.slots.get_mut(index) else { return };
        if u64::from(slot.generation) != data >> 32 {
            return;
        }
        match &mut slot.endpoint {
            // It asked and left.
            Some(Endpoint::Handshake(_)) if flags.contains(EventFlags::HUP) => self.remove(index),
            Some(Endpoint::Handshake(handshake)) => {
                let progress = handshake.advance();
                self.handshake(index, progress);
            }
            Some(Endpoint::Connection(connection)) => {
                let mut verdict = Verdict::Keep;
                if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::ERR) {
                    connection.host_readable();
                }
                if flags.contains(EventFlags::HUP) {
                    verdict = connection.host_hung_up();
                } else if flags.contains(EventFlags::OUT) {
                    verdict = connection.host_writable();
                }
                self.apply(index, verdict);
            }
            None => {}
        }
    }

    /// Finds a place for an endpoint and watches its socket. None if there are too many.
    fn insert(&mut self, endpoint: Endpoint) -> Option<usize> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < CONNECTIONS_LIMIT => {
                self.slots.push(Slot::default());
                self.slots.len() - 1
            }
            None => {
                VsockMetrics::count(&self.metrics.refused, 1);
                self.forget(&endpoint);
                return None;
            }
        };
        let slot = self.slots.get_mut(index)?;
        let data = EventData::new_u64(u64::from(slot.generation) << 32 | index as u64);
        if epoll::add(&self.epoll, endpoint.stream(), data, watched(false)).is_err() {
            self.free.push(index);
            self.forget(&endpoint);
            return None;
        }
        slot.endpoint = Some(endpoint);
        slot.watches_writable = false;
        Some(index)
    }

    fn connection(&mut self, index: usize) -> Option<&mut Connection> {
        match self.slots.get_mut(index)?.endpoint.as_mut()? {
            Endpoint::Connection(connection) => Some(connection),
            Endpoint::Handshake(_) => None,
        }
    }

    /// Does to a stream what became of it.
    fn apply(&mut self, index: usize, verdict: Verdict) {
        let Some(key) = self.connection(index).map(|connection| connection.key()) else { return };
        if matches!(verdict, Verdict::Reset | Verdict::Drain) {
            self.send_reset(Reset { from_cid: HOST_CID, kind: TYPE_STREAM, key });
        }
        match verdict {
            Verdict::Keep => self.settle(index),
            Verdict::Drain | Verdict::DrainSilently => {
                self.keys.remove(&key);
                self.settle(index);
            }
            Verdict::Reset | Verdict::Remove => self.remove(index),
        }
    }

    /// Gives a stream its turn, its events and its deadline as its state asks for.
    fn settle(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Some(Endpoint::Connection(connection)) = &slot.endpoint else { return };
        if connection.has_output() && !slot.queued {
            slot.queued = true;
            self.ready.push_back(index);
        }
        let wants_writable = connection.wants_writable();
        if wants_writable != slot.watches_writable {
            let data = EventData::new_u64(u64::from(slot.generation) << 32 | index as u64);
            // It cannot fail for lack of anything: the socket is watched already.
            if epoll::modify(&self.epoll, connection.stream(), data, watched(wants_writable)).is_ok() {
                slot.watches_writable = wants_writable;
            }
        }
        if let Some(deadline) = connection.deadline() {
            self.timer.arm(deadline);
        }
    }

    /// Ends an endpoint. Its socket closes, and is no longer watched.
    fn remove(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Some(endpoint) = slot.endpoint.take() else { return };
        slot.generation = slot.generation.wrapping_add(1);
        if std::mem::take(&mut slot.queued) {
            // A guest that fetches nothing must not make the queue grow.
            self.ready.retain(|ready| *ready != index);
        }
        self.free.push(index);
        if let Endpoint::Connection(connection) = &endpoint
            && self.keys.get(&connection.key()) == Some(&index)
        {
            self.keys.remove(&connection.key());
        }
        self.forget(&endpoint);
    }

    fn forget(&mut self, endpoint: &Endpoint) {
        if let Endpoint::Connection(connection) = endpoint {
            self.credit.give_back(connection.share());
        }
    }

    fn send_reset(&mut self, reset: Reset) {
        if self.resets.len() < RESETS_LIMIT {
            self.resets.push_back(reset);
        } else {
            VsockMetrics::count(&self.metrics.dropped_resets, 1);
        }
    }

    /// Ends what did not get on in time.
    fn expire(&mut self) {
        self.timer.expired();
        let now = Instant::now();
        let mut earliest = None::<Instant>;
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots.get(index) else { continue };
            let Some(endpoint) = &slot.endpoint else { continue };
            let Some(deadline) = endpoint.deadline() else { continue };
            if deadline > now {
                earliest = Some(earliest.map_or(deadline, |earliest| earliest.min(deadline)));
                continue;
            }
            VsockMetrics::count(&self.metrics.timed_out, 1);
            match endpoint {
                Endpoint::Handshake(_) => self.remove(index),
                Endpoint::Connection(connection) => {
                    let verdict = connection.timed_out();
                    self.apply(index, verdict);
                }
            }
        }
        if let Some(earliest) = earliest {
            self.timer.arm(earliest);
        }
    }
}

impl Endpoint {
    fn stream(&self) -> &UnixStream {
        match self {
            Self::Handshake(handshake) => &handshake.stream,
            Self::Connection(connection) => connection.stream(),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Handshake(handshake) => Some(handshake.deadline),
            Self::Connection(connection) => connection.deadline(),
        }
    }
}

impl Reset {
    fn header(self) -> Header {
        Header {
            src_cid: self.from_cid,
            dst_cid: GUEST_CID,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            kind: self.kind,
            op: op::RST,
            ..Header::default()
        }
    }
}

/// What a socket tells of, once each time it changes, so that a stream which cannot be
/// served for now does not keep the loop busy.
fn watched(writable: bool) -> EventFlags {
    let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
    if writable { flags | EventFlags::OUT } else { flags }
}
