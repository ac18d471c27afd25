//! What a VMM and its guest leave to say of their end. A VMM that was broken out of may have written it: it is read as
//! little as is shown, and from files only.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::process::{WaitId, WaitIdOptions};

use crate::beneath::Directory;

/// Lines of the guest's console that go into an error message.
const CONSOLE_LINES: usize = 15;
/// Lines of the VMM's that do.
const LINES: usize = 3;
/// Bytes looked at for those.
const TAIL: u64 = 2048;
/// Letters of one line that are passed on.
const LINE: usize = 500;

/// Why the process behind the pidfd ended, with its last words from the directory `run`; reaps it if it is our child.
/// Blocks.
pub fn exit_reason(pidfd: &OwnedFd, run: &Path) -> String {
    let status = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).ok().flatten();
    let words = match &status {
        Some(status) => match (status.exit_status(), status.terminating_signal()) {
            (Some(0), _) => "the guest powered off".to_owned(),
            (Some(code), _) => format!("the VMM ended with exit code {code}"),
            (_, Some(signal)) => format!("the VMM was killed by signal {signal}"),
            _ => "the VMM ended".to_owned(),
        },
        None => "the VMM ended".to_owned(),
    };
    let mut said = last_lines(run, "vmm.log");
    said.extend(nacelle_vmm::console::tail(&run.join("messages"), LINES).unwrap_or_default());
    if said.is_empty() { words } else { format!("{words}: {}", said.join("; ")) }
}

/// The last lines of a file of text.
fn last_lines(run: &Path, name: &str) -> Vec<String> {
    let open = || Directory::open(run)?.file(name, OFlags::RDONLY, 0);
    let Ok(mut file) = open() else { return Vec::new() };
    let mut text = Vec::new();
    let read = |file: &mut File, text: &mut Vec<u8>| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        file.take(TAIL).read_to_end(text)
    };
    if read(&mut file, &mut text).is_err() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&text);
    let mut lines: Vec<String> = text
        .lines()
        .rev()
        .map(|line| line.trim().chars().filter(|letter| !letter.is_control()).take(LINE).collect::<String>())
        .filter(|line| !line.is_empty())
        .take(LINES)
        .collect();
    lines.reverse();
    lines
}

/// The last lines of the guest's console as the tail of an error message.
pub fn console(path: &Path) -> String {
    let lines = nacelle_vmm::console::tail(path, CONSOLE_LINES).unwrap_or_default();
    if lines.is_empty() {
        return String::new();
    }
    lines.iter().fold("; last lines of its console:".to_owned(), |text, line| text + "\n  " + line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_s_last_words_come_from_its_own_file_and_are_few() {
        let directory = tempfile::tempdir().unwrap();
        let (run, log) = (directory.path(), directory.path().join("vmm.log"));
        assert!(last_lines(run, "vmm.log").is_empty());
        std::fs::write(&log, format!("{}\none\n\n\x1b[2Jtwo\nthree\nfour", "x".repeat(5000))).unwrap();
        assert_eq!(last_lines(run, "vmm.log"), ["[2Jtwo", "three", "four"]);
        std::fs::remove_file(&log).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &log).unwrap();
        assert!(last_lines(run, "vmm.log").is_empty(), "a link leads elsewhere");
        std::fs::remove_file(&log).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &log, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        assert!(last_lines(run, "vmm.log").is_empty(), "nobody waits for a writer");
    }
}
