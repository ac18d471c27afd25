//! One piece of work for everybody who wants the same thing at the same time.
//!
//! The work is driven by those who wait for it and by nobody else: when the last of them goes away, it is dropped.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use tokio::sync::watch;

/// Work that several wait for; clones share it.
pub(crate) type Work<E> = Shared<BoxFuture<'static, Result<(), E>>>;

/// Work in flight, by what it is for. `S` is its status.
pub(crate) struct Flights<K, S, E> {
    entries: Arc<Mutex<HashMap<K, Entry<S, E>>>>,
}

struct Entry<S, E> {
    work: WeakShared<BoxFuture<'static, Result<(), E>>>,
    status: watch::Receiver<S>,
    token: Arc<()>,
}

/// A place on a flight.
pub(crate) struct Seat<S, E> {
    pub(crate) work: Work<E>,
    pub(crate) status: watch::Receiver<S>,
    /// Whether this caller started it, so that its failure is this caller's own.
    pub(crate) first: bool,
}

impl<K, S, E> Clone for Flights<K, S, E> {
    fn clone(&self) -> Self {
        Self { entries: self.entries.clone() }
    }
}

impl<K, S, E> Default for Flights<K, S, E> {
    fn default() -> Self {
        Self { entries: Arc::default() }
    }
}

impl<K, S, E> fmt::Debug for Flights<K, S, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Flights")
    }
}

impl<K: Clone + Eq + Hash + Send + 'static, S: Send + Sync + 'static, E: Clone + Send + Sync + 'static>
    Flights<K, S, E>
{
    /// Joins the work for `key`, or starts it with what `start` makes of its status channel.
    pub(crate) fn join(
        &self,
        key: K,
        status: S,
        start: impl FnOnce(watch::Sender<S>) -> BoxFuture<'static, Result<(), E>>,
    ) -> Seat<S, E> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(&key)
            && let Some(work) = entry.work.upgrade()
        {
            return Seat { work, status: entry.status.clone(), first: false };
        }
        let (sender, receiver) = watch::channel(status);
        let token = Arc::new(());
        // A finished flight takes nobody more: who comes later looks for its result where it put that.
        let landed = Landed { entries: self.entries.clone(), key: key.clone(), token: token.clone() };
        let work = start(sender);
        let work: Work<E> = async move {
            let result = work.await;
            drop(landed);
            result
        }
        .boxed()
        .shared();
        if let Some(weak) = work.downgrade() {
            entries.insert(key, Entry { work: weak, status: receiver.clone(), token });
        }
        Seat { work, status: receiver, first: true }
    }
}

/// Takes its flight off the list when it ends or is dropped.
struct Landed<K: Eq + Hash, S, E> {
    entries: Arc<Mutex<HashMap<K, Entry<S, E>>>>,
    key: K,
    token: Arc<()>,
}

impl<K: Eq + Hash, S, E> Drop for Landed<K, S, E> {
    fn drop(&mut self) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.get(&self.key).is_some_and(|entry| Arc::ptr_eq(&entry.token, &self.token)) {
            entries.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn work_is_done_once_and_anew_when_it_is_over() {
        let flights: Flights<&str, u32, &str> = Flights::default();
        let started = Arc::new(AtomicUsize::new(0));
        let (go, wait) = oneshot::channel::<()>();
        let count = started.clone();
        let first = flights.join("a", 0, |status| {
            async move {
                count.fetch_add(1, Ordering::SeqCst);
                status.send_replace(7);
                wait.await.map_err(|_| "dropped")
            }
            .boxed()
        });
        let second = flights.join("a", 0, |_| unreachable!());
        assert!(first.first && !second.first);
        go.send(()).unwrap();
        assert_eq!(second.work.await, Ok(()));
        assert_eq!(*second.status.borrow(), 7);
        assert_eq!(first.work.await, Ok(()));
        assert_eq!(started.load(Ordering::SeqCst), 1);
        assert!(flights.join("a", 0, |_| async { Err("again") }.boxed()).first);
    }

    #[tokio::test]
    async fn work_goes_on_while_one_waits_and_ends_with_the_last() {
        let flights: Flights<&str, (), ()> = Flights::default();
        let (mut alive, held) = oneshot::channel::<()>();
        let (go, wait) = oneshot::channel::<()>();
        let first = flights.join("a", (), |_| {
            async move {
                let _held = held;
                wait.await.map_err(|_| ())
            }
            .boxed()
        });
        let second = flights.join("a", (), |_| unreachable!());
        // The first has polled, then goes away.
        assert!(first.work.clone().now_or_never().is_none());
        drop(first);
        go.send(()).unwrap();
        assert_eq!(second.work.await, Ok(()));

        let (_go, wait) = oneshot::channel::<()>();
        let (mut gone, held) = oneshot::channel::<()>();
        let third = flights.join("a", (), |_| {
            async move {
                let _held = held;
                wait.await.map_err(|_| ())
            }
            .boxed()
        });
        assert!(third.first);
        assert!(third.work.clone().now_or_never().is_none());
        drop(third);
        gone.closed().await;
        alive.closed().await;
    }
}
