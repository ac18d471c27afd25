//! Whose process a number is: a number alone is anybody's.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::record::ProcessId;

/// Where the kernel says which boot of the host this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

impl ProcessId {
    /// The process of this number, as it is now. None if there is none.
    pub fn of(pid: u32) -> io::Result<Option<Self>> {
        let Some(start_time) = start_time(pid)? else { return Ok(None) };
        Ok(Some(Self { pid, start_time, boot_id: boot_id()? }))
    }

    /// Takes hold of the process. None if it has ended, which is then certain: an error says nothing of it.
    pub fn hold(&self) -> io::Result<Option<OwnedFd>> {
        if !self.boot_id.is_empty() && self.boot_id != boot_id()? {
            return Ok(None);
        }
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Err(Errno::SRCH) => return Ok(None),
            held => held?,
        };
        // Only now is the number pinned: is it still the process that is meant?
        Ok((start_time(self.pid)? == Some(self.start_time)).then_some(pidfd))
    }
}

/// The id of this boot of the host.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// Field 22 of /proc/PID/stat; none if there is no such process.
fn start_time(pid: u32) -> io::Result<Option<u64>> {
    let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {
            return Ok(None);
        }
        stat => stat?,
    };
    // The command name may contain anything, so count from its closing parenthesis.
    let field = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse().ok());
    field.map(Some).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "/proc/PID/stat has another form"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_means_another_process_by_now_is_not_held() {
        let own = ProcessId::of(std::process::id()).unwrap().unwrap();
        assert!(own.hold().unwrap().is_some());
        let later = ProcessId { start_time: own.start_time + 1, ..own.clone() };
        assert!(later.hold().unwrap().is_none());
        let before_a_reboot = ProcessId { boot_id: "another".into(), ..own.clone() };
        assert!(before_a_reboot.hold().unwrap().is_none());
        let of_an_earlier_daemon = ProcessId { boot_id: String::new(), ..own };
        assert!(of_an_earlier_daemon.hold().unwrap().is_some());
        assert!(ProcessId::of(u32::MAX).unwrap().is_none());
    }
}
