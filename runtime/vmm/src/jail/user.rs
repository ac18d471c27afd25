//! The user namespace of a VMM.
//!
//! In it every user and group is who they are on the host, so that files belong to whom they
//! belonged before. What it takes away is the rest of what root and its capabilities mean: they count
//! for the files of users that the namespace knows, and for nothing else of the host.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read as _, Write as _};

use rustix::process::{Pid, WaitOptions, waitpid};
use rustix::thread::UnshareFlags;

use super::{JailError, failed};

/// The files of a process that say whom its namespace knows.
const MAPS: [&str; 2] = ["uid_map", "gid_map"];

/// A process that stays behind, for only from outside can more than one user be mapped.
pub struct Mapper {
    process: Pid,
    ready: io::PipeWriter,
}

impl Mapper {
    /// Starts it. To be called where /proc is the host's, while the process has one thread.
    pub fn start() -> Result<Self, JailError> {
        let (mut waits, ready) = io::pipe().map_err(failed("make a pipe"))?;
        let caller = std::process::id();
        // SAFETY: there is one thread, so nothing that it might need is held by another's.
        match unsafe { libc::fork() } {
            0 => {
                drop(ready);
                // Nothing comes from a caller that has failed.
                let mapped = waits.read_exact(&mut [0]).and_then(|()| map(caller));
                let status = mapped.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0);
                // SAFETY: ends the process, and does nothing of what the caller has yet to do at its end.
                unsafe { libc::_exit(status) }
            }
            id => {
                let process = Pid::from_raw(id).filter(|_| id > 0);
                let process = process.ok_or_else(io::Error::last_os_error).map_err(failed("start a process"))?;
                Ok(Self { process, ready })
            }
        }
    }

    /// Moves the calling process into a namespace of its own.
    pub fn enter(mut self) -> Result<(), JailError> {
        let result = self.leave();
        drop(self.ready);
        let ended = rustix::io::retry_on_intr(|| waitpid(Some(self.process), WaitOptions::empty()));
        result?;
        let ended = ended.map_err(failed("wait for its users to be mapped"))?;
        match ended.and_then(|(_, status)| status.exit_status()) {
            Some(0) => Ok(()),
            Some(error) => Err(failed("map its users")(io::Error::from_raw_os_error(error))),
            None => Err(failed("map its users")(io::Error::other("what was to do it was killed"))),
        }
    }

    fn leave(&mut self) -> Result<(), JailError> {
        // SAFETY: nothing but the credentials is unshared, of a process that has one thread.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }
            .map_err(failed("have a user namespace of its own (see sysctl user.max_user_namespaces)"))?;
        self.ready.write_all(&[0]).map_err(failed("have its users mapped"))
    }
}

/// Maps everybody whom this process's namespace knows to themselves in that of process `id`.
fn map(id: u32) -> io::Result<()> {
    for name in MAPS {
        let known = fs::read_to_string(format!("/proc/self/{name}"))?;
        let mut same = String::new();
        for line in known.lines() {
            let mut fields = line.split_whitespace();
            if let (Some(first), Some(count)) = (fields.next(), fields.nth(1)) {
                let _ = writeln!(same, "{first} {first} {count}");
            }
        }
        // The kernel takes it in one write or not at all.
        fs::write(format!("/proc/{id}/{name}"), same)?;
    }
    Ok(())
}
