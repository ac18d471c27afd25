//! Starting a created container's process.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, openat};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use super::{Container, Init, Phase};
use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::fd;
use crate::helper::ExecFailure;

/// What is read of the reason why a command was not executed, in bytes.
const FAILURE_LIMIT: usize = 64 << 10;

impl Agent {
    /// Starts the container's process; answers its id.
    pub async fn start_container(&self, id: &str) -> Result<i32> {
        let container = self.container(id)?;
        let _order = container.order.clone().write_owned().await;
        let init = container.init()?;
        container.begin_start()?;
        if init.process.outcome().is_some() {
            container.end_start(Phase::Started);
            return Err(Error::State(format!("container {id} was killed before it was started")));
        }
        if let Err(error) = self.tell_to_start(id).await {
            // It waits as before.
            container.end_start(Phase::Created);
            return Err(error);
        }
        let started = self.started(&init).await;
        container.end_start(Phase::Started);
        started
    }

    /// Waits until the process has become its command.
    async fn started(&self, init: &Init) -> Result<i32> {
        let status = init.status.lock().ok().and_then(|mut status| status.take());
        if let Some(status) = status
            && let Some(failure) = execution_failure(status).await?
        {
            init.process.wait().await?;
            return Err(failure);
        }
        Ok(init.process.pid)
    }

    /// The container's process waits at a socket that libcontainer made.
    async fn tell_to_start(&self, id: &str) -> Result<()> {
        let directory = self.paths.state().join(id);
        let failed = || Error::path("reach the waiting process in", &directory);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = openat(CWD, &directory, flags, Mode::empty()).map_err(|error| failed()(error.into()))?;
        // By way of the descriptor: a socket's path has 107 bytes at most.
        let path = format!("/proc/self/fd/{}/notify.sock", opened.as_raw_fd());
        let mut socket = UnixStream::connect(path).await.map_err(failed())?;
        socket.write_all(b"start container").await.map_err(failed())
    }
}

impl Container {
    fn begin_start(&self) -> Result<()> {
        let mut state = self.lock();
        match state.phase {
            Phase::Created => {
                state.phase = Phase::Starting;
                Ok(())
            }
            Phase::Starting | Phase::Started => Err(Error::State(format!("container {} was started before", self.id))),
            Phase::Creating | Phase::Removing => Err(Error::NoContainer(self.id.clone())),
        }
    }

    fn end_start(&self, phase: Phase) {
        let mut state = self.lock();
        // A removal may have begun meanwhile.
        if state.phase == Phase::Starting {
            state.phase = phase;
        }
    }
}

/// Waits until a process has become its command, or why it has not.
pub(super) async fn execution_failure(status: OwnedFd) -> Result<Option<Error>> {
    let failed = Error::system("read the status of an execution");
    let mut message = Vec::new();
    let read = async {
        rustix::io::ioctl_fionbio(&status, true)?;
        let pipe = fd::watch(File::from(status), Interest::READABLE)?;
        let mut chunk = [0; 4096];
        loop {
            let count = pipe.async_io(Interest::READABLE, |mut pipe| pipe.read(&mut chunk)).await?;
            message.extend_from_slice(&chunk[..count]);
            if count == 0 || message.len() > FAILURE_LIMIT {
                return Ok(());
            }
        }
    };
    read.await.map_err(|error: std::io::Error| failed(error))?;
    if message.is_empty() {
        return Ok(None);
    }
    Ok(Some(match serde_json::from_slice(&message) {
        Ok(ExecFailure { path, reason, command: true }) => Error::Command { path, reason },
        Ok(ExecFailure { path, reason, command: false }) => {
            Error::Helper { action: "start a process", reason: format!("{path:?}: {reason}") }
        }
        Err(error) => Error::Helper { action: "start a process", reason: format!("its report is malformed: {error}") },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::cgroup::Cgroup;

    #[test]
    fn a_start_shows_while_it_is_under_way_and_may_be_repeated_if_nobody_was_told() {
        let container = Container::new("c".into(), Vec::new(), Cgroup::at("/no/such/group".into()));
        assert!(container.begin_start().is_err(), "it is being created");
        container.lock().phase = Phase::Created;
        container.begin_start().unwrap();
        assert!(container.starting());
        assert!(container.begin_start().unwrap_err().to_string().contains("started before"));
        container.end_start(Phase::Created);
        assert!(!container.starting());
        container.begin_start().unwrap();
        container.end_start(Phase::Started);
        assert!(!container.starting());
        assert!(container.begin_start().unwrap_err().to_string().contains("started before"));
        // A removal that came meanwhile has the last word.
        container.lock().phase = Phase::Removing;
        container.end_start(Phase::Created);
        assert!(matches!(container.begin_start(), Err(Error::NoContainer(_))));
    }
}
