//! How streams begin: clients of the host that ask for a port, and the guest's requests.

use std::time::{Duration, Instant};

use super::{CONNECTIONS_LIMIT, Endpoint, FIRST_PORT, LAST_PORT, Muxer, Reset};
use crate::devices::virtio::vsock::connection::{Connection, Key};
use crate::devices::virtio::vsock::host::{Handshake, Listener, Progress};
use crate::devices::virtio::vsock::metrics::VsockMetrics;
use crate::devices::virtio::vsock::packet::{HOST_CID, Header, TYPE_STREAM};

/// How long a client may take to say which port it wants.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 10 });
/// Clients accepted in one go.
const ACCEPT_BATCH: usize = 32;

impl Muxer {
    /// Takes in who wants to reach the guest.
    pub(super) fn accept(&mut self) {
        for _ in 0..ACCEPT_BATCH {
            // Out of descriptors or memory, they wait in the backlog.
            let Ok(Some(stream)) = self.listener.accept(Listener::accept) else { return };
            let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
            let endpoint = Endpoint::Handshake(Handshake { stream, deadline });
            if self.insert(endpoint).is_some() {
                self.timer.arm(deadline);
            }
        }
    }

    /// Goes on with a client that may have said by now which port it wants.
    pub(super) fn handshake(&mut self, index: usize, progress: Progress) {
        let guest_port = match progress {
            Progress::Waiting => return,
            Progress::Failed => return self.remove(index),
            Progress::Port(port) => port,
        };
        let Some(key) = self.free_key(guest_port) else { return self.remove(index) };
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Some(Endpoint::Handshake(Handshake { stream, .. })) = slot.endpoint.take() else { return };
        let mut connection = Connection::from_host(key, stream, self.credit.take());
        if self.active {
            connection.start_waiting();
        }
        slot.endpoint = Some(Endpoint::Connection(Box::new(connection)));
        self.keys.insert(key, index);
        self.settle(index);
    }

    /// A name for a new stream from the host. There are more ports than streams, so this
    /// finds one.
    fn free_key(&mut self, guest_port: u32) -> Option<Key> {
        for _ in 0..=CONNECTIONS_LIMIT {
            let key = Key { host_port: self.next_port, guest_port };
            self.next_port = if self.next_port >= LAST_PORT { FIRST_PORT } else { self.next_port + 1 };
            if !self.keys.contains_key(&key) {
                return Some(key);
            }
        }
        None
    }

    /// Makes the connection that the guest asks for.
    pub(super) fn connect(&mut self, key: Key, request: &Header) {
        let index = match self.listener.listener().connect(key.host_port) {
            Ok(stream) => {
                let connection = Connection::from_guest(key, stream, self.credit.take(), request);
                self.insert(Endpoint::Connection(Box::new(connection)))
            }
            Err(_) => None,
        };
        if let Some(index) = index {
            VsockMetrics::count(&self.metrics.opened, 1);
            self.keys.insert(key, index);
            self.settle(index);
        } else {
            VsockMetrics::count(&self.metrics.refused, 1);
            self.send_reset(Reset { from_cid: HOST_CID, kind: TYPE_STREAM, key });
        }
    }
}
