//! Signals by name and number.

use crate::{Error, Result};

/// Names without `SIG`, as on x86-64 Linux (signal(7)).
const NAMES: &[(&str, u32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];
/// First and last real-time signal as the C library counts them.
const REALTIME: std::ops::RangeInclusive<u32> = 34..=64;

/// SIGTERM, the signal that asks a process to end.
pub const TERM: u32 = 15;
/// SIGKILL, the signal that does not ask.
pub const KILL: u32 = 9;

/// The number of a signal given as `SIGTERM`, `TERM`, `15`, `RTMIN+3` or `RTMAX-1`.
pub fn parse(text: &str) -> Result<u32> {
    let unknown = || Error::Invalid(format!("unknown signal {text:?}"));
    let upper = text.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse::<u32>() {
        return if (1..=*REALTIME.end()).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let offset = |text: &str, sign: char| match text.strip_prefix(sign) {
        Some(number) => number.parse::<u32>().ok(),
        None => text.is_empty().then_some(0),
    };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        offset(rest, '+').and_then(|n| REALTIME.start().checked_add(n))
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        offset(rest, '-').and_then(|n| REALTIME.end().checked_sub(n))
    } else {
        None
    };
    number.filter(|number| REALTIME.contains(number)).ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_usual_spellings_are_understood() {
        for (text, number) in
            [("SIGTERM", 15), ("quit", 3), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX-1", 63), ("RTMIN", 34)]
        {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for text in ["", "0", "65", "SIGNONE", "RTMIN+31", "RTMAX-99", "RTMIN-1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
