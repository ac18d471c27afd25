//! One stream between a guest's socket and a host's: its two halves, how each ends, and how
//! much either side may send.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::buffer::ByteBuffer;
use super::host::confirm;
use super::metrics::VsockMetrics;
use super::packet::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::devices::virtio::chain::GuestBytes;

/// How long the guest has to answer a request. Clients have deadlines of their own, and take
/// the request back by leaving: this one is for those who forget. A guest may be a slow one.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 60 });
/// How long the guest has to confirm that a stream which ended is over.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the host may take none of what a guest left behind before it is thrown away.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(300);
/// The most data of one packet. Linux takes no more.
const PACKET_LIMIT: usize = 64 * 1024;

/// Names a stream: no two have both ports in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

/// Where a stream is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The guest was or will be asked.
    Requested,
    /// Data flows, in both halves or in one.
    Open,
    /// The guest was told that both halves ended and has to confirm.
    Closing,
    /// The guest is gone; the host gets what it left.
    Draining,
}

/// What becomes of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Keep,
    /// It goes on without the guest, who is told.
    Drain,
    /// It goes on without the guest, who knows.
    DrainSilently,
    /// It ends, and the guest is told.
    Reset,
    /// It ends.
    Remove,
}

/// What a stream has for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// A packet, its `len` bytes of data already in place.
    Packet {
        /// What it is for.
        op: u16,
        /// Flags of a shutdown.
        flags: u32,
        /// Bytes of data.
        len: u32,
    },
    /// Nothing for now.
    Nothing,
    /// The stream broke.
    Reset,
}

/// One stream.
#[derive(Debug)]
pub struct Connection {
    key: Key,
    stream: UnixStream,
    phase: Phase,
    deadline: Option<Instant>,
    /// The request or response that has to go out before all else.
    opening: Option<u16>,
    credit_update_due: bool,
    credit_request_due: bool,
    /// The flags of the last shutdown that was sent.
    told_shutdown: u32,

    /// The socket may have data for the guest.
    readable: bool,
    /// The host will send no more, and all it sent was passed on.
    host_ended: bool,
    /// The guest will receive no more.
    guest_deaf: bool,
    /// The guest's room, what it took out of it, and what was put in.
    guest_room: u32,
    guest_taken: u32,
    guest_given: u32,
    /// The guest was asked for its room since it last told.
    asked_for_credit: bool,

    /// What the host's socket did not take yet.
    buffer: ByteBuffer,
    /// The guest will send no more.
    guest_ended: bool,
    /// The host will receive no more.
    host_deaf: bool,
    /// Our room, what was taken out of it, and what the guest knows of that.
    share: u32,
    taken: u32,
    told_taken: u32,
}

impl Connection {
    fn new(key: Key, stream: UnixStream, share: u32, phase: Phase, opening: u16) -> Self {
        Self {
            key,
            stream,
            phase,
            deadline: None,
            opening: Some(opening),
            credit_update_due: false,
            credit_request_due: false,
            told_shutdown: 0,
            // The socket tells once that it has data, maybe before the guest could take it.
            readable: true,
            host_ended: false,
            guest_deaf: false,
            guest_room: 0,
            guest_taken: 0,
            guest_given: 0,
            asked_for_credit: false,
            buffer: ByteBuffer::default(),
            guest_ended: false,
            host_deaf: false,
            share,
            taken: 0,
            told_taken: 0,
        }
    }

    /// A stream that the host asks for.
    pub fn from_host(key: Key, stream: UnixStream, share: u32) -> Self {
        Self::new(key, stream, share, Phase::Requested, op::REQUEST)
    }

    /// A stream that the guest asked for with `request`, to be confirmed.
    pub fn from_guest(key: Key, stream: UnixStream, share: u32, request: &Header) -> Self {
        let mut connection = Self::new(key, stream, share, Phase::Open, op::RESPONSE);
        connection.guest_told_credit(request);
        connection
    }

    pub fn key(&self) -> Key {
        self.key
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub fn share(&self) -> u32 {
        self.share
    }

    /// Bytes of ours that were taken out of the room, for every header.
    pub fn taken(&self) -> u32 {
        self.taken
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether the guest has yet to accept.
    pub fn is_requested(&self) -> bool {
        self.phase == Phase::Requested
    }

    /// Starts over with a request, for a driver that starts over.
    pub fn request_again(&mut self) {
        self.opening = Some(op::REQUEST);
        self.deadline = None;
    }

    /// The guest can answer from now on.
    pub fn start_waiting(&mut self) {
        self.deadline = Some(Instant::now() + REQUEST_TIMEOUT);
    }

    /// Whether the host's socket has to tell when it takes data again.
    pub fn wants_writable(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Whether [`Connection::output`] may have something.
    pub fn has_output(&self) -> bool {
        match self.phase {
            Phase::Requested => self.opening.is_some(),
            Phase::Open => {
                self.opening.is_some()
                    || self.credit_update_due
                    || self.credit_request_due
                    || self.can_give()
                    || self.shutdown_flags() != self.told_shutdown
            }
            Phase::Closing | Phase::Draining => false,
        }
    }

    /// The next packet for the guest. Its data, if any, goes to the front of `room`, which
    /// has space for at least one byte.
    pub fn output(&mut self, room: &mut GuestBytes<'_>) -> Output {
        if let Some(op) = self.opening.take() {
            return self.packet(op, 0, 0);
        }
        if self.phase != Phase::Open {
            return Output::Nothing;
        }
        if self.can_give() {
            let count = (self.guest_credit() as usize).min(PACKET_LIMIT);
            match room.receive(self.stream.as_fd(), count) {
                Ok(0) => self.host_ended = true,
                Ok(given) => {
                    // No more than the guest's credit, which is 32 bits.
                    let given = given as u32;
                    self.guest_given = self.guest_given.wrapping_add(given);
                    self.note_credit_request();
                    return self.packet(op::RW, 0, given);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(_) => return Output::Reset,
            }
        }
        let flags = self.shutdown_flags();
        if flags != self.told_shutdown {
            self.told_shutdown = flags;
            if flags == SHUTDOWN_BOTH {
                self.phase = Phase::Closing;
                self.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
            }
            return self.packet(op::SHUTDOWN, flags, 0);
        }
        if std::mem::take(&mut self.credit_request_due) {
            return self.packet(op::CREDIT_REQUEST, 0, 0);
        }
        if self.credit_update_due {
            return self.packet(op::CREDIT_UPDATE, 0, 0);
        }
        Output::Nothing
    }

    /// Takes a packet from the guest, other than a request.
    pub fn input(&mut self, header: &Header, data: &mut GuestBytes<'_>, metrics: &VsockMetrics) -> Verdict {
        self.guest_told_credit(header);
        match (self.phase, header.op) {
            (Phase::Requested, op::RESPONSE) => {
                VsockMetrics::count(&metrics.opened, 1);
                self.accepted()
            }
            (Phase::Requested, op::RST) => {
                VsockMetrics::count(&metrics.refused, 1);
                Verdict::Remove
            }
            (Phase::Open, op::RW) => self.take_data(data, metrics),
            (Phase::Open, op::SHUTDOWN) => self.guest_shut_down(header.flags),
            (Phase::Open, op::CREDIT_UPDATE) => Verdict::Keep,
            (Phase::Open, op::CREDIT_REQUEST) => {
                self.credit_update_due = true;
                Verdict::Keep
            }
            (Phase::Open, op::RST) => self.drain(Verdict::DrainSilently, Verdict::Remove),
            (Phase::Closing, op::RST) => Verdict::Remove,
            // Both sides ended it at the same time.
            (Phase::Closing, op::SHUTDOWN) if header.flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH => Verdict::Reset,
            // Sent before the guest heard of the end.
            (Phase::Closing, op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST | op::SHUTDOWN) => Verdict::Keep,
            _ => {
                VsockMetrics::count(&metrics.bad_packets, 1);
                Verdict::Reset
            }
        }
    }

    /// The host's socket has data, or its end.
    pub fn host_readable(&mut self) {
        self.readable = true;
        self.note_credit_request();
    }

    /// The host's socket takes data again.
    pub fn host_writable(&mut self) -> Verdict {
        while !self.buffer.is_empty() {
            match self.buffer.send(self.stream.as_fd()) {
                Ok(sent) => {
                    self.took(sent);
                    if self.phase == Phase::Draining {
                        self.deadline = Some(Instant::now() + DRAIN_TIMEOUT);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Verdict::Keep,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.host_went_deaf(),
            }
        }
        if self.phase == Phase::Draining {
            self.close_in_order();
            return Verdict::Remove;
        }
        self.pass_guest_end_on();
        Verdict::Keep
    }

    /// The host's socket is closed: it takes nothing any more, and has no more than is in it.
    pub fn host_hung_up(&mut self) -> Verdict {
        match self.phase {
            Phase::Requested => Verdict::Reset,
            Phase::Open => {
                self.host_went_deaf();
                self.host_readable();
                Verdict::Keep
            }
            Phase::Closing => Verdict::Keep,
            Phase::Draining => Verdict::Remove,
        }
    }

    /// The deadline passed.
    pub fn timed_out(&self) -> Verdict {
        if self.phase == Phase::Draining { Verdict::Remove } else { Verdict::Reset }
    }

    /// The guest ended the stream in good order. Lets the host see its end, rather than an
    /// error because of what it sent and the guest did not want.
    fn close_in_order(&self) {
        // Each of these fails only if the host is gone.
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut unread = [0; 4096];
        let flags = rustix::net::RecvFlags::DONTWAIT;
        while matches!(rustix::net::recv(&self.stream, &mut unread, flags), Ok((1.., _))) {}
    }

    fn packet(&mut self, op: u16, flags: u32, len: u32) -> Output {
        // Every packet tells the guest of our room.
        self.told_taken = self.taken;
        self.credit_update_due = false;
        Output::Packet { op, flags, len }
    }

    fn accepted(&mut self) -> Verdict {
        self.phase = Phase::Open;
        self.deadline = None;
        match confirm(&self.stream, self.key.host_port) {
            Ok(()) => Verdict::Keep,
            Err(_) => Verdict::Reset,
        }
    }

    fn guest_told_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_taken = header.fwd_cnt;
        if self.guest_credit() > 0 {
            self.asked_for_credit = false;
            self.credit_request_due = false;
        } else {
            self.note_credit_request();
        }
    }

    /// Bytes the guest has room for. A guest that claims nonsense has none.
    fn guest_credit(&self) -> u32 {
        self.guest_room.saturating_sub(self.guest_given.wrapping_sub(self.guest_taken))
    }

    fn wants_to_give(&self) -> bool {
        self.phase == Phase::Open && self.readable && !self.host_ended && !self.guest_deaf
    }

    fn can_give(&self) -> bool {
        self.wants_to_give() && self.guest_credit() > 0
    }

    /// Asks the guest for its room, once, when there is data but no room.
    fn note_credit_request(&mut self) {
        if self.wants_to_give() && self.guest_credit() == 0 && !self.asked_for_credit {
            self.asked_for_credit = true;
            self.credit_request_due = true;
        }
    }

    fn take_data(&mut self, data: &mut GuestBytes<'_>, metrics: &VsockMetrics) -> Verdict {
        // The room is counted whether or not the host still listens.
        if self.guest_ended || data.len() > (self.share as usize).saturating_sub(self.buffer.len()) {
            VsockMetrics::count(&metrics.bad_packets, 1);
            return Verdict::Reset;
        }
        VsockMetrics::count(&metrics.from_guest, data.len() as u64);
        while self.buffer.is_empty() && !self.host_deaf && !data.is_empty() {
            match data.send(self.stream.as_fd()) {
                Ok(sent) => self.took(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.host_went_deaf(),
            }
        }
        if self.host_deaf {
            self.took(data.len());
        } else if !data.is_empty() {
            self.buffer.append(data);
        }
        Verdict::Keep
    }

    /// Counts what left our room, and tells the guest before it believes the room full.
    fn took(&mut self, count: usize) {
        // At most our share, which is 32 bits.
        self.taken = self.taken.wrapping_add(count as u32);
        if self.phase == Phase::Open && self.taken.wrapping_sub(self.told_taken) >= self.share / 2 {
            self.credit_update_due = true;
        }
    }

    fn host_went_deaf(&mut self) {
        self.host_deaf = true;
        let dropped = self.buffer.clear();
        self.took(dropped);
    }

    fn guest_shut_down(&mut self, flags: u32) -> Verdict {
        self.guest_ended |= flags & SHUTDOWN_SEND != 0;
        self.guest_deaf |= flags & SHUTDOWN_RECEIVE != 0;
        if self.guest_ended && self.guest_deaf {
            return self.drain(Verdict::Drain, Verdict::Reset);
        }
        if self.guest_deaf {
            // The host's next write fails, as it would on any socket.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.pass_guest_end_on();
        Verdict::Keep
    }

    /// Lets the host have what the guest left behind, if anything, or is done.
    fn drain(&mut self, rest: Verdict, done: Verdict) -> Verdict {
        if self.buffer.is_empty() {
            self.close_in_order();
            return done;
        }
        self.phase = Phase::Draining;
        self.deadline = Some(Instant::now() + DRAIN_TIMEOUT);
        rest
    }

    fn pass_guest_end_on(&mut self) {
        if self.guest_ended && self.buffer.is_empty() {
            // It fails only if the host is gone, which the socket tells in its own way.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// What a shutdown has to say by now.
    fn shutdown_flags(&self) -> u32 {
        let over = self.host_ended && self.guest_ended && self.buffer.is_empty();
        let send = if self.host_ended { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_deaf || over { SHUTDOWN_RECEIVE } else { 0 };
        send | receive
    }
}
