//! One operation at a time for each pod's network. Taking a pod off does not wait for what is being done for it:
//! that is asked to end first.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cancel::Cancel;
use crate::{Error, Result};

/// Who is at work, by the record of the pod.
#[derive(Debug, Default)]
pub struct Turns {
    busy: Mutex<HashMap<PathBuf, Arc<Cancel>>>,
    free: Condvar,
}

/// A pod is nobody else's until this is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    turns: &'a Turns,
    record: PathBuf,
}

impl Turns {
    /// Takes the pod's turn, in which `cancel` can be asked for. Whoever has it is asked to end and waited for, at
    /// most as long as `limit`. Blocks.
    ///
    /// # Errors
    /// The other does not end.
    pub fn take(&self, record: &Path, cancel: Arc<Cancel>, limit: Duration) -> Result<Turn<'_>> {
        let deadline = Instant::now() + limit;
        let mut busy = self.busy();
        while let Some(other) = busy.get(record) {
            other.ask();
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(Error::Busy { record: record.into(), limit });
            }
            busy = self.free.wait_timeout(busy, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        busy.insert(record.into(), cancel);
        drop(busy);
        Ok(Turn { turns: self, record: record.into() })
    }

    /// The same if nobody has it.
    pub fn try_take(&self, record: &Path, cancel: Arc<Cancel>) -> Option<Turn<'_>> {
        let mut busy = self.busy();
        if busy.contains_key(record) {
            return None;
        }
        busy.insert(record.into(), cancel);
        drop(busy);
        Some(Turn { turns: self, record: record.into() })
    }

    /// Whether somebody has it.
    pub fn is_taken(&self, record: &Path) -> bool {
        self.busy().contains_key(record)
    }

    fn busy(&self) -> MutexGuard<'_, HashMap<PathBuf, Arc<Cancel>>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.busy().remove(&self.record);
        self.turns.free.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_the_turn_is_asked_to_end_and_others_are_not_waited_for() {
        let turns = Turns::default();
        let cancel = || Arc::new(Cancel::new().unwrap());
        let (one, other, long) = (Path::new("one"), Path::new("other"), Duration::from_secs(1000));
        let first = cancel();
        let turn = turns.take(one, first.clone(), long).unwrap();
        drop(turns.take(other, cancel(), Duration::ZERO).unwrap());
        assert!(!first.asked() && turns.try_take(one, cancel()).is_none());
        let error = turns.take(one, cancel(), Duration::ZERO).unwrap_err().to_string();
        assert!(first.asked() && error.contains("one"), "{error}");
        std::thread::scope(|scope| {
            let next = scope.spawn(|| turns.take(one, cancel(), long).map(drop));
            drop(turn);
            next.join().unwrap().unwrap();
        });
        assert!(turns.try_take(one, cancel()).is_some());
    }
}
