//! What happens to pods and containers, told to whoever listens, as it happens.
//!
//! Every event carries its pod with all containers as they were at that moment. Events are
//! in order: a later one has a later time, and never an earlier state of its pod.
//!
//! Nobody waits for a listener. All of them share the last [`BACKLOG`] events; one that falls
//! behind further is told so, and has to look at everything anew.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::clock;
use crate::model::{ContainerStatus, SandboxStatus};

/// How many events a listener may fall behind.
pub const BACKLOG: usize = 1024;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It was made.
    Created,
    /// Its process, or guest, runs.
    Started,
    /// That has ended, or nobody knows any more whether it runs.
    Stopped,
    /// It was removed.
    Deleted,
}

/// Something that happened to a pod or to one of its containers.
#[derive(Debug, Clone)]
pub struct Event {
    /// Of the container, or of the pod.
    pub id: String,
    /// What happened.
    pub kind: EventKind,
    /// When, in nanoseconds since the Unix epoch.
    pub at: i64,
    /// The pod then.
    pub sandbox: SandboxStatus,
    /// Its containers then.
    pub containers: Vec<ContainerStatus>,
}

/// Where events are told. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Events {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    /// None when there are to be no more.
    listeners: Option<broadcast::Sender<Arc<Event>>>,
    last: i64,
}

/// A listener's end.
#[derive(Debug)]
pub struct EventStream(Option<broadcast::Receiver<Arc<Event>>>);

/// So many events were missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missed(pub u64);

impl Default for Events {
    fn default() -> Self {
        let shared = Shared { listeners: Some(broadcast::Sender::new(BACKLOG)), last: 0 };
        Self { shared: Arc::new(Mutex::new(shared)) }
    }
}

impl Events {
    /// Everything from now on.
    pub fn listen(&self) -> EventStream {
        EventStream(self.lock().listeners.as_ref().map(broadcast::Sender::subscribe))
    }

    /// Ends all listeners' streams, and those to come.
    pub fn end(&self) {
        self.lock().listeners = None;
    }

    /// Tells of something; `state` is looked at if somebody listens. It must not come here.
    pub fn tell(&self, id: &str, kind: EventKind, state: impl FnOnce() -> (SandboxStatus, Vec<ContainerStatus>)) {
        // The lock is held while the state is copied, so that a later event has no earlier one.
        let mut shared = self.lock();
        let Some(listeners) = shared.listeners.clone().filter(|listeners| listeners.receiver_count() > 0) else {
            return;
        };
        shared.last = clock::now().max(shared.last.saturating_add(1));
        let (sandbox, containers) = state();
        let event = Event { id: id.to_owned(), kind, at: shared.last, sandbox, containers };
        // The last listener may just have gone.
        let _ = listeners.send(Arc::new(event));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventStream {
    /// The next event; none at the end.
    ///
    /// # Errors
    /// The listener was too slow, and events are missing before the next.
    pub async fn next(&mut self) -> Result<Option<Arc<Event>>, Missed> {
        let Some(receiver) = &mut self.0 else { return Ok(None) };
        match receiver.recv().await {
            Ok(event) => Ok(Some(event)),
            Err(RecvError::Closed) => Ok(None),
            Err(RecvError::Lagged(missed)) => Err(Missed(missed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{SandboxConfig, SandboxState};

    fn state() -> (SandboxStatus, Vec<ContainerStatus>) {
        let status = SandboxStatus {
            id: "p".into(),
            config: SandboxConfig::default(),
            state: SandboxState::Ready,
            created_at: 1,
            ips: Vec::new(),
            vmm_pid: None,
            message: String::new(),
            size: None,
            silent_since: None,
            not_adopted: None,
            versions: crate::record::Versions::default(),
        };
        (status, Vec::new())
    }

    #[tokio::test]
    async fn listeners_get_what_happens_after_they_came_in_order() {
        let events = Events::default();
        events.tell("a", EventKind::Created, || unreachable!("nobody listens"));
        let (mut first, mut second) = (events.listen(), events.listen());
        events.tell("b", EventKind::Created, state);
        events.tell("c", EventKind::Stopped, state);
        for listener in [&mut first, &mut second] {
            let (b, c) = (listener.next().await.unwrap().unwrap(), listener.next().await.unwrap().unwrap());
            assert_eq!((b.id.as_str(), c.id.as_str(), c.kind), ("b", "c", EventKind::Stopped));
            assert!(c.at > b.at, "in one nanosecond");
        }
        events.end();
        assert_eq!(first.next().await.map(|event| event.is_none()), Ok(true));
        assert_eq!(events.listen().next().await.map(|event| event.is_none()), Ok(true));
    }

    #[tokio::test]
    async fn one_that_does_not_listen_is_told_how_much_it_missed_and_holds_nobody_up() {
        let events = Events::default();
        let mut slow = events.listen();
        let mut quick = events.listen();
        for _ in 0..BACKLOG + 5 {
            events.tell("a", EventKind::Created, state);
            assert!(quick.next().await.unwrap().is_some());
        }
        assert_eq!(slow.next().await.err(), Some(Missed(5)));
    }
}
