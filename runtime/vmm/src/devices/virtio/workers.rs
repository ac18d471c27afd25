//! Threads of a device's own, for requests that may take as long as a file does.
//!
//! All wait for the same events, of which the kernel gives each to one of them. One thread
//! alone serves what comes one after the other. Before it does what may take a while it makes way
//! ([`Way::make`]): it asks for notifications again and lets another see what is there already, so
//! that a slow file makes nobody wait but who asked for it. A thread more is started when all are at
//! work, up to a limit; one that has had nothing to do for a while ends, but the last.
//!
//! The queue is held while a request is taken and given back, never in between.
//!
//! A reset waits for nobody ([`Threads::reset`]): what was being served then is not given back, and
//! the device counts as reset when the last of it is over ([`Threads::is_reset`]). Until then its
//! threads may still write to the buffers of such requests.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use vmm_sys_util::eventfd::EventFd;

use super::budget::Budget;
use super::descriptors::AvailableChain;
use super::device::{DeviceError, Interrupt};
use super::ring::Ring;
use super::wake::Wake;
use crate::sys::event_fd;

/// A thread's stack in bytes; the deepest that one needs is a buffer's worth.
const STACK: usize = 256 * 1024;
/// How long a thread waits for something to do before it ends.
const IDLE: Duration = Duration::from_secs(10);
/// After so many bytes the driver hears of what is done, though more is to do.
const SIGNAL_BYTES: u64 = 1 << 20;

/// What a thread is woken for.
const STOP: u64 = u64::MAX;
const MORE: u64 = u64::MAX - 1;

/// What serves the requests of a device.
pub trait Handler: Send + Sync + 'static {
    /// What each thread has for itself.
    type Room: Send;

    /// Short name for messages.
    fn name(&self) -> &'static str;

    /// Most threads.
    fn threads(&self) -> usize;

    /// Makes a thread's room.
    ///
    /// # Errors
    /// If the host's resources are exhausted.
    fn room(&self) -> io::Result<Self::Room>;

    /// What a thread does before it serves anything.
    ///
    /// # Errors
    /// If it cannot serve; then the device needs a reset.
    fn enter(&self) -> io::Result<()> {
        Ok(())
    }

    /// Serves a request of queue `index`. Before what may take a while it makes `way`.
    ///
    /// # Errors
    /// Why the chain is no request, so that only a reset mends it.
    fn serve(
        &self,
        index: u16,
        chain: &AvailableChain,
        room: &mut Self::Room,
        way: &mut dyn Way,
    ) -> Result<Answer, String>;
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// Bytes of the chain that were written.
    pub written: u32,
    /// Bytes that were moved in either direction.
    pub moved: u64,
}

/// How a thread lets others go on.
pub trait Way {
    /// Tells the driver of what is done, and lets another thread see to what is next. To be
    /// called before what may take a while; further calls do nothing.
    fn make(&mut self);
}

/// What all threads share.
struct Shared<H: Handler> {
    handler: Arc<H>,
    queues: Vec<Mutex<Served>>,
    interrupt: Arc<dyn Interrupt>,
    epoll: OwnedFd,
    /// Descriptors that the epoll instance watches for as long as there are threads.
    _notifications: Vec<EventFd>,
    stop: Wake,
    /// Set with it, for a thread that has more to do than it gets done. Changed with all queues held.
    stopped: AtomicBool,
    more: Wake,
    /// Threads that wait for events.
    idle: AtomicUsize,
    running: Mutex<usize>,
    failure: Mutex<Option<DeviceError>>,
    failed: Arc<Wake>,
}

/// A queue, and what the driver has not been told of it yet.
struct Served {
    ring: Ring,
    unsignalled: u64,
}

/// Threads that serve a driver. Dropping it ends them, as [`Workers::end`] does.
struct Workers<H: Handler> {
    shared: Arc<Shared<H>>,
}

impl<H: Handler> Workers<H> {
    /// Serves `rings`, of which `notifications` tell. `failed` is set when the driver has
    /// broken the protocol, or a thread cannot go on, see [`Workers::failure`].
    ///
    /// # Errors
    /// If the host's resources are exhausted.
    pub fn start(
        handler: Arc<H>,
        rings: Vec<Ring>,
        notifications: &[EventFd],
        interrupt: Arc<dyn Interrupt>,
        failed: Arc<Wake>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let (stop, more) = (Wake::new()?, Wake::new()?);
        let notifications = notifications.iter().map(EventFd::try_clone).collect::<io::Result<Vec<_>>>()?;
        for (queue, event) in (0..).zip(&notifications) {
            epoll::add(&epoll, event_fd(event), EventData::new_u64(queue), EventFlags::IN | EventFlags::ET)?;
        }
        epoll::add(&epoll, &stop, EventData::new_u64(STOP), EventFlags::IN)?;
        epoll::add(&epoll, &more, EventData::new_u64(MORE), EventFlags::IN | EventFlags::ET)?;
        let shared = Arc::new(Shared {
            handler,
            queues: rings.into_iter().map(|ring| Mutex::new(Served { ring, unsignalled: 0 })).collect(),
            interrupt,
            epoll,
            _notifications: notifications,
            stop,
            stopped: AtomicBool::new(false),
            more,
            idle: AtomicUsize::new(0),
            running: Mutex::new(0),
            failure: Mutex::default(),
            failed,
        });
        // What was made available before the first of them waits is not announced again.
        shared.more.set();
        shared.spawn()?;
        Ok(Self { shared })
    }

    /// What happened that only a reset mends, once.
    pub fn failure(&self) -> Option<DeviceError> {
        lock(&self.shared.failure).take()
    }

    /// Ends the threads without waiting for them. From now on nothing is given back to the driver.
    pub fn end(&self) -> Ending {
        // Nobody gives anything back while it holds a queue and after it has seen this.
        let held: Vec<_> = self.shared.queues.iter().map(lock).collect();
        self.shared.stopped.store(true, Ordering::SeqCst);
        drop(held);
        self.shared.stop.set();
        Ending(self.shared.clone())
    }
}

impl<H: Handler> Drop for Workers<H> {
    fn drop(&mut self) {
        self.end();
    }
}

impl<H: Handler> std::fmt::Debug for Workers<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("threads", &*lock(&self.shared.running)).finish_non_exhaustive()
    }
}

/// A device's threads from one reset to the next: what a device that has them is made of.
pub struct Threads<H: Handler> {
    notifications: Vec<EventFd>,
    workers: Option<Workers<H>>,
    ending: Vec<Ending>,
    failed: Arc<Wake>,
}

impl<H: Handler> Threads<H> {
    /// None yet.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { notifications: Vec::new(), workers: None, ending: Vec::new(), failed: Arc::new(Wake::new()?) })
    }

    /// What its [`VirtioDevice::take_notifications`](super::device::VirtioDevice::take_notifications) is.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn take_notifications(&mut self, notifications: &[EventFd]) -> io::Result<bool> {
        self.notifications = notifications.iter().map(EventFd::try_clone).collect::<io::Result<_>>()?;
        Ok(true)
    }

    /// Serves these queues from now on.
    ///
    /// # Errors
    /// If the host's resources are exhausted.
    pub fn start(&mut self, handler: H, rings: Vec<Ring>, interrupt: Arc<dyn Interrupt>) -> Result<(), DeviceError> {
        let device = handler.name();
        let (handler, failed) = (Arc::new(handler), self.failed.clone());
        let workers = Workers::start(handler, rings, &self.notifications, interrupt, failed);
        let reason = |error: io::Error| DeviceError { device, reason: format!("no thread for it: {error}") };
        self.workers = Some(workers.map_err(reason)?);
        Ok(())
    }

    /// Whether they serve a driver.
    pub fn are_active(&self) -> bool {
        self.workers.is_some()
    }

    /// What its [`VirtioDevice::reset`](super::device::VirtioDevice::reset) is.
    pub fn reset(&mut self) {
        self.ending.extend(self.workers.take().map(|workers| workers.end()));
        self.failed.clear();
    }

    /// What its [`VirtioDevice::is_reset`](super::device::VirtioDevice::is_reset) is.
    pub fn is_reset(&mut self) -> bool {
        self.ending.retain(|ending| !ending.is_over());
        self.ending.is_empty()
    }

    /// What its [`VirtioDevice::poll_fd`](super::device::VirtioDevice::poll_fd) is.
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        (*self.failed).as_fd()
    }

    /// What its [`VirtioDevice::poll_ready`](super::device::VirtioDevice::poll_ready) is.
    ///
    /// # Errors
    /// What happened that only a reset mends.
    pub fn poll_ready(&mut self) -> Result<(), DeviceError> {
        self.failed.clear();
        self.workers.as_ref().and_then(Workers::failure).map_or(Ok(()), Err)
    }
}

impl<H: Handler> std::fmt::Debug for Threads<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads").field("workers", &self.workers).finish_non_exhaustive()
    }
}

/// Threads that were told to end.
struct Ending(Arc<dyn Running>);

impl Ending {
    /// Whether none is left, and with them nothing that writes to the guest's memory.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.running() == 0
    }
}

impl std::fmt::Debug for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ending").field("threads", &self.0.running()).finish()
    }
}

/// Threads of whatever handler.
trait Running: Send + Sync {
    fn running(&self) -> usize;
}

impl<H: Handler> Running for Shared<H> {
    fn running(&self) -> usize {
        *lock(&self.running)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<H: Handler> Shared<H> {
    /// Starts a thread unless there are enough. What it needs it has before it counts as one.
    fn spawn(self: &Arc<Self>) -> io::Result<()> {
        let mut running = lock(&self.running);
        if *running < self.handler.threads() {
            let (shared, mut room) = (self.clone(), self.handler.room()?);
            let builder = thread::Builder::new().name(format!("nacelle-{}", self.handler.name())).stack_size(STACK);
            builder.spawn(move || shared.run(&mut room))?;
            *running += 1;
        }
        Ok(())
    }

    /// Serves until it is told to stop, or nobody misses it. A thread that ends otherwise would be missed by nobody but the
    /// guest, whose requests may all have been its to serve: the driver is told that the device needs a reset, after which
    /// there are new threads.
    fn run(self: Arc<Self>, room: &mut H::Room) {
        match self.serve_all(room) {
            Ok(End::Idle) => {}
            Ok(End::Stopped) => *lock(&self.running) -= 1,
            Err(error) => {
                *lock(&self.running) -= 1;
                lock(&self.failure).get_or_insert(error);
                self.failed.set();
            }
        }
    }

    fn failed(&self, what: &str, error: &io::Error) -> DeviceError {
        DeviceError { device: self.handler.name(), reason: format!("{what}: {error}") }
    }

    fn serve_all(self: &Arc<Self>, room: &mut H::Room) -> Result<End, DeviceError> {
        self.handler.enter().map_err(|error| self.failed("a thread is not fit to serve", &error))?;
        loop {
            self.idle.fetch_add(1, Ordering::SeqCst);
            let event = self.wait();
            self.idle.fetch_sub(1, Ordering::SeqCst);
            match event {
                Ok(Some(STOP)) => return Ok(End::Stopped),
                Ok(Some(MORE)) => {
                    self.more.clear();
                    (0..self.queues.len()).rev().try_for_each(|index| self.serve(index as u16, room))?;
                }
                Ok(Some(index)) => u16::try_from(index).map_or(Ok(()), |index| self.serve(index, room))?,
                Ok(None) => {
                    let mut running = lock(&self.running);
                    // The last one stays, whatever the others are at.
                    if *running > 1 && self.idle.load(Ordering::SeqCst) > 0 {
                        *running -= 1;
                        return Ok(End::Idle);
                    }
                }
                Err(error) => return Err(self.failed("a thread cannot wait for requests", &error)),
            }
        }
    }

    /// What there is to do; none if there was nothing for a while.
    fn wait(&self) -> io::Result<Option<u64>> {
        // One alone stays, and need not be woken for that.
        let limit = Timespec { tv_sec: IDLE.as_secs().cast_signed(), tv_nsec: 0 };
        let limit = (*lock(&self.running) > 1).then_some(limit);
        let mut events = [MaybeUninit::<Event>::uninit(); 1];
        loop {
            match epoll::wait(self.epoll.as_fd(), &mut events, limit.as_ref()) {
                Ok((events, _)) => return Ok(events.first().map(|event| event.data.u64())),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Serves a queue until it is empty.
    fn serve(self: &Arc<Self>, index: u16, room: &mut H::Room) -> Result<(), DeviceError> {
        let Some(queue) = self.queues.get(usize::from(index)) else { return Ok(()) };
        let mut budget = Budget::unlimited();
        let mut done: Option<(u16, Answer)> = None;
        loop {
            let (chain, signal) = {
                let mut queue = lock(queue);
                if self.stopped.load(Ordering::SeqCst) {
                    return Ok(());
                }
                if let Some((head, answer)) = done.take() {
                    queue.ring.complete(head, answer.written)?;
                    queue.unsignalled = queue.unsignalled.saturating_add(answer.moved);
                }
                let chain = queue.ring.pop(&mut budget)?;
                let due = chain.is_none() || queue.unsignalled >= SIGNAL_BYTES;
                (chain, due && queue.is_signal_due())
            };
            // Without the queue: the guest may have this processor before the call returns.
            if signal {
                self.interrupt.queue(index);
            }
            let Some(chain) = chain else {
                let mut queue = lock(queue);
                match !self.stopped.load(Ordering::SeqCst) && queue.ring.rearm() {
                    true => continue,
                    false => return Ok(()),
                }
            };
            let mut way = Rearm { shared: self, queue, index, made: false };
            let answer = self.handler.serve(index, &chain, room, &mut way);
            let made = way.made;
            let mut queue = lock(queue);
            if self.stopped.load(Ordering::SeqCst) {
                return Ok(());
            }
            if made {
                // What comes next is this thread's to see: a notification would wake another for nothing.
                queue.ring.disarm();
            }
            done = Some((chain.head(), answer.map_err(|reason| queue.ring.error(&reason))?));
        }
    }
}

impl Served {
    fn is_signal_due(&mut self) -> bool {
        self.unsignalled = 0;
        self.ring.is_signal_due()
    }
}

/// Why a thread ended.
enum End {
    /// It was told to.
    Stopped,
    /// It had nothing to do. It does not count any more.
    Idle,
}

/// The way of a thread that serves `queue`.
struct Rearm<'a, H: Handler> {
    shared: &'a Arc<Shared<H>>,
    queue: &'a Mutex<Served>,
    index: u16,
    made: bool,
}

impl<H: Handler> Way for Rearm<'_, H> {
    fn make(&mut self) {
        if std::mem::replace(&mut self.made, true) {
            return;
        }
        let shared = self.shared;
        let (more, signal) = {
            let mut queue = lock(self.queue);
            if shared.stopped.load(Ordering::SeqCst) {
                return;
            }
            (queue.ring.rearm(), queue.is_signal_due())
        };
        if signal {
            shared.interrupt.queue(self.index);
        }
        if shared.idle.load(Ordering::SeqCst) == 0
            && let Err(error) = shared.spawn()
        {
            crate::report(&format!("a device has a thread less: {}", shared.handler.name()), &error);
        }
        if more {
            shared.more.set();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Condvar;
    use std::time::Instant;

    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::devices::virtio::testing::{Driver, FEATURES, Interrupts, memory, writable};

    const PATIENCE: Duration = Duration::from_secs(60);
    const RINGS: u64 = 0x1000;
    const DATA: u64 = 0x8000;

    /// A device whose requests take as long as the test wants.
    #[derive(Default)]
    struct Slow {
        /// Requests that were begun, and how many of them may end.
        begun: Mutex<(usize, usize)>,
        changed: Condvar,
        /// Threads that can be had.
        rooms: AtomicUsize,
    }

    impl Slow {
        fn let_end(&self, count: usize) {
            lock(&self.begun).1 += count;
            self.changed.notify_all();
        }

        fn begun(&self) -> usize {
            lock(&self.begun).0
        }
    }

    impl Handler for Slow {
        type Room = ();

        fn name(&self) -> &'static str {
            "slow"
        }

        fn threads(&self) -> usize {
            3
        }

        fn room(&self) -> io::Result<()> {
            let taken = self.rooms.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |rooms| rooms.checked_sub(1));
            taken.map(drop).map_err(|_| io::ErrorKind::OutOfMemory.into())
        }

        fn serve(&self, _: u16, chain: &AvailableChain, (): &mut (), way: &mut dyn Way) -> Result<Answer, String> {
            if chain.head() == 15 {
                return Err("told to fail".into());
            }
            way.make();
            let mut begun = lock(&self.begun);
            begun.0 += 1;
            let begun = self.changed.wait_while(begun, |begun| begun.1 == 0);
            begun.unwrap_or_else(PoisonError::into_inner).1 -= 1;
            Ok(Answer { written: 1, moved: 1 })
        }
    }

    struct Guest {
        driver: Driver,
        notification: EventFd,
        slow: Arc<Slow>,
        failed: Arc<Wake>,
        workers: Workers<Slow>,
        _memory: GuestMemoryMmap,
    }

    fn guest(rooms: usize) -> io::Result<Guest> {
        let memory = memory(0x10_0000);
        let driver = Driver::new(&memory, RINGS, 16);
        let ring = Ring::new("slow", 0, driver.queue(), &memory, FEATURES).unwrap();
        let notification = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let notifications = [notification.try_clone().unwrap()];
        let slow = Arc::new(Slow { rooms: AtomicUsize::new(rooms), ..Slow::default() });
        let failed = Arc::new(Wake::new().unwrap());
        let interrupt = Arc::<Interrupts>::default();
        let workers = Workers::start(slow.clone(), vec![ring], &notifications, interrupt, failed.clone())?;
        Ok(Guest { driver, notification, slow, failed, workers, _memory: memory })
    }

    impl Guest {
        fn ask(&mut self, requests: usize) {
            for _ in 0..requests {
                self.driver.add(&[writable(DATA, 1)]);
            }
            self.notification.write(1).unwrap();
        }
    }

    fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_micros(100));
        }
    }

    #[test]
    fn a_slow_request_makes_nobody_wait_who_comes_later() {
        let mut guest = guest(usize::MAX).unwrap();
        guest.ask(1);
        until("the first", || guest.slow.begun() == 1);
        guest.ask(1);
        until("one that is notified later", || guest.slow.begun() == 2);
        guest.ask(4);
        until("as many as there are threads", || guest.slow.begun() == 3);
        guest.slow.let_end(6);
        until("all of them", || guest.driver.used_index() == 6);
        assert_eq!(*lock(&guest.workers.shared.running), 3);
        assert!(guest.workers.failure().is_none());
    }

    #[test]
    fn requests_that_come_together_are_served_together() {
        let mut guest = guest(usize::MAX).unwrap();
        guest.ask(3);
        until("all at once", || guest.slow.begun() == 3);
        guest.slow.let_end(3);
        until("all of them", || guest.driver.used_index() == 3);
    }

    #[test]
    fn an_end_waits_for_nobody_and_gives_nothing_back() {
        let mut guest = guest(usize::MAX).unwrap();
        guest.ask(2);
        until("two", || guest.slow.begun() == 2);
        let ending = guest.workers.end();
        assert!(!ending.is_over());
        guest.ask(1);
        guest.slow.let_end(2);
        until("the threads end", || ending.is_over());
        assert_eq!((guest.driver.used_index(), guest.slow.begun()), (0, 2));
    }

    #[test]
    fn a_first_thread_that_cannot_start_is_an_error_of_the_device() {
        assert_eq!(guest(0).err().map(|error| error.kind()), Some(io::ErrorKind::OutOfMemory));
    }

    #[test]
    fn a_further_thread_that_cannot_start_is_none_and_the_others_serve() {
        let mut guest = guest(1).unwrap();
        guest.ask(2);
        until("the first", || guest.slow.begun() == 1);
        guest.slow.let_end(2);
        until("both", || guest.driver.used_index() == 2);
        assert_eq!(*lock(&guest.workers.shared.running), 1, "it does not take the place of one that can");
        assert!(guest.workers.failure().is_none());
    }

    #[test]
    fn a_broken_queue_is_told_once() {
        let mut guest = guest(usize::MAX).unwrap();
        guest.driver.push(15);
        guest.driver.descriptor(15, DATA, 1, 2, 0);
        guest.notification.write(1).unwrap();
        let mut told = None;
        until("the failure", || {
            told = told.take().or_else(|| guest.workers.failure());
            told.is_some()
        });
        assert_eq!(told.unwrap().to_string(), "slow: queue 0: told to fail");
        until("it is announced", || rustix::io::read(&*guest.failed, &mut [0; 8]).is_ok());
        assert!(guest.workers.failure().is_none());
    }
}
