//! One timer for all deadlines of something.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// A descriptor that becomes readable at the earliest deadline it was told of.
#[derive(Debug)]
pub struct Timer {
    fd: OwnedFd,
    armed: Option<Instant>,
}

impl Timer {
    /// One that is not armed.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { fd: timerfd_create(TimerfdClockId::Monotonic, flags)?, armed: None })
    }

    /// Makes sure that the timer expires at `deadline` or before.
    pub fn arm(&mut self, deadline: Instant) {
        if self.armed.is_some_and(|armed| armed <= deadline) {
            return;
        }
        // A time of zero would disarm it.
        let wait = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let it_value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        // It cannot fail: the descriptor is a timer and the time is in range.
        let set = timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value });
        self.armed = set.is_ok().then_some(deadline);
    }

    /// Takes note that it expired, if it did; it has to be armed anew then.
    pub fn expired(&mut self) -> bool {
        // It fails only if it did not expire.
        let expired = rustix::io::read(&self.fd, &mut [0; 8]).is_ok();
        if expired {
            self.armed = None;
        }
        expired
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
