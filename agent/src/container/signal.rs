//! Signals to a container's processes.

use super::Container;
use crate::error::{Error, Result};

impl Container {
    /// Sends a signal to one process, or to all of the container. Without effect on what
    /// has ended.
    pub fn signal(&self, exec: &str, signal: u32, all: bool) -> Result<()> {
        let number = i32::try_from(signal).ok().filter(|signal| (1..=64).contains(signal));
        let number = number.ok_or_else(|| Error::invalid("signal", format!("{signal} is not 1 to 64")))?;
        let process = self.find(exec)?;
        match (all, number) {
            (false, _) => process.signal(number),
            (true, libc::SIGKILL) => self.cgroup.kill(),
            (true, _) => {
                for pid in self.cgroup.processes() {
                    // SAFETY: sends a signal; a process that has ended meanwhile is fine,
                    // and its number is not given anew within this loop's time.
                    unsafe { libc::kill(pid, number) };
                }
                Ok(())
            }
        }
    }
}
