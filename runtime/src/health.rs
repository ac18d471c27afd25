//! Whether guests can run on this host, for a caller that asks every few seconds and must not wait.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

/// How long an answer holds. To find it out costs a virtual machine.
const FRESH: Duration = Duration::from_secs(10);
/// How long it still counts while the next is waited for: a host that is slow for a moment is not broken.
const STALE: Duration = Duration::from_secs(60);
/// How long a caller is kept waiting for the first answer; less than it waits itself.
const PATIENCE: Duration = Duration::from_secs(1);

type Check = dyn Fn() -> Result<(), String> + Send + Sync;

/// The answer to a question that may take its time. Cheap to clone.
#[derive(Clone)]
pub struct Health {
    shared: Arc<Shared>,
}

struct Shared {
    what: &'static str,
    check: Box<Check>,
    patience: Duration,
    state: Mutex<State>,
    ended: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    last: Option<(Instant, Result<(), String>)>,
    /// When the check that is under way was begun. There is never a second one.
    begun: Option<Instant>,
}

impl Health {
    /// `check` looks at `what`, and may block. Its callers wait for as long as usual times `scale`.
    pub fn new(what: &'static str, check: impl Fn() -> Result<(), String> + Send + Sync + 'static, scale: f64) -> Self {
        let (check, patience) = (Box::new(check), PATIENCE.mul_f64(scale));
        Self {
            shared: Arc::new(Shared { what, check, patience, state: Mutex::default(), ended: watch::Sender::new(()) }),
        }
    }

    /// What was found a moment ago, or is found now.
    pub async fn now(&self) -> Result<(), String> {
        let mut ended = self.shared.ended.subscribe();
        if let Some(answer) = self.known_or_begin() {
            return answer;
        }
        let _ = timeout(self.shared.patience, ended.changed()).await;
        let state = self.lock();
        match (&state.last, state.begun) {
            (Some((at, answer)), _) if at.elapsed() < STALE => answer.clone(),
            (_, begun) => {
                let since = begun.map(|begun| begun.elapsed()).unwrap_or_default();
                let what = self.shared.what;
                Err(format!("the check of {what} has not ended for {since:.0?}: see the host's kernel log"))
            }
        }
    }

    /// What was found a moment ago. Otherwise somebody looks from now on.
    fn known_or_begin(&self) -> Option<Result<(), String>> {
        let mut state = self.lock();
        if let Some((at, answer)) = &state.last
            && at.elapsed() < FRESH
        {
            return Some(answer.clone());
        }
        if state.begun.is_none() {
            state.begun = Some(Instant::now());
            let health = self.clone();
            tokio::task::spawn_blocking(move || {
                let answer = (health.shared.check)();
                *health.lock() = State { last: Some((Instant::now(), answer)), begun: None };
                health.shared.ended.send_replace(());
            });
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn callers_share_one_answer() {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        let check = move || match counted.fetch_add(1, Ordering::Relaxed) {
            0 => Err("no".to_owned()),
            _ => Ok(()),
        };
        let health = Health::new("/dev/kvm", check, 1.0);
        let answers = tokio::join!(health.now(), health.now(), health.now());
        let no = Err("no".to_owned());
        assert_eq!(answers, (no.clone(), no.clone(), no.clone()));
        assert_eq!(health.now().await, no);
        assert_eq!(count.load(Ordering::Relaxed), 1);
        // As if it were long ago.
        health.lock().last.as_mut().unwrap().0 -= FRESH;
        assert_eq!(health.now().await, Ok(()));
    }

    #[tokio::test]
    async fn a_check_that_hangs_keeps_nobody_waiting_and_is_not_begun_again() {
        let (go, wait) = mpsc::channel::<()>();
        let (wait, count) = (Mutex::new(wait), Arc::new(AtomicUsize::new(0)));
        let counted = count.clone();
        let check = move || {
            counted.fetch_add(1, Ordering::Relaxed);
            wait.lock().unwrap().recv().map_err(|e| e.to_string())
        };
        // A patience of a millisecond.
        let health = Health::new("/dev/kvm", check, 0.001);
        let error = health.now().await.unwrap_err();
        assert!(error.contains("has not ended"), "{error}");
        health.now().await.unwrap_err();
        assert_eq!(count.load(Ordering::Relaxed), 1);
        let mut ended = health.shared.ended.subscribe();
        go.send(()).unwrap();
        ended.changed().await.unwrap();
        assert_eq!(health.now().await, Ok(()));
        // It hangs again: what was known holds on for a while.
        let old = Instant::now() - FRESH;
        health.lock().last = Some((old, Ok(())));
        assert_eq!(health.now().await, Ok(()));
        health.lock().last = Some((old - STALE, Ok(())));
        health.now().await.unwrap_err();
        assert_eq!(count.load(Ordering::Relaxed), 2);
        drop(go);
    }
}
