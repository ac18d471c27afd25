//! The guest's clock: set when the pod is made, and from then on by the host's, as often as the host says how late it is.
//!
//! It runs by the host's raw clock, which nobody corrects, and nothing in the guest knows better.

use std::io;

use nacelle_proto::agent::v1::{SetClockRequest, SetClockResponse};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::error::{Error, Result};
use crate::log::{self, Level};

const SECOND: i64 = 1_000_000_000;
/// What is set at once when the clock is off by more than this, in nanoseconds; less is slewed, so that no time is
/// missing and none comes twice.
const STEP: i128 = 1_000_000_000;

/// What is to be done about a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Correction {
    /// It is to be set to this many nanoseconds since the Unix epoch.
    Step(i64),
    /// It is to be slewed by this many microseconds.
    Slew(i64),
}

/// Sets the clock as the host says, or tells it.
pub fn set(request: &SetClockRequest) -> Result<SetClockResponse> {
    let mut stepped = false;
    if request.at != 0 {
        let (at, guest_time) = read();
        match correction(request, at, guest_time)? {
            Correction::Step(time) => {
                step(time.div_euclid(SECOND), time.rem_euclid(SECOND))?;
                stepped = true;
                let off = time.saturating_sub(guest_time) / 1_000_000;
                log::line(Level::Info, &format!("clock set, which was off by {off} ms"));
            }
            Correction::Slew(microseconds) => slew(microseconds).map_err(Error::system("slew the clock"))?,
        }
    }
    let (at, guest_time) = read();
    Ok(SetClockResponse { at, guest_time, stepped })
}

/// Sets the clock to a time since the Unix epoch, or leaves it if there is none.
pub fn start(seconds: i64, nanoseconds: i32) -> Result<()> {
    match seconds {
        0 => Ok(()),
        _ => step(seconds, nanoseconds.into()),
    }
}

/// What the host's clock says of ours, whose two readings these are.
fn correction(request: &SetClockRequest, at: i64, guest_time: i64) -> Result<Correction> {
    let late = i128::from(at) - i128::from(request.at);
    if request.at < 0 || late < 0 {
        return Err(Error::invalid("at", format!("{} is no instant that has been in this guest", request.at)));
    }
    if request.host_time <= 0 {
        return Err(Error::invalid("host_time", format!("{} is not after 1970", request.host_time)));
    }
    let now = i128::from(request.host_time) + late;
    let off = now - i128::from(guest_time);
    let fits = |value: i128| {
        i64::try_from(value).map_err(|_| Error::invalid("host_time", format!("{} is no time", request.host_time)))
    };
    match off.abs() > STEP {
        true => Ok(Correction::Step(fits(now)?)),
        false => Ok(Correction::Slew(fits(off / 1000)?)),
    }
}

/// The monotonic clock that nobody slews, and the clock, at almost the same instant.
fn read() -> (i64, i64) {
    let nanoseconds = |clock| {
        let Timespec { tv_sec, tv_nsec } = clock_gettime(clock);
        tv_sec.saturating_mul(SECOND).saturating_add(tv_nsec)
    };
    (nanoseconds(ClockId::MonotonicRaw), nanoseconds(ClockId::Realtime))
}

fn step(seconds: i64, nanoseconds: i64) -> Result<()> {
    // What is left of an earlier slew ends by it.
    clock_settime(ClockId::Realtime, Timespec { tv_sec: seconds, tv_nsec: nanoseconds })
        .map_err(Error::system("set the clock"))
}

/// Has the clock gain, or lose, this much in the time to come, in place of what was left of an earlier slew.
fn slew(microseconds: i64) -> io::Result<()> {
    // SAFETY: all bytes zero are a valid value of the structure.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_OFFSET_SINGLESHOT;
    change.offset = microseconds;
    // SAFETY: the call reads and writes one structure, which outlives it.
    match unsafe { libc::adjtimex(&raw mut change) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: i64 = 1_800_000_000 * SECOND;

    fn decide(at: i64, host_time: i64, guest: (i64, i64)) -> Result<Correction> {
        correction(&SetClockRequest { at, host_time }, guest.0, guest.1)
    }

    #[test]
    fn a_little_is_slewed_and_more_is_set() {
        // Half a second after the instant that was measured, by a clock that is 20 ms behind.
        let guest = (10 * SECOND + SECOND / 2, NOW + SECOND / 2);
        assert_eq!(decide(10 * SECOND, NOW + 20_000_000, guest).unwrap(), Correction::Slew(20_000));
        assert_eq!(decide(10 * SECOND, NOW - 20_000_000, guest).unwrap(), Correction::Slew(-20_000));
        assert_eq!(decide(10 * SECOND, NOW + SECOND, guest).unwrap(), Correction::Slew(1_000_000));
        let hour = 3600 * SECOND;
        assert_eq!(decide(10 * SECOND, NOW + hour, guest).unwrap(), Correction::Step(NOW + hour + SECOND / 2));
        assert_eq!(decide(10 * SECOND, NOW - hour, guest).unwrap(), Correction::Step(NOW - hour + SECOND / 2));
    }

    #[test]
    fn a_request_that_comes_twice_or_late_means_the_same() {
        let first = decide(SECOND, NOW, (2 * SECOND, NOW - 3600 * SECOND)).unwrap();
        assert_eq!(first, Correction::Step(NOW + SECOND));
        // A minute later, the clock being right by now.
        let again = decide(SECOND, NOW, (62 * SECOND, NOW + 61 * SECOND)).unwrap();
        assert_eq!(again, Correction::Slew(0));
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_field() {
        for (at, host_time, field) in
            [(-1, NOW, "at"), (11, NOW, "at"), (5, 0, "host_time"), (5, -1, "host_time"), (1, i64::MAX, "host_time")]
        {
            let error = decide(at, host_time, (10, 0)).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{field}: ")), "{error}");
        }
    }

    #[test]
    fn without_an_instant_the_clock_is_only_told() {
        let told = set(&SetClockRequest::default()).unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        assert!(told.at > 0 && !told.stepped);
        assert!((i128::from(told.guest_time) - now.as_nanos() as i128).abs() < i128::from(60 * SECOND));
    }

    proptest! {
        #[test]
        fn no_request_makes_it_panic(at: i64, host_time: i64, raw: i64, time: i64) {
            let _ = decide(at, host_time, (raw, time));
        }
    }
}
