//! Which descriptors the main thread waits on, and what each stands for.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

use crate::pci::VirtioPci;

/// What a descriptor that became ready is about.
#[derive(Clone)]
pub enum Source {
    /// A processor ended the machine.
    Exit,
    /// SIGTERM or SIGINT.
    Signal,
    /// A client wants to connect to the control socket.
    Listener,
    /// A client of the control socket, by number, has sent something or gone.
    Client(u64),
    /// The driver notified a queue.
    Queue(Arc<VirtioPci>, u16),
    /// The descriptor that a device wants watched is ready.
    Poll(Arc<VirtioPci>),
}

/// How readiness is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As long as the descriptor is readable.
    Level,
    /// Once for every time it becomes readable; nobody needs to read it. For event
    /// descriptors.
    Edge,
}

/// A watched descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(u64);

/// The set of watched descriptors.
pub struct EventLoop {
    epoll: OwnedFd,
    sources: BTreeMap<Token, Source>,
    next: u64,
}

/// Most events taken at once.
const BATCH: usize = 32;

impl EventLoop {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)?, sources: BTreeMap::new(), next: 0 })
    }

    /// Watches `fd` for input.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, source: Source, mode: Mode) -> io::Result<Token> {
        let token = Token(self.next);
        let flags = if mode == Mode::Edge { EventFlags::IN | EventFlags::ET } else { EventFlags::IN };
        epoll::add(&self.epoll, fd, EventData::new_u64(token.0), flags)?;
        self.next += 1;
        self.sources.insert(token, source);
        Ok(token)
    }

    /// Stops watching `fd`, which `token` stands for. What of it is already in a batch of
    /// events is not delivered any more.
    pub fn forget(&mut self, fd: BorrowedFd<'_>, token: Token) {
        self.sources.remove(&token);
        // Fails only for a descriptor that is not watched.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// What `token` stands for, unless forgotten.
    pub fn source(&self, token: Token) -> Option<Source> {
        self.sources.get(&token).cloned()
    }

    /// Waits for the next events and puts their tokens into `ready`.
    pub fn wait(&self, ready: &mut Vec<Token>) -> io::Result<()> {
        let mut events = [MaybeUninit::<Event>::uninit(); BATCH];
        ready.clear();
        match epoll::wait(self.epoll.as_fd(), &mut events, None) {
            Ok((events, _)) => ready.extend(events.iter().map(|event| Token(event.data.u64()))),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}
