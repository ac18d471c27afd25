//! How much the peer lets us send (SPDY/3.1, section 2.6.8).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// A window as long as nobody says otherwise, in bytes.
pub const DEFAULT_WINDOW: u32 = 64 * 1024;

/// The peer's windows. They count from the first byte, but hold us back only once the
/// peer has shown that it grants any.
#[derive(Debug)]
pub struct Flow {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    kept: bool,
    initial: i64,
    connection: i64,
    streams: HashMap<u32, i64>,
}

impl Default for Flow {
    fn default() -> Self {
        let window = i64::from(DEFAULT_WINDOW);
        let state = State { kept: false, initial: window, connection: window, streams: HashMap::new() };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }
}

impl Flow {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream begins.
    pub fn open(&self, id: u32) {
        let mut state = self.lock();
        let window = state.initial;
        state.streams.insert(id, window);
    }

    /// A stream is over; whoever waits to send on it is told.
    pub fn close(&self, id: u32) {
        self.lock().streams.remove(&id);
        self.changed.notify_waiters();
    }

    /// The peer's windows have this size, those of open streams included.
    pub fn set_initial(&self, window: u32) {
        let mut state = self.lock();
        let by = i64::from(window) - state.initial;
        state.initial = i64::from(window);
        state.kept = true;
        for stream in state.streams.values_mut() {
            *stream = stream.saturating_add(by);
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// The peer takes `delta` bytes more, on a stream or, for 0, on the connection.
    pub fn grant(&self, id: u32, delta: u32) {
        let mut state = self.lock();
        state.kept = true;
        let window = if id == 0 { Some(&mut state.connection) } else { state.streams.get_mut(&id) };
        if let Some(window) = window {
            *window = window.saturating_add(i64::from(delta));
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Waits until something may be sent on a stream, and takes up to `wanted` bytes of it.
    /// Nothing if the stream is over.
    pub async fn take(&self, id: u32, wanted: usize) -> Option<usize> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut state = self.lock();
                let (kept, connection) = (state.kept, state.connection);
                let window = state.streams.get_mut(&id)?;
                let room = usize::try_from(connection.min(*window)).unwrap_or(0);
                let taken = if kept { wanted.min(room) } else { wanted };
                if taken > 0 || wanted == 0 {
                    let bytes = i64::try_from(taken).unwrap_or(i64::MAX);
                    *window = window.saturating_sub(bytes);
                    state.connection = connection.saturating_sub(bytes);
                    return Some(taken);
                }
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const NO_TIME: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn a_peer_that_never_speaks_of_windows_is_sent_everything() {
        let flow = Flow::default();
        flow.open(1);
        for _ in 0..100 {
            assert_eq!(flow.take(1, 1 << 20).await, Some(1 << 20));
        }
    }

    #[tokio::test]
    async fn a_peer_with_windows_is_sent_what_fits_and_the_rest_when_it_grants_more() {
        let flow = Flow::default();
        flow.open(1);
        flow.set_initial(10);
        assert_eq!(flow.take(1, 100).await, Some(10));
        assert!(timeout(NO_TIME, flow.take(1, 1)).await.is_err(), "the stream's window is used up");
        flow.grant(1, 5);
        assert_eq!(flow.take(1, 100).await, Some(5));
        flow.open(3);
        flow.set_initial(1 << 20);
        assert_eq!(flow.take(3, 1 << 20).await, Some(DEFAULT_WINDOW as usize - 15), "the connection's window");
        let waiting = flow.take(3, 1);
        tokio::pin!(waiting);
        assert!(timeout(NO_TIME, waiting.as_mut()).await.is_err());
        flow.grant(0, 1);
        assert_eq!(waiting.await, Some(1));
    }

    #[tokio::test]
    async fn a_stream_that_is_over_wakes_who_waits_for_it() {
        let flow = Flow::default();
        flow.open(1);
        flow.set_initial(0);
        let waiting = flow.take(1, 1);
        tokio::pin!(waiting);
        assert!(timeout(NO_TIME, waiting.as_mut()).await.is_err());
        flow.close(1);
        assert_eq!(waiting.await, None);
    }
}
