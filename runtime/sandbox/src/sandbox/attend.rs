//! What a pod is owed: what could not be done at once is tried again until it is, or the pod ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use super::Sandbox;
use crate::model::SandboxState;
use crate::{Error, Result};

/// Pause before something is tried for a second time.
const FIRST: Duration = Duration::from_millis(500);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(30);

/// Whether somebody looks after a pod.
#[derive(Debug, Default)]
pub struct Attention {
    attended: AtomicBool,
    call: Arc<Notify>,
}

impl Attention {
    /// To be told when there is something to do.
    pub fn call(&self) -> Arc<Notify> {
        self.call.clone()
    }
}

impl Drop for Attention {
    fn drop(&mut self) {
        // Who looks after a pod that is gone looks up, and goes, too.
        self.call.notify_one();
    }
}

impl Sandbox {
    /// Has what the pod is owed done, now or later. Returns at once.
    pub fn attend(self: &Arc<Self>) {
        self.attention.call.notify_one();
        if self.attention.attended.swap(true, Ordering::Relaxed) {
            return;
        }
        let sandbox = Arc::downgrade(self);
        let call = self.attention.call();
        tokio::spawn(async move {
            let mut pause = FIRST;
            loop {
                call.notified().await;
                loop {
                    let Some(sandbox) = sandbox.upgrade() else { return };
                    let queue = sandbox.queue.clone();
                    let id = sandbox.id.clone();
                    let said = sandbox.lock().not_adopted.clone();
                    let done = queue.run(async move { sandbox.pay().await }).await;
                    match done {
                        Ok(()) => break,
                        Err(Error::Overtaken) => {}
                        Err(error) => {
                            let error = error.to_string();
                            // The same words over and over help nobody.
                            if pause == FIRST || said.is_some_and(|said| said != error) {
                                tracing::warn!(target: "nacelle::recovery", sandbox = id, error, "to be tried again");
                            }
                        }
                    }
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = call.notified() => {}
                    }
                    pause = (pause * 2).min(LONGEST);
                }
                pause = FIRST;
            }
        });
    }

    /// Does what is to be done. Nothing that is wrong keeps the rest from being done.
    async fn pay(self: &Arc<Self>) -> Result<()> {
        if self.kept.is_some() || self.removed.load(Ordering::Relaxed) || self.state() == SandboxState::Creating {
            return Ok(());
        }
        let adopted = self.adopt().await;
        if let Err(error) = &adopted {
            self.lock().not_adopted = Some(error.to_string());
        }
        let mut owed = adopted;
        owed = owed.and(self.settle_containers().await);
        owed = owed.and(self.retire_containers().await);
        owed = owed.and(self.save().await);
        for container in self.containers() {
            owed = owed.and(container.save().await);
        }
        owed
    }
}
