//! A fair share of the processors for every pull.
//!
//! Taking in a layer keeps a processor busy. Only so many threads do so at a time, and whose turn is next is decided
//! by pulls, not by layers: the pull that has waited longest since its last turn. A thread has its turn while it works,
//! not while it waits for the network, so that a slow registry takes nothing from the others. A turn that does not end
//! in time, be it that a layer is made to take long, holds the others up for [`PATIENCE`] and no longer.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a turn is while others wait.
const TURN: Duration = Duration::from_millis(20);
/// How long a turn is waited for before it is taken without being free.
const PATIENCE: Duration = Duration::from_secs(1);

/// The processors that layers are taken in on; clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Processors(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Below 0 while turns were taken that were not free.
    free: isize,
    /// Who waits: its pull, and its number.
    waiting: Vec<(u64, u64)>,
    /// When each pull with a turn taken or wanted had its last one.
    last: HashMap<u64, Pull>,
    clock: u64,
}

#[derive(Debug, Default)]
struct Pull {
    last: u64,
    /// Threads of it.
    members: usize,
}

/// One thread's place; its turn ends with it.
#[derive(Debug)]
pub(crate) struct Turn {
    processors: Processors,
    pull: u64,
    /// Since when it is this thread's turn.
    since: Option<Instant>,
}

impl Processors {
    pub(crate) fn new(count: usize) -> Self {
        let free = isize::try_from(count.max(1)).unwrap_or(isize::MAX);
        let state = State { free, waiting: Vec::new(), last: HashMap::new(), clock: 0 };
        Self(Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }))
    }

    /// A place for a thread of a pull, without a turn yet.
    pub(crate) fn place(&self, pull: u64) -> Turn {
        self.state().last.entry(pull).or_default().members += 1;
        Turn { processors: self.clone(), pull, since: None }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn next(&self) -> Option<u64> {
        let last = |pull: &u64| self.last.get(pull).map_or(0, |pull| pull.last);
        self.waiting.iter().min_by_key(|(pull, number)| (last(pull), *number)).map(|(_, number)| *number)
    }
}

impl Turn {
    /// Waits for its turn.
    pub(crate) fn take(&mut self) {
        if self.since.is_some() {
            return;
        }
        let (Processors(shared), begin) = (&self.processors, Instant::now());
        let mut state = self.processors.state();
        state.clock += 1;
        let number = state.clock;
        state.waiting.push((self.pull, number));
        while (state.free <= 0 || state.next() != Some(number)) && begin.elapsed() < PATIENCE {
            let left = PATIENCE.saturating_sub(begin.elapsed());
            state = shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waiting.retain(|(_, waiting)| *waiting != number);
        state.free -= 1;
        state.clock += 1;
        let now = state.clock;
        state.last.entry(self.pull).or_default().last = now;
        drop(state);
        self.since = Some(Instant::now());
        // There may be another one free, for whoever is next now.
        shared.changed.notify_all();
    }

    /// Ends its turn.
    pub(crate) fn leave(&mut self) {
        if self.since.take().is_some() {
            self.processors.state().free += 1;
            self.processors.0.changed.notify_all();
        }
    }

    /// Lets others have a turn, if it had its own.
    pub(crate) fn pass(&mut self) {
        if self.since.is_some_and(|since| since.elapsed() < TURN) {
            return;
        }
        if self.since.is_none() || !self.processors.state().waiting.is_empty() {
            self.leave();
            self.take();
        } else {
            self.since = Some(Instant::now());
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.leave();
        let mut state = self.processors.state();
        if let Some(pull) = state.last.get_mut(&self.pull) {
            pull.members -= 1;
            if pull.members == 0 {
                state.last.remove(&self.pull);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn pulls_have_equal_shares_however_many_threads_they_have() {
        let processors = Processors::new(1);
        let turns = [const { AtomicUsize::new(0) }; 2];
        let end = Instant::now() + Duration::from_millis(1500);
        std::thread::scope(|scope| {
            for pull in [0, 1, 1, 1] {
                let (processors, turns) = (processors.clone(), &turns);
                scope.spawn(move || {
                    let mut turn = processors.place(pull);
                    while Instant::now() < end {
                        turn.take();
                        turns[pull as usize].fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(2));
                        turn.leave();
                    }
                });
            }
        });
        let [one, three] = turns.map(AtomicUsize::into_inner);
        assert!(one * 3 > three * 2 && three * 3 > one * 2, "{one} turns for one thread, {three} for three");
        assert!(processors.state().last.is_empty() && processors.state().free == 1);
    }

    #[test]
    fn a_turn_without_end_holds_nobody_up_for_long() {
        let processors = Processors::new(1);
        let mut endless = processors.place(0);
        endless.take();
        let begin = Instant::now();
        let mut other = processors.place(1);
        other.take();
        assert!(begin.elapsed() >= PATIENCE);
        drop(endless);
        drop(other);
        assert_eq!(processors.state().free, 1);
    }
}
