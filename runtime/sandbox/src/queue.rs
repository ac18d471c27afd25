//! One pod's line: what changes a pod is done one after the other, each to its end.
//!
//! An operation is a future handed to the pod's task. The caller waits for its result,
//! but may go away: the operation runs on, so a cancelled call leaves nothing half made.
//!
//! The end of a pod overtakes: whatever is under way or waits is given up, since what it may
//! hang on (a dead server's directory, a guest that does not answer) must not hold the pod's
//! end up, and what it leaves half made ends with the pod.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};

use crate::{Error, Result};

type Operation = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs operations in the order they were handed in.
#[derive(Debug, Clone)]
pub struct Queue {
    operations: mpsc::UnboundedSender<Operation>,
    /// How often what is under way was to be given up.
    overtaken: Arc<watch::Sender<u64>>,
}

impl Queue {
    /// A queue with its own task, which ends when the last handle is dropped and the
    /// line is empty.
    pub fn new() -> Self {
        let (operations, mut line) = mpsc::unbounded_channel::<Operation>();
        tokio::spawn(async move {
            while let Some(operation) = line.recv().await {
                // A panic in one operation must not end the line for the next.
                if let Err(error) = tokio::spawn(operation).await {
                    tracing::error!(%error, "operation on a pod ended abnormally");
                }
            }
        });
        Self { operations, overtaken: Arc::new(watch::Sender::new(0)) }
    }

    /// Runs `operation` when its turn comes and returns what it returns; given up, where it is, by
    /// [`Queue::overtake`].
    pub async fn run<T, F>(&self, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let mut overtaken = self.overtaken.subscribe();
        self.run_to_end(async move {
            tokio::select! {
                biased;
                _ = overtaken.changed() => Err(Error::Overtaken),
                result = operation => result,
            }
        })
        .await
    }

    /// Gives up what was handed in by [`Queue::run`] so far, and runs `operation` instead.
    pub async fn overtake<T, F>(&self, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.overtaken.send_modify(|times| *times += 1);
        self.run_to_end(operation).await
    }

    /// Runs `operation` when its turn comes and returns what it returns. Nothing overtakes it.
    pub async fn run_to_end<T, F>(&self, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let (answer, result) = oneshot::channel();
        let boxed: Operation = Box::pin(async move {
            let _ = answer.send(operation.await);
        });
        self.operations.send(boxed).map_err(|_| Error::Internal("the pod's queue has ended".into()))?;
        result.await.map_err(|_| Error::Internal("an operation on the pod ended abnormally".into()))?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn operations_keep_their_order() {
        let queue = Queue::new();
        let seen = Arc::new(AtomicU32::new(0));
        let mut waiting = Vec::new();
        for turn in 0..50 {
            let seen = seen.clone();
            let queue = queue.clone();
            let (operations, result) = oneshot::channel::<u32>();
            let boxed: Operation = Box::pin(async move {
                tokio::task::yield_now().await;
                let _ = operations.send(seen.fetch_add(1, Ordering::SeqCst));
            });
            queue.operations.send(boxed).unwrap();
            waiting.push((turn, result));
        }
        for (turn, result) in waiting {
            assert_eq!(result.await.unwrap(), turn);
        }
    }

    #[tokio::test]
    async fn an_abandoned_operation_runs_to_its_end() {
        let queue = Queue::new();
        let (started, wait_started) = oneshot::channel();
        let (release, wait_release) = oneshot::channel::<()>();
        let (done, wait_done) = oneshot::channel();
        let caller = queue.clone();
        let call = tokio::spawn(async move {
            caller
                .run(async move {
                    let _ = started.send(());
                    let _ = wait_release.await;
                    let _ = done.send(());
                    Ok(())
                })
                .await
        });
        wait_started.await.unwrap();
        call.abort();
        release.send(()).unwrap();
        wait_done.await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_ends_only_its_own_operation() {
        let queue = Queue::new();
        let result = queue.run::<(), _>(async { panic!("expected in this test") }).await;
        assert!(matches!(result, Err(Error::Internal(_))));
        assert!(matches!(queue.run(async { Ok(7) }).await, Ok(7)));
    }

    #[tokio::test]
    async fn the_end_of_a_pod_waits_for_nothing_that_hangs() {
        let queue = Queue::new();
        let (started, wait_started) = oneshot::channel();
        let hanging = queue.clone();
        let hanging = tokio::spawn(async move {
            hanging
                .run::<(), _>(async move {
                    let _ = started.send(());
                    std::future::pending().await
                })
                .await
        });
        wait_started.await.unwrap();
        let waiting = queue.clone();
        let waiting = tokio::spawn(async move { waiting.run(async { Ok(1) }).await });
        tokio::task::yield_now().await;
        assert!(matches!(queue.overtake(async { Ok(2) }).await, Ok(2)));
        assert!(matches!(hanging.await.unwrap(), Err(Error::Overtaken)));
        assert!(matches!(waiting.await.unwrap(), Err(Error::Overtaken)));
        assert!(matches!(queue.run(async { Ok(3) }).await, Ok(3)), "what comes later is not concerned");
    }
}
