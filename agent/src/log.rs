//! What the agent says, in the kernel's log: what happened at night, and last words.
//!
//! In normal operation it says nothing: each character on the serial console costs an exit of the virtual machine. Errors
//! reach the console, and so the host, which shows them with a pod that ended; the rest stays in the guest's own log.
//! Lines are bounded in number and length, and nothing that somebody else has said ends a line.

use std::fs::OpenOptions;
use std::io::Write;
use std::panic;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::shorten;

/// How much a line matters, in the kernel's numbers. With `quiet` on its command line it shows what is below 4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// The agent is about to end.
    Critical = 2,
    /// Something failed that should not.
    Error = 3,
    /// What may help whoever looks for a reason.
    Info = 6,
}

/// Longest line in bytes, its beginning apart.
const LENGTH: usize = 400;
/// What is kept of the end of a longer one.
const END: usize = 120;
/// So many lines may come at once,
const BURST: u32 = 20;
/// and in the long run one in this time. The kernel itself takes two a second from one writer.
const INTERVAL: Duration = Duration::from_secs(10);

/// Of errors, and of the rest: what is said often keeps nobody from saying that something failed.
static RATIONS: [Mutex<Option<Ration>>; 2] = [const { Mutex::new(None) }; 2];

/// How many lines may still be written.
#[derive(Debug)]
struct Ration {
    left: u32,
    /// When the last one was added.
    filled: Instant,
    /// How many were not written since the last that was.
    dropped: u64,
}

impl Ration {
    fn new(now: Instant) -> Self {
        Self { left: BURST, filled: now, dropped: 0 }
    }

    /// How many lines were dropped before this one, which may be written; nothing if it may not.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let passed = now.saturating_duration_since(self.filled);
        let more = u32::try_from(passed.as_secs() / INTERVAL.as_secs()).unwrap_or(u32::MAX);
        if more > 0 {
            self.left = self.left.saturating_add(more).min(BURST);
            self.filled = now;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.dropped))
            }
            None => {
                self.dropped = self.dropped.saturating_add(1);
                None
            }
        }
    }
}

/// Puts a line into the kernel's log, unless there were too many.
pub fn line(level: Level, message: &str) {
    let now = Instant::now();
    let [errors, rest] = &RATIONS;
    let dropped = {
        let ration = if level == Level::Info { rest } else { errors };
        let mut ration = ration.lock().unwrap_or_else(PoisonError::into_inner);
        ration.get_or_insert_with(|| Ration::new(now)).take(now)
    };
    match dropped {
        None => {}
        Some(0) => drop(write(level, message)),
        Some(dropped) => drop(write(level, &format!("{message} (and {dropped} lines before that were too many)"))),
    }
}

/// Puts a line into the kernel's log, at a level that reaches the console.
pub fn last_words(message: &str) {
    if write(Level::Critical, message).is_err() {
        // Before /dev is there, the kernel may have given us the console itself.
        eprint!("{}", format(Level::Critical, message));
    }
}

/// Makes a panic of PID 1 leave its reason on the console before the kernel follows.
pub fn install_panic_hook() {
    panic::set_hook(Box::new(|panic| last_words(&panic.to_string())));
}

fn write(level: Level, message: &str) -> std::io::Result<()> {
    // As a test's program it has no guest to speak for.
    if std::process::id() != 1 {
        return Ok(());
    }
    OpenOptions::new().write(true).open("/dev/kmsg")?.write_all(format(level, message).as_bytes())
}

fn format(level: Level, message: &str) -> String {
    let plain: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("<{}>nacelle-agent: {}\n", level as u8, shorten(&plain, LENGTH, END))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_of_bounded_length() {
        let line = format(Level::Error, "cannot execute \"a\n<0>b\u{1b}[2J\"");
        assert_eq!(line, "<3>nacelle-agent: cannot execute \"a <0>b [2J\"\n");
        let line = format(Level::Info, &"x".repeat(1 << 20));
        assert!(line.starts_with("<6>") && line.len() < LENGTH + 100, "{line}");
    }

    #[test]
    fn lines_are_rationed_and_what_was_dropped_is_told() {
        let begin = Instant::now();
        let mut ration = Ration::new(begin);
        let taken = (0..1000).filter(|_| ration.take(begin).is_some()).count();
        assert_eq!(taken, BURST as usize);
        assert_eq!(ration.take(begin + INTERVAL), Some(1000 - u64::from(BURST)));
        assert_eq!(ration.take(begin + INTERVAL), None);
        assert_eq!(ration.take(begin + INTERVAL * 2), Some(1));
        // However long nobody said anything, no more than at the beginning.
        let later = begin + Duration::from_secs(1_000_000_000);
        assert_eq!((0..1000).filter(|_| ration.take(later).is_some()).count(), BURST as usize);
    }
}
