//! One pod's line: what changes a pod is done one after the other, each to its end.
//!
//! An operation is a future handed to the pod's task. The caller waits for its result,
//! but may go away: the operation runs on, so a cancelled call leaves nothing half made.

use std::future::Future;
use std::pin::Pin;

use tokio::sync::{mpsc, oneshot};

use crate::{Error, Result};

type Operation = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs operations in the order they were handed in.
#[derive(Debug, Clone)]
pub struct Queue {
    operations: mpsc::UnboundedSender<Operation>,
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
        Self { operations }
    }

    /// Runs `operation` when its turn comes and returns what it returns.
    pub async fn run<T, F>(&self, operation: F) -> Result<T>
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
}
