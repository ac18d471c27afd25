//! Output of a running container as it comes, for attached clients.
//!
//! The guest has one connection for each stream, and the log's pump reads it. The pump
//! hands every piece to a [`Live`] too, which copies it to whoever is attached. It never
//! waits: a client that falls [`BACKLOG_BYTES`] behind is dropped, so that it can neither
//! hold up the log nor cost more memory than that.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;

/// How far a client may fall behind, in bytes.
pub const BACKLOG_BYTES: usize = 4 << 20;

/// One output stream.
#[derive(Debug, Default)]
pub struct Live {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ended: bool,
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    queue: mpsc::UnboundedSender<Bytes>,
    backlog: Arc<Backlog>,
}

#[derive(Debug, Default)]
struct Backlog {
    bytes: AtomicUsize,
    overrun: AtomicBool,
}

/// A client fell too far behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overrun;

/// A client's end.
#[derive(Debug)]
pub struct LiveOutput {
    queue: mpsc::UnboundedReceiver<Bytes>,
    backlog: Arc<Backlog>,
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything from now on; nothing if the stream has ended.
    pub fn subscribe(&self) -> LiveOutput {
        let (sender, queue) = mpsc::unbounded_channel();
        let backlog = Arc::<Backlog>::default();
        let mut state = self.lock();
        if !state.ended {
            state.clients.push(Client { queue: sender, backlog: backlog.clone() });
        }
        LiveOutput { queue, backlog }
    }

    /// Copies output to all clients.
    pub fn send(&self, data: &[u8]) {
        let mut state = self.lock();
        if state.clients.is_empty() || data.is_empty() {
            return;
        }
        let data = Bytes::copy_from_slice(data);
        state.clients.retain(|client| {
            let held = client.backlog.bytes.fetch_add(data.len(), Ordering::Relaxed);
            if held.saturating_add(data.len()) > BACKLOG_BYTES {
                client.backlog.overrun.store(true, Ordering::Release);
                return false;
            }
            client.queue.send(data.clone()).is_ok()
        });
    }

    /// The stream has ended: clients see its end when they have read what there is.
    pub fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        state.clients.clear();
    }
}

impl LiveOutput {
    /// The next piece; nothing at the end of the stream.
    ///
    /// # Errors
    /// The client was too slow, and output between what it has got and now is missing.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Overrun> {
        match self.queue.recv().await {
            Some(data) => {
                self.backlog.bytes.fetch_sub(data.len(), Ordering::Relaxed);
                Ok(Some(data))
            }
            None if self.backlog.overrun.load(Ordering::Acquire) => Err(Overrun),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_client_gets_what_comes_after_it_did_and_then_the_end() {
        let live = Live::default();
        let mut first = live.subscribe();
        live.send(b"one");
        let mut second = live.subscribe();
        live.send(b"two");
        live.end();
        for expected in [&b"one"[..], b"two"] {
            assert_eq!(first.next().await.unwrap().unwrap(), expected);
        }
        assert_eq!(second.next().await.unwrap().unwrap(), &b"two"[..]);
        assert_eq!((first.next().await, second.next().await), (Ok(None), Ok(None)));
        assert_eq!(live.subscribe().next().await, Ok(None), "attached after the end");
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_dropped_and_told_so() {
        let live = Live::default();
        let (mut slow, mut quick) = (live.subscribe(), live.subscribe());
        let piece = vec![0; BACKLOG_BYTES / 4];
        for _ in 0..5 {
            live.send(&piece);
            assert_eq!(quick.next().await.unwrap().unwrap().len(), piece.len());
        }
        for _ in 0..4 {
            assert_eq!(slow.next().await.unwrap().unwrap().len(), piece.len());
        }
        assert_eq!(slow.next().await, Err(Overrun));
        live.send(b"on");
        assert_eq!(quick.next().await.unwrap().unwrap(), &b"on"[..]);
    }
}
