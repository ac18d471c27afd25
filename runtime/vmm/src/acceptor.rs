//! A listening socket whose clients wait while one cannot be taken in.
//!
//! A process without a descriptor left cannot even turn a client away. The socket goes on telling of it, and a loop that
//! waits for that would do nothing else. So it is not listened to for a while; the clients wait in its backlog.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use crate::timer::Timer;

/// How long to wait before accepting again.
const PAUSE: Duration = Duration::from_millis(100);

/// The socket, and what is readable when it is worth asking for a client ([`AsFd`]).
#[derive(Debug)]
pub struct Acceptor<L> {
    listener: L,
    timer: Timer,
    events: OwnedFd,
    paused: bool,
}

impl<L: AsFd> Acceptor<L> {
    /// Of a socket that listens, and whose `accept` does not wait.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new(listener: L) -> io::Result<Self> {
        let (events, timer) = (epoll::create(CreateFlags::CLOEXEC)?, Timer::new()?);
        epoll::add(&events, &listener, EventData::new_u64(0), EventFlags::IN)?;
        epoll::add(&events, &timer, EventData::new_u64(0), EventFlags::IN)?;
        Ok(Self { listener, timer, events, paused: false })
    }

    /// The socket.
    pub fn listener(&self) -> &L {
        &self.listener
    }

    /// The next client, by `accept`; none if there is none now.
    ///
    /// # Errors
    /// What `accept` reports that has nothing to do with the client. Nobody is accepted for a while then.
    pub fn accept<C>(&mut self, accept: impl FnOnce(&L) -> io::Result<C>) -> io::Result<Option<C>> {
        if self.paused {
            if !self.timer.expired() || !self.watch(EventFlags::IN) {
                return Ok(None);
            }
            self.paused = false;
        }
        match accept(&self.listener) {
            Ok(client) => Ok(Some(client)),
            // There is none, or it left before its turn.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(None)
            }
            Err(error) => {
                if self.watch(EventFlags::empty()) {
                    self.paused = true;
                    self.timer.arm(Instant::now() + PAUSE);
                }
                Err(error)
            }
        }
    }

    fn watch(&self, flags: EventFlags) -> bool {
        epoll::modify(&self.events, &self.listener, EventData::new_u64(0), flags).is_ok()
    }
}

impl<L> AsFd for Acceptor<L> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    /// Whether it is readable within some seconds, which none of this takes.
    fn ready(acceptor: &Acceptor<UnixListener>, seconds: i64) -> bool {
        let limit = Timespec { tv_sec: seconds, tv_nsec: 0 };
        poll(&mut [PollFd::new(acceptor, PollFlags::IN)], Some(&limit)).unwrap() > 0
    }

    #[test]
    fn while_nobody_can_be_taken_in_clients_wait_and_nothing_is_ready() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut acceptor = Acceptor::new(listener).unwrap();
        let accept = |listener: &UnixListener| listener.accept().map(|(client, _)| client);
        assert!(!ready(&acceptor, 0));
        let _client = UnixStream::connect(&path).unwrap();
        assert!(ready(&acceptor, 0));
        let begun = Instant::now();
        let full = |_: &UnixListener| -> io::Result<()> { Err(io::Error::from_raw_os_error(libc::EMFILE)) };
        assert_eq!(acceptor.accept(full).unwrap_err().raw_os_error(), Some(libc::EMFILE));
        assert!(acceptor.accept(|_| -> io::Result<()> { panic!("asked in the pause") }).unwrap().is_none());
        assert!(ready(&acceptor, 20), "it goes on by itself");
        assert!(begun.elapsed() >= PAUSE, "and not at once");
        assert!(acceptor.accept(accept).unwrap().is_some());
        assert!(acceptor.accept(accept).unwrap().is_none());
        assert!(!ready(&acceptor, 0));
        let _client = UnixStream::connect(&path).unwrap();
        assert!(ready(&acceptor, 0));
        assert!(
            acceptor.accept(|_| -> io::Result<()> { Err(io::ErrorKind::ConnectionAborted.into()) }).unwrap().is_none()
        );
        assert!(ready(&acceptor, 0), "that is no reason to pause");
    }
}
