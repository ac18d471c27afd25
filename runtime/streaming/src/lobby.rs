//! Connections that have not shown a token: anybody on the host can make them, in any number and at any pace, and say
//! nothing. They are bounded, and who comes has the place of who has waited longest. A client says what it wants as soon as
//! it is connected, so that it is served whatever others do.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Those who wait.
#[derive(Debug)]
pub struct Lobby {
    places: usize,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// By the order in which they came. What is sent to one shows it out; it is dropped when it leaves by itself.
    connections: BTreeMap<u64, oneshot::Sender<()>>,
    next: u64,
}

/// A place in the lobby, until it is left or dropped.
#[derive(Debug)]
pub struct Place {
    lobby: Arc<Lobby>,
    number: u64,
}

/// When somebody is shown out.
#[derive(Debug)]
pub struct ShownOut(oneshot::Receiver<()>);

impl Lobby {
    /// A lobby with so many places.
    pub fn new(places: usize) -> Arc<Self> {
        Arc::new(Self { places, waiting: Mutex::default() })
    }

    /// A place; if there is none, that of whoever has waited longest.
    pub fn enter(self: &Arc<Self>) -> (Place, ShownOut) {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.lock();
        if waiting.connections.len() >= self.places
            && let Some((_, longest)) = waiting.connections.pop_first()
        {
            // It may be about to leave.
            let _ = longest.send(());
        }
        let number = waiting.next;
        waiting.next = number.wrapping_add(1);
        waiting.connections.insert(number, sender);
        (Place { lobby: self.clone(), number }, ShownOut(receiver))
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Leaves the lobby, and is not shown out any more. Whether there was time for it.
    pub fn leave(&self) -> bool {
        self.lobby.lock().connections.remove(&self.number).is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

impl ShownOut {
    /// Returns when it is, and never if it has left before.
    pub async fn wait(self) {
        if self.0.await.is_err() {
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_comes_has_the_place_of_who_has_waited_longest() {
        let lobby = Lobby::new(2);
        let (first, first_out) = lobby.enter();
        let (second, second_out) = lobby.enter();
        assert!(first.leave());
        let (_third, third_out) = lobby.enter();
        let (fourth, _fourth_out) = lobby.enter();
        second_out.wait().await;
        assert!(!second.leave(), "too late");
        drop(fourth);
        let (_fifth, _fifth_out) = lobby.enter();
        let minute = std::time::Duration::from_secs(60);
        for out in [first_out, third_out] {
            tokio::time::timeout(minute, out.wait()).await.expect_err("one has left, the other has its place");
        }
        assert_eq!(lobby.lock().connections.len(), 2);
    }
}
