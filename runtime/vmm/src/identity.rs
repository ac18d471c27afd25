//! Which process a VMM is, on record in its pod's directory.
//!
//! It writes the record before it does anything for its guest. So a daemon that was killed after it had started a VMM,
//! and before it could put that on record itself, still knows whose process it is. A number alone says little, for it
//! is used again: with the time of its start and the boot of the host it stands for one process for ever.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Longest record in bytes: a process id, a start time and a boot id.
pub const RECORD_LIMIT: usize = 10 + 1 + 20 + 1 + BOOT_ID + 1;
/// Length of a boot id.
const BOOT_ID: usize = 36;
/// Field 22 of `/proc/PID/stat`, counted from the one after the command's name, which may contain anything.
const START_TIME: usize = 19;

/// A process that is no other, of this boot of the host or another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its id, 1 to 2^31 - 1.
    pub pid: u32,
    /// When it started: clock ticks since the host's boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
    /// Which boot that was (`/proc/sys/kernel/random/boot_id`): a UUID in lower case.
    pub boot_id: String,
}

/// The text is no record of a process.
#[derive(Debug, thiserror::Error)]
#[error("it is no \"<process id> <start time> <boot id>\" on one line")]
pub struct IdentityError;

impl Identity {
    /// That of the calling process.
    ///
    /// # Errors
    /// If /proc cannot be read.
    pub fn own() -> io::Result<Self> {
        let senseless = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{what} makes no sense"));
        let stat = fs::read_to_string("/proc/self/stat")?;
        let fields = stat.rsplit_once(')').map(|(_, fields)| fields.split_whitespace());
        let start_time = fields.and_then(|mut fields| fields.nth(START_TIME)?.parse().ok());
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Self {
            pid: std::process::id(),
            start_time: start_time.ok_or_else(|| senseless("/proc/self/stat"))?,
            boot_id: boot_id.trim_end().to_owned(),
        })
    }

    /// Reads a record as it is written, and nothing else.
    ///
    /// # Errors
    /// If it is anything else.
    pub fn parse(record: &[u8]) -> Result<Self, IdentityError> {
        let line = record.strip_suffix(b"\n").and_then(|line| std::str::from_utf8(line).ok()).ok_or(IdentityError)?;
        let [pid, start_time, boot_id] = line.split(' ').collect::<Vec<_>>()[..] else { return Err(IdentityError) };
        let pid = number(pid).and_then(|pid| u32::try_from(pid).ok()).ok_or(IdentityError)?;
        let start_time = number(start_time).ok_or(IdentityError)?;
        if pid == 0 || i32::try_from(pid).is_err() || !is_boot_id(boot_id) {
            return Err(IdentityError);
        }
        Ok(Self { pid, start_time, boot_id: boot_id.to_owned() })
    }

    /// Puts it on record at `path`, in place of what is there: who reads it sees all of it or nothing.
    ///
    /// # Errors
    /// If its directory cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(self.to_string().as_bytes())?;
        fs::rename(&new, path)
    }
}

/// The record.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {} {}", self.pid, self.start_time, self.boot_id)
    }
}

/// A number as it is written: no sign, no zeros before it.
fn number(text: &str) -> Option<u64> {
    let written = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| written)
}

fn is_boot_id(text: &str) -> bool {
    let dash = |place| matches!(place, 8 | 13 | 18 | 23);
    let fits = |(place, byte): (usize, u8)| match byte {
        b'-' => dash(place),
        b'0'..=b'9' | b'a'..=b'f' => !dash(place),
        _ => false,
    };
    text.len() == BOOT_ID && text.bytes().enumerate().all(fits)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    const BOOT: &str = "01234567-89ab-cdef-0123-456789abcdef";

    #[test]
    fn the_own_one_is_read_as_it_was_written_over_what_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmm.pid");
        let own = Identity::own().unwrap();
        assert_eq!(own.pid, std::process::id());
        assert_eq!(own, Identity::own().unwrap());
        fs::write(&path, "1 1 other").unwrap();
        // Of a process that was killed half way.
        fs::write(directory.path().join("vmm.pid.new"), "12").unwrap();
        own.write(&path).unwrap();
        let record = fs::read(&path).unwrap();
        assert_eq!(Identity::parse(&record).unwrap(), own);
        assert!(record.len() <= RECORD_LIMIT);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "and nothing beside it");
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let good = format!("17 42 {BOOT}\n");
        assert_eq!(Identity::parse(good.as_bytes()).unwrap().to_string(), good);
        for bad in [
            "",
            "\n",
            &good[..good.len() - 1],
            &format!("{good}\n"),
            &format!("{good}{good}"),
            &format!(" {good}"),
            &format!("17  42 {BOOT}\n"),
            &format!("17 42 {BOOT} \n"),
            &format!("17\t42 {BOOT}\n"),
            &format!("0 42 {BOOT}\n"),
            &format!("-17 42 {BOOT}\n"),
            &format!("+17 42 {BOOT}\n"),
            &format!("017 42 {BOOT}\n"),
            &format!("2147483648 42 {BOOT}\n"),
            &format!("17 18446744073709551616 {BOOT}\n"),
            &format!("17 42 {}\n", BOOT.to_uppercase()),
            &format!("17 42 {}\n", &BOOT[1..]),
            &format!("17 42 {}\n", BOOT.replace('-', "0")),
            &format!("17 {BOOT}\n"),
        ] {
            assert!(Identity::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(Identity::parse(b"17 42 \xff\n").is_err());
    }

    proptest! {
        #[test]
        fn what_is_read_would_be_written_so(record in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(identity) = Identity::parse(&record) {
                prop_assert_eq!(identity.to_string().into_bytes(), record);
            }
        }

        #[test]
        fn what_is_written_is_read(pid in 1..=i32::MAX.cast_unsigned(), start_time: u64) {
            let identity = Identity { pid, start_time, boot_id: BOOT.into() };
            let record = identity.to_string();
            prop_assert!(record.len() <= RECORD_LIMIT);
            prop_assert_eq!(Identity::parse(record.as_bytes()).unwrap(), identity);
        }
    }
}
