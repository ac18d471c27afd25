//! Signals to a container's processes.

use std::io::ErrorKind;

use super::Container;
use crate::error::{Error, Result};
use crate::process::Process;

impl Container {
    /// Sends a signal to one process, or to all of the container. Without effect on what
    /// has ended.
    pub fn signal(&self, exec: &str, signal: u32, all: bool) -> Result<()> {
        let number = i32::try_from(signal).ok().filter(|signal| (1..=64).contains(signal));
        let number = number.ok_or_else(|| Error::invalid("signal", format!("{signal} is not 1 to 64")))?;
        let process = self.find(exec)?;
        match (all, number) {
            (false, _) => self.signal_process(&process, number),
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

    /// Sends a signal to one of its processes. To be killed nobody's leave is needed: the kernel
    /// asks a process's AppArmor profile whether the agent may signal it, but not about a
    /// control group.
    pub(super) fn signal_process(&self, process: &Process, signal: i32) -> Result<()> {
        match process.signal(signal) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied && signal == libc::SIGKILL => {
                self.cgroup.kill_one(process.pid)
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => Err(Error::State(format!(
                "signal {signal} is refused by the AppArmor profile of container {}: give the profile the rule \
                 `signal (receive) peer=unconfined,`",
                self.id
            ))),
            sent => sent.map_err(Error::system("send a signal")),
        }
    }
}
