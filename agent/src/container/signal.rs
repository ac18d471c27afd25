//! Signals to a container's processes.

use std::io::ErrorKind;

use nacelle_proto::agent::v1::SignalRequest;

use super::cgroup::Cgroup;
use super::{Container, Exec};
use crate::error::{Error, Result};
use crate::process::Process;

impl Container {
    /// Sends a signal to one process, to all that an exec has started, or to all of the
    /// container. Without effect on what has ended. Blocks, for as long as the kernel is busy
    /// with control groups.
    pub fn signal(&self, request: &SignalRequest) -> Result<()> {
        let SignalRequest { exec_id, signal, all, exec_tree, .. } = request;
        let number = i32::try_from(*signal).ok().filter(|signal| (1..=64).contains(signal));
        let number = number.ok_or_else(|| Error::invalid("signal", format!("{signal} is not 1 to 64")))?;
        match (all, exec_tree) {
            (true, true) => Err(Error::invalid("exec_tree", "it is another set of processes than all")),
            (false, true) if exec_id.is_empty() => Err(Error::invalid("exec_tree", "there is no exec_id")),
            (false, true) => {
                let exec = self.find_exec(exec_id)?;
                match number {
                    libc::SIGKILL => exec.kill(),
                    _ => signal_each(&exec.group, number),
                }
            }
            (true, false) => {
                self.find(exec_id)?;
                match number {
                    libc::SIGKILL => self.kill(),
                    _ => signal_each(&self.cgroup, number),
                }
            }
            (false, false) => self.signal_process(&*self.find(exec_id)?, number),
        }
    }

    /// Sends a signal to one of its processes. To be killed nobody's leave is needed: the kernel
    /// asks a process's AppArmor profile whether the agent may signal it, but not about a
    /// control group.
    fn signal_process(&self, process: &Process, signal: i32) -> Result<()> {
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

impl Exec {
    /// Kills it and all that it has started. Blocks.
    pub(super) fn kill(&self) -> Result<()> {
        self.process.to_be_killed();
        self.group.kill()
    }
}

fn signal_each(group: &Cgroup, signal: i32) -> Result<()> {
    for pid in group.processes() {
        // SAFETY: sends a signal; a process that has ended meanwhile is fine, and its number is not given anew within
        // this loop's time.
        unsafe { libc::kill(pid, signal) };
    }
    Ok(())
}
