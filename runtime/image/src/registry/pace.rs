//! How slow a download may be.
//!
//! Only the time counts in which the registry is waited for: a layer that is taken in slowly is not the registry's
//! fault.

use std::fmt;
use std::time::{Duration, Instant};

/// Over how much waiting the rate is looked at.
const WINDOW: Duration = Duration::from_secs(60);

/// Bounds on a download's slowness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Longest time without a byte, new attempts included; None for no limit.
    pub progress_timeout: Option<Duration>,
    /// Bytes a second, over a minute, below which a connection is given up; 0 for no limit.
    pub least_rate: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { progress_timeout: Some(Duration::from_secs(300)), least_rate: 1024 }
    }
}

/// A download that is too slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slow {
    /// Nothing came for this long.
    Silent(Duration),
    /// Less than this came in a second.
    Rate(u64),
}

impl fmt::Display for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent(time) => write!(f, "nothing came for {time:?}"),
            Self::Rate(rate) => write!(f, "it sent less than {rate} bytes a second"),
        }
    }
}

/// The pace of one download.
pub(super) struct Meter {
    pace: Pace,
    /// Waited since the last byte.
    silent: Duration,
    /// Waited, and received, since the rate was last looked at.
    waited: Duration,
    received: u64,
}

impl Meter {
    pub(super) fn new(pace: Pace) -> Self {
        Self { pace, silent: Duration::ZERO, waited: Duration::ZERO, received: 0 }
    }

    /// Waits for the registry to do something, as long as the pace allows.
    pub(super) async fn wait<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Slow> {
        let mut work = std::pin::pin!(work);
        loop {
            let begin = Instant::now();
            let done = tokio::time::timeout(self.patience(), &mut work).await;
            let late = self.waited(begin.elapsed());
            match done {
                Ok(done) => return Ok(done),
                Err(_) => late?,
            }
        }
    }

    /// Takes note of bytes.
    pub(super) fn received(&mut self, bytes: usize) {
        if bytes > 0 {
            self.silent = Duration::ZERO;
            self.received = self.received.saturating_add(bytes as u64);
        }
    }

    /// Whether nothing came for too long, so that another attempt is of no use.
    pub(super) fn is_over(&self) -> bool {
        self.pace.progress_timeout.is_some_and(|limit| self.silent >= limit)
    }

    fn patience(&self) -> Duration {
        let silence = self.pace.progress_timeout.map_or(WINDOW, |limit| limit.saturating_sub(self.silent));
        silence.min(WINDOW.saturating_sub(self.waited))
    }

    fn waited(&mut self, time: Duration) -> Result<(), Slow> {
        self.silent += time;
        self.waited += time;
        if let Some(limit) = self.pace.progress_timeout.filter(|limit| self.silent >= *limit) {
            return Err(Slow::Silent(limit));
        }
        if self.waited >= WINDOW {
            let least = self.pace.least_rate.saturating_mul(self.waited.as_secs());
            let received = std::mem::take(&mut self.received);
            self.waited = Duration::ZERO;
            if received < least {
                return Err(Slow::Rate(self.pace.least_rate));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Waits as the meter does, and receives `bytes` after each `every`.
    fn trickle(pace: Pace, bytes: usize, every: Duration, times: usize) -> Result<(), Slow> {
        let mut meter = Meter::new(pace);
        for _ in 0..times {
            let mut left = every;
            while !left.is_zero() {
                let step = left.min(meter.patience());
                assert!(!step.is_zero());
                meter.waited(step)?;
                left -= step;
            }
            meter.received(bytes);
        }
        Ok(())
    }

    #[test]
    fn silence_and_a_trickle_end_and_a_slow_link_does_not() {
        let pace = Pace::default();
        assert_eq!(trickle(pace, 2048, SECOND, 1000), Ok(()));
        assert_eq!(trickle(pace, 100_000, 59 * SECOND, 100), Ok(()));
        assert_eq!(trickle(pace, 1, SECOND / 2, 1000), Err(Slow::Rate(1024)));
        assert_eq!(trickle(pace, 1, 1000 * SECOND, 1), Err(Slow::Rate(1024)));
        let silent = Pace { progress_timeout: Some(10 * SECOND), least_rate: 0 };
        assert_eq!(trickle(silent, 1, 9 * SECOND, 30), Ok(()));
        assert_eq!(trickle(silent, 1 << 20, 11 * SECOND, 1), Err(Slow::Silent(10 * SECOND)));
        let free = Pace { progress_timeout: None, least_rate: 0 };
        assert_eq!(trickle(free, 1, 10_000 * SECOND, 3), Ok(()));
    }

    #[tokio::test]
    async fn silence_adds_up_over_attempts() {
        let limit = Duration::from_millis(50);
        let mut meter = Meter::new(Pace { progress_timeout: Some(limit), least_rate: 0 });
        assert_eq!(meter.wait(std::future::ready(1)).await, Ok(1));
        assert!(!meter.is_over());
        assert_eq!(meter.wait(std::future::pending::<()>()).await, Err(Slow::Silent(limit)));
        assert!(meter.is_over());
        meter.received(1);
        assert!(!meter.is_over());
    }
}
