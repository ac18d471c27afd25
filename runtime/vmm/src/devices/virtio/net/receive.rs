//! Packets for the guest.

use std::io;
use std::os::fd::AsFd;

use super::metrics::NetMetrics;
use super::tap::Tap;
use super::{FRAME_LIMIT, HEADER_SIZE};
use crate::devices::virtio::budget::Budget;
use crate::devices::virtio::chain_queue::ChainQueue;
use crate::devices::virtio::device::{DeviceError, Interrupt};
use crate::devices::virtio::ring::Ring;

/// Packets given in one go before others get their turn.
const BATCH: usize = 256;
/// Looks for chains in one go: a packet may take dozens.
pub const LOOKS: usize = 4096;
/// Packets given before the guest hears of them, though more are there.
const SIGNAL_PACKETS: usize = 32;
/// Where the header says in how many chains the packet lies.
const COUNT_OFFSET: usize = 10;

/// What the device waits for next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The tap has to have a packet.
    Packet,
    /// The guest has to make room.
    Room,
    /// Others have to have had their turn.
    Turn,
    /// Nothing: the interface behind the tap is gone.
    Never,
}

/// The queue that the guest receives by.
#[derive(Debug)]
pub struct Receive {
    ring: Ring,
    chains: ChainQueue,
    /// Whether a packet may lie in several chains.
    mergeable: bool,
    /// A packet that came when there was little room: empty if none did.
    kept: Vec<u8>,
    used: Vec<(u16, u32)>,
}

impl Receive {
    /// The driver's queue.
    pub fn new(ring: Ring, mergeable: bool) -> Self {
        Self { ring, chains: ChainQueue::new(), mergeable, kept: Vec::new(), used: Vec::new() }
    }

    /// Gives the guest what the tap has. Says what to wait for.
    pub fn serve(&mut self, interrupt: &dyn Interrupt, tap: &Tap, metrics: &NetMetrics) -> Result<Wait, DeviceError> {
        let mut packets = 0;
        let mut budget = Budget::new(LOOKS);
        let wait = loop {
            self.fill(&mut budget)?;
            let given = if self.kept.is_empty() { self.next(tap, metrics) } else { self.give_kept(metrics) };
            match given {
                Given::Packet(length) => self.finish(length, metrics)?,
                Given::Nothing => break Wait::Packet,
                Given::NoMore => break Wait::Never,
                Given::NoRoom => {
                    if budget.is_spent() {
                        break Wait::Turn;
                    }
                    if self.ring.rearm() {
                        continue;
                    }
                    break Wait::Room;
                }
                Given::Lost => {}
            }
            packets += 1;
            if packets == BATCH {
                break Wait::Packet;
            }
            if packets % SIGNAL_PACKETS == 0 {
                self.ring.signal(interrupt);
            }
        };
        self.ring.signal(interrupt);
        Ok(wait)
    }

    /// Takes chains up to where any packet would fit.
    fn fill(&mut self, budget: &mut Budget) -> Result<(), DeviceError> {
        while self.chains.room() < FRAME_LIMIT && !self.chains.is_full() {
            let Some(chain) = self.ring.pop(budget)? else { break };
            let limit = usize::from(self.ring.size());
            match self.chains.push(chain, limit) {
                Ok(None) => {}
                // Of no use for any packet.
                Ok(Some(head)) => self.ring.complete(head, 0)?,
                Err(error) => return Err(self.ring.error(&error.to_string())),
            }
        }
        Ok(())
    }

    /// The next packet, straight into the chains if any would fit.
    fn next(&mut self, tap: &Tap, metrics: &NetMetrics) -> Given {
        if self.chains.first() == 0 {
            return Given::NoRoom;
        }
        if self.mergeable && self.chains.room() >= FRAME_LIMIT {
            return match self.chains.read_packet(tap.as_fd()) {
                Ok(length) if length > HEADER_SIZE => Given::Packet(length),
                Ok(_) => Given::Lost,
                Err(error) => Given::of(&error),
            };
        }
        self.kept.resize(FRAME_LIMIT, 0);
        match tap.read(&mut self.kept) {
            Ok(length) if length > HEADER_SIZE => {
                self.kept.truncate(length);
                self.give_kept(metrics)
            }
            Ok(_) => {
                self.kept.clear();
                Given::Lost
            }
            Err(error) => {
                self.kept.clear();
                Given::of(&error)
            }
        }
    }

    /// The packet that is kept, if there is room now.
    fn give_kept(&mut self, metrics: &NetMetrics) -> Given {
        let length = self.kept.len();
        let room = if self.mergeable { self.chains.room() } else { self.chains.first() };
        if room < length {
            let all = self.chains.is_full() || self.chains.len() >= usize::from(self.ring.size());
            if room == 0 || (self.mergeable && !all) {
                return Given::NoRoom;
            }
            // It will never fit.
            NetMetrics::count(&metrics.receive_dropped, 1);
            self.kept.clear();
            return Given::Lost;
        }
        self.chains.write_at(0, &self.kept);
        self.kept.clear();
        Given::Packet(length)
    }

    /// Gives the chains that the packet lies in to the driver.
    fn finish(&mut self, length: usize, metrics: &NetMetrics) -> Result<(), DeviceError> {
        let count = self.chains.chains_for(length);
        self.chains.write_at(COUNT_OFFSET, &u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes());
        self.used.clear();
        self.chains.take(length, &mut self.used);
        NetMetrics::count(&metrics.received, 1);
        NetMetrics::count(&metrics.received_bytes, length);
        self.ring.complete_all(&self.used)
    }
}

/// What came of trying to give the guest a packet.
enum Given {
    /// One of this length is in the first chains.
    Packet(usize),
    /// One was lost.
    Lost,
    /// There is none now.
    Nothing,
    /// There will be none.
    NoMore,
    /// There is no room for one.
    NoRoom,
}

impl Given {
    /// What it means that the tap could not be read.
    fn of(error: &io::Error) -> Self {
        // Without its interface; while that is down, there is nothing to read.
        if error.raw_os_error() == Some(libc::EBADFD) { Self::NoMore } else { Self::Nothing }
    }
}
