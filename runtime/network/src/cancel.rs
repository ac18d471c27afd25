//! A wish that an operation ends before it is done.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::{Error, Result};

/// Asked for by whoever cannot wait for an operation, seen by the operation where it waits. Asked once, it stays
/// asked for.
#[derive(Debug)]
pub struct Cancel {
    event: OwnedFd,
}

impl Cancel {
    pub fn new() -> Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self { event: event.map_err(Error::system("make an event"))? })
    }

    /// Asks the operation to end.
    pub fn ask(&self) {
        // It fails only if it has been asked for so often that the count is full.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// Whether the operation shall end.
    pub fn asked(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.event, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Cancel {
    /// Readable when it is asked for.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
