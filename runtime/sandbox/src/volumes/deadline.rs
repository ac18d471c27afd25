//! Calls into file systems of the host that may never return.
//!
//! A path of the host may lie on a server that is gone or in a FUSE process that hangs; whoever touches it sleeps in the kernel, and
//! nothing wakes him. So such calls have a thread of their own, which is given up at its deadline: the caller goes on, and the
//! thread ends when the path answers again, if ever. Those that were given up are counted, for each pod and in all, and beyond a
//! bound nobody is sent after them: the runtime's pool of threads for blocking work, which others need, has no part in this.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::{Error, Result};

/// Most calls of one pod that hang at a time.
const OF_POD: usize = 4;
/// Most that hang at a time in all.
const IN_ALL: usize = 64;

/// The calls that were given up and have not returned.
static HANGING: Mutex<Vec<Arc<Call>>> = Mutex::new(Vec::new());

/// What such a call is about to do, for messages.
#[derive(Debug, Default)]
pub struct Step(Mutex<String>);

impl Step {
    /// Notes what comes next, as the subject of "took longer than".
    pub fn begin(&self, what: String) {
        *lock(&self.0) = what;
    }
}

#[derive(Debug)]
struct Call {
    pod: String,
    step: Step,
    state: Mutex<State>,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Running,
    GivenUp,
    Done,
}

/// Runs `work` for a pod on a thread of its own, which may be left behind: nothing in it may be needed by anybody else.
/// What it returns after the deadline is dropped there.
///
/// # Errors
/// [`Error::Deadline`] with the step that it is at when `limit` is over; [`Error::Exhausted`] if too many hang already; its own.
pub async fn within<T: Send + 'static>(
    pod: &str,
    limit: Duration,
    work: impl FnOnce(&Step) -> Result<T> + Send + 'static,
) -> Result<T> {
    admit(pod)?;
    let call = Arc::new(Call { pod: pod.to_owned(), step: Step::default(), state: Mutex::new(State::Running) });
    let (answer, answered) = oneshot::channel();
    // Dropped when the caller no longer waits, for whatever reason.
    let _waiting = Waiting(call.clone());
    let running = Running(call.clone());
    let thread = move || {
        let result = work(&running.0.step);
        drop(running);
        let _ = answer.send(result);
    };
    std::thread::Builder::new()
        .name("host-path".into())
        .spawn(thread)
        .map_err(|error| Error::Exhausted(format!("no thread to look at a path of the host: {error}")))?;
    match tokio::time::timeout(limit, answered).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Error::Internal("looking at a path of the host ended abnormally".into())),
        Err(_) => Err(Error::Deadline { action: lock(&call.step.0).clone(), limit }),
    }
}

/// Refuses where too many calls hang.
fn admit(pod: &str) -> Result<()> {
    let hanging = lock(&HANGING);
    let (of_pod, all) = (hanging.iter().filter(|call| call.pod == pod).count(), hanging.len());
    if of_pod < OF_POD && all < IN_ALL {
        return Ok(());
    }
    let first = hanging.iter().find(|call| call.pod == pod).or(hanging.first());
    let first = first.map(|call| lock(&call.step.0).clone()).unwrap_or_default();
    Err(Error::Exhausted(format!(
        "paths of the host do not answer: {of_pod} attempts of this pod and {all} in all are still waiting, the first at: \
         {first}; mend or unmount what is mounted there"
    )))
}

/// The caller's side of a call.
struct Waiting(Arc<Call>);

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        if *state == State::Running {
            *state = State::GivenUp;
            lock(&HANGING).push(self.0.clone());
        }
    }
}

/// The thread's side of it.
struct Running(Arc<Call>);

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        if std::mem::replace(&mut *state, State::Done) == State::GivenUp {
            lock(&HANGING).retain(|call| !Arc::ptr_eq(call, &self.0));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A call that hangs until `end` is dropped.
    async fn hang(pod: &str, end: &Arc<Mutex<mpsc::Receiver<()>>>) -> Error {
        let end = end.clone();
        let work = move |step: &Step| {
            step.begin("config.mounts[2].host_path: /mnt/dead does not answer: opening it".into());
            let _ = lock(&end).recv();
            Ok(())
        };
        within(pod, Duration::from_millis(50), work).await.unwrap_err()
    }

    #[tokio::test]
    async fn what_hangs_is_given_up_by_name_and_counted_until_it_returns() {
        let (release, end) = mpsc::channel();
        let end = Arc::new(Mutex::new(end));
        for _ in 0..OF_POD {
            let error = hang("hung", &end).await;
            let text = error.to_string();
            assert!(matches!(error, Error::Deadline { .. }) && text.contains("/mnt/dead does not answer"), "{text}");
        }
        let error = hang("hung", &end).await;
        let text = error.to_string();
        assert!(matches!(error, Error::Exhausted(_)) && text.contains("/mnt/dead"), "{text}");
        // Another pod is none the worse.
        assert_eq!(within("other", Duration::from_secs(60), |_| Ok(7)).await.unwrap(), 7);
        drop(release);
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while admit("hung").is_err() {
            assert!(std::time::Instant::now() < deadline, "it is counted though it has returned");
            tokio::task::yield_now().await;
        }
        assert_eq!(within("hung", Duration::from_secs(60), |_| Ok(7)).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn errors_and_panics_are_told() {
        let failing = |_: &Step| Err::<(), _>(Error::Invalid("this".into()));
        assert_eq!(within("failing", Duration::from_secs(60), failing).await.unwrap_err().to_string(), "this");
        let panicking = |_: &Step| -> Result<()> { panic!("on purpose") };
        let error = within("failing", Duration::from_secs(60), panicking).await.unwrap_err();
        assert!(matches!(error, Error::Internal(_)), "{error}");
        admit("failing").unwrap();
    }
}
