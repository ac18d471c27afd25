//! What the VMM itself has to say, beside its guest's console.
//!
//! Once the machine is about to be built it goes to a ring in the pod's directory ([`crate::console`]), of
//! [`MESSAGES_SIZE`] bytes, and nowhere else: a guest can bring about messages as often as
//! it likes, and must neither make a file of the host grow nor push out what was said of something else. So what is said
//! again of the same thing is counted. Before, it goes to standard error. That a message cannot be written is never an
//! error: a VMM serves its guest whether somebody listens or not.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::{panic, process, thread};

use crate::chain;
use crate::console::{ConsoleError, MESSAGES_SIZE, Ring};

/// Longest line in bytes.
const LINE_LIMIT: usize = 512;
/// Most things of which it is known what was said: more than a bus has devices.
const SUBJECT_LIMIT: usize = 128;
/// How often a thread that panics tries for what another is writing.
const TRIES: usize = 1000;

/// Those of this process.
static MESSAGES: Mutex<Messages> = Mutex::new(Messages { ring: None, said: BTreeMap::new() });

/// Where messages go, and what was said.
struct Messages {
    /// None: to standard error.
    ring: Option<Ring>,
    /// What was said last of each thing.
    said: BTreeMap<String, Said>,
}

struct Said {
    reason: String,
    times: u64,
}

impl Messages {
    fn line(&mut self, text: &str) {
        let mut line = text.get(..text.floor_char_boundary(LINE_LIMIT)).unwrap_or_default().to_owned();
        line.push('\n');
        // There is nobody to tell that it failed.
        let _ = match &mut self.ring {
            Some(ring) => ring.write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
    }

    /// Says `reason` of `subject`, unless that was said last. What is said again is counted, and said at each power of two.
    fn report(&mut self, subject: &str, reason: &str) {
        match self.said.get_mut(subject) {
            Some(said) if said.reason == reason => {
                said.times = said.times.saturating_add(1);
                if said.times.is_power_of_two() {
                    let text = told(subject, said);
                    self.line(&text);
                }
                return;
            }
            _ => self.settle(subject),
        }
        if self.said.len() >= SUBJECT_LIMIT {
            self.settle_all();
        }
        self.line(&format!("{subject}: {reason}"));
        self.said.insert(subject.to_owned(), Said { reason: reason.to_owned(), times: 1 });
    }

    /// Says how often the last was said, if that is not known. It is forgotten.
    fn settle(&mut self, subject: &str) {
        if let Some(said) = self.said.remove(subject)
            && !said.times.is_power_of_two()
        {
            self.line(&told(subject, &said));
        }
    }

    fn settle_all(&mut self) {
        while let Some(subject) = self.said.keys().next().cloned() {
            self.settle(&subject);
        }
    }
}

fn told(subject: &str, said: &Said) -> String {
    format!("{subject}: {} ({} times)", said.reason, said.times)
}

fn lock() -> MutexGuard<'static, Messages> {
    MESSAGES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has all messages from now on go to a new ring at `path`.
///
/// # Errors
/// If it exists, or cannot be made.
pub fn open(path: &Path) -> Result<(), ConsoleError> {
    let ring = Ring::create(path, MESSAGES_SIZE)?;
    lock().ring = Some(ring);
    Ok(())
}

/// Says what went wrong with something, and its causes, on one line.
pub fn report(subject: &str, error: &dyn StdError) {
    lock().report(&format!("nacelle vmm: {subject}"), &chain(error));
}

/// Says something for the last time: with it, how often everything else was said.
pub fn say(text: &str) {
    let mut messages = lock();
    messages.settle_all();
    messages.line(text);
}

/// From now on a panic on any thread is a message, and ends the process at once (SIGABRT): what that thread had in hand may
/// be half done, and nobody else would notice that it is gone.
pub fn end_at_a_panic() {
    panic::set_hook(Box::new(|info| {
        let text = format!("nacelle vmm: {}", info.to_string().replace('\n', " "));
        // It may be this thread itself that holds them.
        for _ in 0..TRIES {
            match MESSAGES.try_lock() {
                Err(TryLockError::WouldBlock) => thread::yield_now(),
                Err(TryLockError::Poisoned(messages)) => {
                    messages.into_inner().line(&text);
                    break;
                }
                Ok(mut messages) => {
                    messages.line(&text);
                    break;
                }
            }
        }
        process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console;

    fn messages() -> (tempfile::TempDir, Messages, impl Fn() -> Vec<String>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("messages");
        let ring = Ring::create(&path, MESSAGES_SIZE).unwrap();
        (directory, Messages { ring: Some(ring), said: BTreeMap::new() }, move || console::tail(&path, 1000).unwrap())
    }

    #[test]
    fn what_is_said_again_is_counted_until_something_else_is_said_of_the_same_thing() {
        let (_directory, mut messages, lines) = messages();
        for _ in 0..6 {
            messages.report("slot 1", "broken");
            messages.report("slot 2", "odd");
        }
        messages.report("slot 1", "worse");
        messages.report("slot 1", "broken");
        messages.settle_all();
        let slot = |slot: &str| lines().into_iter().filter(|line| line.starts_with(slot)).collect::<Vec<_>>();
        let of_one = ["broken", "broken (2 times)", "broken (4 times)", "broken (6 times)", "worse", "broken"];
        assert_eq!(slot("slot 1"), of_one.map(|reason| format!("slot 1: {reason}")));
        assert_eq!(slot("slot 2").last().unwrap(), "slot 2: odd (6 times)");
        assert_eq!(lines().len(), 10);
    }

    #[test]
    fn a_guest_that_makes_it_speak_a_million_times_pushes_nothing_out() {
        let (directory, mut messages, lines) = messages();
        messages.report("the guest has no random number device", "no descriptor");
        for _ in 0..1_000_000 {
            messages.report("the device in slot 1 needs a reset", "queue 0 makes no sense");
        }
        assert_eq!(lines()[0], "the guest has no random number device: no descriptor");
        assert_eq!(lines().len(), 21, "2^19 is the last power");
        let size = std::fs::metadata(directory.path().join("messages")).unwrap().len();
        assert_eq!(size, MESSAGES_SIZE as u64);
    }

    #[test]
    fn neither_many_things_nor_long_reasons_take_memory() {
        let (_directory, mut messages, lines) = messages();
        for number in 0..10 * SUBJECT_LIMIT {
            messages.report(&format!("thing {number}"), &"é".repeat(LINE_LIMIT));
        }
        assert!(messages.said.len() <= SUBJECT_LIMIT);
        assert!(lines().iter().all(|line| line.len() <= LINE_LIMIT));
    }
}
