//! When something last moved on a connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Touched whenever something is read or written. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Activity {
    start: Instant,
    /// Milliseconds since the start.
    last: Arc<AtomicU64>,
}

impl Default for Activity {
    fn default() -> Self {
        Self { start: Instant::now(), last: Arc::default() }
    }
}

impl Activity {
    /// Something moved.
    pub fn touch(&self) {
        self.last.store(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Waits until nothing has moved for as long as `limit`.
    pub async fn idle(&self, limit: Duration) {
        loop {
            let until = self.start + Duration::from_millis(self.last.load(Ordering::Relaxed)) + limit;
            if Instant::now() >= until {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_connection_at_rest_is_idle() {
        let activity = Activity::default();
        let begun = Instant::now();
        let idle = activity.idle(Duration::from_secs(10));
        tokio::pin!(idle);
        for _ in 0..5 {
            assert!(tokio::time::timeout(Duration::from_secs(6), idle.as_mut()).await.is_err());
            activity.touch();
        }
        idle.await;
        assert!(begun.elapsed() >= Duration::from_secs(40), "{:?}", begun.elapsed());
    }
}
