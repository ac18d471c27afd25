//! The guest's clock, which follows the host's.
//!
//! A guest's clock runs by the host's raw one, which nobody corrects, and is set once, when the pod is made. So each guest
//! is asked for its clock now and then, and told what it should be: by the instant at which it was read in the guest, half
//! a round trip after it was asked, so that what the second call takes does not matter. A host whose clock is set tells its
//! guests at once.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nacelle_proto::agent::v1 as api;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::sync::watch;
use tonic::{Code, Status};

use crate::agent::Agent;
use crate::clock;
use crate::vm::Vm;

/// How often a guest is asked, before the configuration's factor.
const PERIOD: Duration = Duration::from_secs(10);
/// How long it may take to answer, before the factor: a time that takes longer to tell says little.
const PATIENCE: Duration = Duration::from_secs(5);
/// What a clock may be off by, however fast the guest answers, in nanoseconds.
const TOLERANCE: i128 = 1_000_000;

/// Keeps the clock of a guest with the host's until its VMM has ended, or its agent turns out not to know the call.
/// `pod` is its id, for the log; `scale` is the configuration's factor on times. A guest that does not answer is asked again later; nobody is told.
pub async fn keep(agent: Agent, vm: Arc<Vm>, pod: String, scale: f64) {
    let follow = async {
        let mut steps = steps();
        let mut times_set = 0_u64;
        let mut complained = false;
        loop {
            steps.borrow_and_update();
            match tokio::time::timeout(PATIENCE.mul_f64(scale), correct(&agent)).await {
                Ok(Ok(Some(off))) => {
                    times_set += 1;
                    // A guest may have itself set as often as it likes, or say so.
                    if times_set.is_power_of_two() {
                        tracing::info!(pod, off_ms = off / 1_000_000, times_set, "guest's clock set");
                    }
                }
                Ok(Ok(None)) | Err(_) => {}
                Ok(Err(status)) if status.code() == Code::Unimplemented => {
                    tracing::debug!(pod, "the guest's agent cannot set its clock");
                    return;
                }
                Ok(Err(status)) if !complained => {
                    complained = true;
                    let error = crate::agent::error("set the guest's clock", &status);
                    tracing::debug!(pod, %error, "guest's clock not set");
                }
                Ok(Err(_)) => {}
            }
            tokio::select! {
                () = tokio::time::sleep(PERIOD.mul_f64(scale)) => {}
                () = changed(&mut steps) => {}
            }
        }
    };
    tokio::select! {
        () = follow => {}
        _ = vm.wait_exit() => {}
    }
}

/// Asks a guest for its clock and corrects it; answers by how many nanoseconds it was off if it was set for that.
async fn correct(agent: &Agent) -> Result<Option<i128>, Status> {
    if !agent.answers() {
        // Somebody asks it already.
        return Ok(None);
    }
    let mut client = agent.client();
    let (sent, begun) = (clock::now(), Instant::now());
    let told = client.set_clock(api::SetClockRequest::default()).await?.into_inner();
    let reading = Reading { sent, took: begun.elapsed(), at: told.at, guest_time: told.guest_time };
    let Some(request) = reading.correction() else { return Ok(None) };
    let stepped = client.set_clock(request).await?.into_inner().stepped;
    Ok(stepped.then(|| reading.off()))
}

/// A guest's clock, read once.
#[derive(Debug, Clone, Copy)]
struct Reading {
    /// When it was asked, by the host's clock in nanoseconds since the Unix epoch.
    sent: i64,
    /// What the answer took.
    took: Duration,
    /// The guest's two clocks.
    at: i64,
    guest_time: i64,
}

impl Reading {
    /// The host's clock when the guest's was read, in all likelihood.
    fn host_time(&self) -> i128 {
        i128::from(self.sent) + i128::try_from(self.took.as_nanos() / 2).unwrap_or(i128::MAX / 4)
    }

    /// By how much the guest's clock is behind.
    fn off(&self) -> i128 {
        self.host_time() - i128::from(self.guest_time)
    }

    /// What the guest is to be told, if its clock is off by more than this reading may be wrong. What is left then is less
    /// than half of what it was.
    fn correction(&self) -> Option<api::SetClockRequest> {
        let certain = i128::try_from(self.took.as_nanos()).unwrap_or(i128::MAX).max(TOLERANCE);
        let host_time = i64::try_from(self.host_time()).ok()?;
        (self.at > 0 && self.off().abs() > certain).then_some(api::SetClockRequest { at: self.at, host_time })
    }
}

/// Changes whenever somebody sets the host's clock.
fn steps() -> watch::Receiver<u64> {
    static STEPS: OnceLock<watch::Receiver<u64>> = OnceLock::new();
    let listen = || {
        let (sender, receiver) = watch::channel(0);
        let listener = std::thread::Builder::new().name("clock".into()).spawn(move || {
            let Err(error) = tell_steps(&sender);
            tracing::warn!(%error, "a clock of the host that is set is noticed late");
        });
        if let Err(error) = listener {
            tracing::warn!(%error, "a clock of the host that is set is noticed late");
        }
        receiver
    };
    STEPS.get_or_init(listen).clone()
}

/// Waits for the next change, for ever if nobody listens for one.
async fn changed(steps: &mut watch::Receiver<u64>) {
    if steps.changed().await.is_err() {
        std::future::pending().await
    }
}

/// A timer that never comes, but is cancelled when the clock is set (timerfd_create(2)).
fn tell_steps(steps: &watch::Sender<u64>) -> io::Result<std::convert::Infallible> {
    let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::CLOEXEC)?;
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    let never = Itimerspec { it_interval: zero, it_value: Timespec { tv_sec: i64::MAX, tv_nsec: 0 } };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    loop {
        timerfd_settime(&timer, flags, &never)?;
        match rustix::io::read(&timer, &mut [0_u8; 8]) {
            Err(Errno::CANCELED) => steps.send_modify(|count| *count += 1),
            Err(Errno::INTR) => {}
            Ok(_) => return Err(io::Error::other("a timer came that never comes")),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000_000_000;
    const MILLISECOND: i64 = 1_000_000;

    /// Read with an answer that took so long, by a clock that is behind by so much, in milliseconds.
    fn reading(took: u64, behind: i64) -> Reading {
        let guest_time = NOW + took as i64 * MILLISECOND / 2 - behind * MILLISECOND;
        Reading { sent: NOW, took: Duration::from_millis(took), at: 77, guest_time }
    }

    #[test]
    fn a_clock_that_is_off_is_told_what_it_should_have_been_when_it_was_read() {
        let request = reading(6, 20).correction().unwrap();
        assert_eq!(request, api::SetClockRequest { at: 77, host_time: NOW + 3 * MILLISECOND });
        assert_eq!(reading(6, 20).off(), i128::from(20 * MILLISECOND));
        assert_eq!(reading(6, -20).off(), i128::from(-20 * MILLISECOND));
        let hour = 3_600_000;
        assert_eq!(reading(6, hour).correction().unwrap().host_time, NOW + 3 * MILLISECOND);
    }

    #[test]
    fn what_may_be_the_way_s_fault_changes_nothing() {
        for (took, behind) in [(0, 0), (0, 1), (0, -1), (50, 50), (50, -50), (5000, 4999)] {
            assert_eq!(reading(took, behind).correction(), None, "{took} {behind}");
        }
        for (took, behind) in [(0, 2), (50, 51), (50, -51), (5000, 5001)] {
            assert!(reading(took, behind).correction().is_some(), "{took} {behind}");
        }
    }

    #[test]
    fn a_guest_may_say_what_it_likes() {
        for (at, guest_time) in [(i64::MIN, 0), (0, 0), (-1, i64::MAX), (1, i64::MIN), (i64::MAX, i64::MAX)] {
            let reading = Reading { sent: NOW, took: Duration::from_millis(1), at, guest_time };
            assert_eq!(reading.correction().is_some(), at > 0);
        }
    }
}
