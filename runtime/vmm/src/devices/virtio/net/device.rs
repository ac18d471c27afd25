//! The device: its two queues and the tap.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::config::{ConfigSpace, MTU_LEAST};
use super::metrics::NetMetrics;
use super::receive::{Receive, Wait};
use super::state::NetState;
use super::tap::Tap;
use super::transmit::Transmit;
use crate::devices::virtio::budget::Served;
use crate::devices::virtio::device::{Activation, DeviceError, Interrupt, VirtioDevice};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::wake::Wake;

const NAME: &str = "net";
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// A virtio-net device.
pub struct Net {
    tap: Tap,
    config: ConfigSpace,
    state: NetState,
    active: Option<Active>,
    /// Readable if the tap is, while a packet is waited for, or if more is to be done.
    events: OwnedFd,
    wake: Wake,
    /// Whether `events` tells of the tap.
    watching: bool,
    metrics: Arc<NetMetrics>,
}

struct Active {
    receive: Receive,
    transmit: Transmit,
    interrupt: Arc<dyn Interrupt>,
}

impl Net {
    /// An interface with this address and MTU behind `tap`.
    ///
    /// # Errors
    /// If the MTU is too small or the address is one of a group, or the process has no file
    /// descriptor left.
    pub fn new(tap: Tap, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        let features = tap.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MTU
            | 1 << VIRTIO_NET_F_STATUS;
        Self::with_state(tap, NetState { mac, mtu, features })
    }

    /// An interface for a guest that knows another, which was saved. `tap` offers what that
    /// one's did.
    ///
    /// # Errors
    /// As [`Net::new`], and if the tap lacks a feature that was offered.
    pub fn restore(tap: Tap, state: &NetState) -> io::Result<Self> {
        let net = Self::new(tap, state.mac, state.mtu)?;
        let lacking = state.features & !net.state.features;
        if lacking != 0 {
            let reason = format!("the tap of this host lacks the features {lacking:#x} that the saved one had");
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        Self::with_state(net.tap, state.clone())
    }

    fn with_state(tap: Tap, state: NetState) -> io::Result<Self> {
        let refused = |reason: String| Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        if state.mtu < MTU_LEAST {
            return refused(format!("the MTU is {}, it must be {MTU_LEAST} to 65535", state.mtu));
        }
        if state.mac[0] & 1 != 0 || state.mac == [0; 6] {
            return refused(format!("the MAC {:02x?} is not that of one interface", state.mac));
        }
        let events = epoll::create(CreateFlags::CLOEXEC)?;
        let wake = Wake::new()?;
        epoll::add(&events, &wake, EventData::new_u64(0), EventFlags::IN)?;
        Ok(Self {
            tap,
            config: ConfigSpace::new(state.mac, state.mtu),
            state,
            active: None,
            events,
            wake,
            watching: false,
            metrics: Arc::default(),
        })
    }

    /// What [`Net::restore`] needs.
    #[must_use]
    pub fn state(&self) -> NetState {
        self.state.clone()
    }

    /// What it did so far.
    #[must_use]
    pub fn metrics(&self) -> Arc<NetMetrics> {
        self.metrics.clone()
    }

    fn serve_receive(&mut self) -> Result<(), DeviceError> {
        let Some(Active { receive, interrupt, .. }) = &mut self.active else { return Ok(()) };
        let wait = receive.serve(interrupt.as_ref(), &self.tap, &self.metrics)?;
        match wait {
            Wait::Packet => self.watch(true),
            Wait::Room | Wait::Never => self.watch(false),
            Wait::Turn => self.wake.set(),
        }
        Ok(())
    }

    fn serve_transmit(&mut self) -> Result<(), DeviceError> {
        let Some(Active { transmit, interrupt, .. }) = &mut self.active else { return Ok(()) };
        if transmit.serve(interrupt.as_ref(), &self.tap, &self.metrics)? == Served::Part {
            self.wake.set();
        }
        Ok(())
    }

    /// Wants to hear of packets, or not: a tap that is readable while the guest has no room
    /// would wake the event loop for ever. So would one whose interface is gone, which epoll tells of whatever was asked
    /// for: what is not waited for is not in the set.
    fn watch(&mut self, wanted: bool) {
        if self.watching == wanted {
            return;
        }
        let changed = if wanted {
            epoll::add(&self.events, &self.tap, EventData::new_u64(1), EventFlags::IN)
        } else {
            epoll::delete(&self.events, &self.tap)
        };
        // Fails only for want of memory, and is tried again at the next packet or buffer.
        self.watching = if changed.is_ok() { wanted } else { self.watching };
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.state.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { memory, queues, interrupt, features } = activation;
        let failed = |reason: String| DeviceError { device: NAME, reason };
        let mut queues = queues.into_iter();
        let mut ring = |index| match queues.next() {
            Some(queue) => Ring::new(NAME, index, queue, &memory, features),
            None => Err(failed(format!("queue {index} is missing"))),
        };
        let (receive, transmit) = (ring(RECEIVE)?, ring(TRANSMIT)?);
        self.tap.negotiate(features).map_err(|error| failed(format!("the tap refuses its offloads: {error}")))?;
        let mergeable = features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let receive = Receive::new(receive, mergeable);
        self.active = Some(Active { receive, transmit: Transmit::new(transmit), interrupt });
        self.serve_transmit()?;
        self.serve_receive()
    }

    fn reset(&mut self) {
        self.active = None;
        self.watch(false);
        self.wake.clear();
        // What is there for a driver that agrees to less is made so on the way in.
        let _ = self.tap.negotiate(0);
    }

    fn queue_notified(&mut self, index: u16) -> Result<(), DeviceError> {
        match index {
            RECEIVE => self.serve_receive(),
            _ => self.serve_transmit(),
        }
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.events.as_fd())
    }

    fn poll_ready(&mut self) -> Result<(), DeviceError> {
        self.wake.clear();
        self.serve_transmit()?;
        self.serve_receive()
    }
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net")
            .field("tap", &self.tap)
            .field("state", &self.state)
            .field("active", &self.active.is_some())
            .finish_non_exhaustive()
    }
}
