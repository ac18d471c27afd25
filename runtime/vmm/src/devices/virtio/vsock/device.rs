//! The queues.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::config;
use super::host::{Listener, VsockError};
use super::metrics::VsockMetrics;
use super::muxer::Muxer;
use super::packet::{HEADER_SIZE, Header};
use super::state::VsockState;
use crate::devices::virtio::budget::{Budget, Served};
use crate::devices::virtio::chain::{ChainError, ChainScratch};
use crate::devices::virtio::device::{Activation, DeviceError, DeviceState, Interrupt, VirtioDevice};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::wake::Wake;

const NAME: &str = "vsock";
const TO_GUEST: u16 = 0;
const FROM_GUEST: u16 = 1;
const EVENTS: u16 = 2;
/// Linux fills the first with pages, which are the guest's: 128 of them keep a stream going
/// and cost it half a MiB. It has eight buffers for events.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];
/// Packets passed on in one go before other devices get their turn.
pub const BATCH: usize = 256;
/// Packets given in one go before the guest hears of them.
const SIGNAL_PACKETS: usize = 32;
/// The event that makes the guest forget its connections.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// A virtio-vsock device.
#[derive(Debug)]
pub struct Vsock {
    muxer: Muxer,
    active: Option<Active>,
    scratch: ChainScratch,
    wake: Wake,
    /// The guest has to be told that the connections it knows are gone.
    reset_event_due: bool,
    metrics: Arc<VsockMetrics>,
}

struct Active {
    to_guest: Ring,
    from_guest: Ring,
    events: Ring,
    interrupt: Arc<dyn Interrupt>,
}

impl std::fmt::Debug for Active {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Active").finish_non_exhaustive()
    }
}

impl Vsock {
    /// A device that the host reaches by `listener`, see [the module](super).
    ///
    /// # Errors
    /// See [`VsockError`].
    pub fn new(listener: Listener) -> Result<Self, VsockError> {
        let wake = Wake::new().map_err(VsockError::Events)?;
        let metrics = Arc::<VsockMetrics>::default();
        let muxer = Muxer::new(listener, wake.as_fd(), metrics.clone())?;
        let scratch = ChainScratch::new();
        Ok(Self { muxer, active: None, scratch, wake, reset_event_due: false, metrics })
    }

    /// A device for a guest that knows another, which was saved. The guest is told to forget
    /// its connections once the device is active.
    ///
    /// # Errors
    /// See [`VsockError`].
    pub fn restore(listener: Listener, state: &VsockState) -> Result<Self, VsockError> {
        let mut device = Self::new(listener)?;
        device.muxer.set_next_port(state.next_port);
        device.reset_event_due = true;
        Ok(device)
    }

    /// What [`Vsock::restore`] needs.
    #[must_use]
    pub fn own_state(&self) -> VsockState {
        VsockState { next_port: self.muxer.next_port() }
    }

    /// What it did so far.
    #[must_use]
    pub fn metrics(&self) -> Arc<VsockMetrics> {
        self.metrics.clone()
    }

    #[cfg(test)]
    pub(super) fn muxer(&self) -> &Muxer {
        &self.muxer
    }

    /// Passes everything on that can be. After an error the connections are closed: the
    /// driver cannot serve them, so their hosts need not wait.
    fn serve(&mut self) -> Result<(), DeviceError> {
        let result = self.send_events().and_then(|()| self.take_from_guest()).and_then(|()| self.give_to_guest());
        if result.is_err() {
            self.active = None;
            self.muxer.reset();
        }
        result
    }

    fn take_from_guest(&mut self) -> Result<(), DeviceError> {
        let Some(Active { from_guest: ring, interrupt, .. }) = &mut self.active else { return Ok(()) };
        let (scratch, muxer, metrics) = (&mut self.scratch, &mut self.muxer, &self.metrics);
        let served = ring.serve(&mut Budget::new(BATCH), interrupt.as_ref(), |ring, chain| {
            let limit = usize::from(ring.size());
            let mut chain = scratch.load(&chain, limit).map_err(|error| bad_chain(ring, error))?;
            let header = chain.readable.read_array::<HEADER_SIZE>().map(|bytes| Header::from_bytes(&bytes));
            match header {
                Some(header) if !chain.faulty && header.len as usize <= chain.readable.len() => {
                    chain.readable.truncate(header.len as usize);
                    muxer.input(&header, &mut chain.readable);
                }
                // Who sent it cannot be told for sure, so nobody is.
                _ => VsockMetrics::count(&metrics.bad_packets, 1),
            }
            ring.complete(chain.head, 0)
        })?;
        if served == Served::Part {
            self.wake.set();
        }
        Ok(())
    }

    fn give_to_guest(&mut self) -> Result<(), DeviceError> {
        let Some(Active { to_guest: ring, interrupt, .. }) = &mut self.active else { return Ok(()) };
        let mut budget = Budget::new(BATCH);
        let mut packets = 0;
        while self.muxer.has_output() {
            let Some(chain) = ring.pop(&mut budget)? else {
                if budget.is_spent() {
                    self.wake.set();
                    break;
                }
                // The guest has to tell when there are buffers again.
                if ring.rearm() {
                    continue;
                }
                break;
            };
            let limit = usize::from(ring.size());
            let mut chain = self.scratch.load(&chain, limit).map_err(|error| bad_chain(ring, error))?;
            match chain.writable.split_front(HEADER_SIZE) {
                Some(front) if !chain.faulty && !chain.writable.is_empty() => {
                    let Some(header) = self.muxer.output(&mut chain.writable) else {
                        ring.undo_pop();
                        break;
                    };
                    front.write(&header.to_bytes());
                    ring.complete(chain.head, HEADER_SIZE as u32 + header.len)?;
                }
                // Of no use for any packet.
                _ => ring.complete(chain.head, 0)?,
            }
            packets += 1;
            if packets % SIGNAL_PACKETS == 0 {
                ring.signal(interrupt.as_ref());
            }
        }
        ring.signal(interrupt.as_ref());
        Ok(())
    }

    fn send_events(&mut self) -> Result<(), DeviceError> {
        let Some(Active { events: ring, interrupt, .. }) = &mut self.active else { return Ok(()) };
        let mut budget = Budget::new(BATCH);
        while self.reset_event_due {
            let Some(chain) = ring.pop(&mut budget)? else {
                if budget.is_spent() {
                    self.wake.set();
                    break;
                }
                if ring.rearm() {
                    continue;
                }
                break;
            };
            let limit = usize::from(ring.size());
            let mut chain = self.scratch.load(&chain, limit).map_err(|error| bad_chain(ring, error))?;
            let written = chain.writable.write(&TRANSPORT_RESET);
            self.reset_event_due = written < TRANSPORT_RESET.len();
            ring.complete(chain.head, written as u32)?;
        }
        ring.signal(interrupt.as_ref());
        Ok(())
    }
}

fn bad_chain(ring: &Ring, error: ChainError) -> DeviceError {
    ring.error(&error.to_string())
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_VSOCK as u16
    }

    fn shares_interrupt(&self) -> bool {
        true
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { memory, queues, interrupt, features } = activation;
        let mut queues = queues.into_iter();
        let mut ring = |index| match queues.next() {
            Some(queue) => Ring::new(NAME, index, queue, &memory, features),
            None => Err(DeviceError { device: NAME, reason: format!("queue {index} is missing") }),
        };
        let to_guest = ring(TO_GUEST)?;
        let from_guest = ring(FROM_GUEST)?;
        let events = ring(EVENTS)?;
        self.active = Some(Active { to_guest, from_guest, events, interrupt });
        self.muxer.activate();
        self.serve()
    }

    fn reset(&mut self) {
        self.active = None;
        // A driver that starts over has no connections to forget.
        self.reset_event_due = false;
        self.muxer.reset();
    }

    fn state(&self) -> Option<DeviceState> {
        let active = self.active.as_ref()?;
        Some(DeviceState {
            positions: [&active.to_guest, &active.from_guest, &active.events].map(Ring::position).to_vec(),
            own: postcard::to_stdvec(&self.own_state()).ok()?,
        })
    }

    fn queue_notified(&mut self, _index: u16) -> Result<(), DeviceError> {
        self.serve()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.muxer.poll_fd())
    }

    fn poll_ready(&mut self) -> Result<(), DeviceError> {
        if self.muxer.poll() {
            self.wake.clear();
        }
        self.serve()
    }
}
