//! The threads that serve requests.
//!
//! All wait for the same events, of which the kernel gives each to one of them. One thread
//! alone serves what comes one after the other. Before it does what may take a while (see
//! [`may_wait`]) it asks for notifications again and lets another see what is there
//! already, so that a slow disk makes nobody wait but who asked it. A thread more is started
//! when all are at work, up to [`THREAD_LIMIT`].
//!
//! The queue is held while a request is taken and given back, never in between.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::Server;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use vm_memory::ByteValued;
use vmm_sys_util::eventfd::EventFd;

use super::by_crate::ByCrate;
use super::device::NAME;
use super::metrics::FsMetrics;
use super::passthrough::Passthrough;
use super::volumes::Volumes;
use super::{credentials, short, transfer};
use crate::devices::virtio::budget::Budget;
use crate::devices::virtio::chain::{Chain, ChainError, ChainScratch};
use crate::devices::virtio::device::{DeviceError, Interrupt};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::wake::Wake;
use crate::sys::event_fd;

/// Most threads of a device: what a disk can do at once for a few processes.
const THREAD_LIMIT: usize = 4;
/// Their stack in bytes; the deepest that they need is a buffer's worth.
const STACK: usize = 256 * 1024;
/// Descriptors of the longest request: as many as the longest queue has.
const CHAIN_LIMIT: usize = 512;

/// What a thread is woken for.
const STOP: u64 = u64::MAX;
const MORE: u64 = u64::MAX - 1;

/// What all threads share.
struct Shared {
    rings: Vec<Mutex<Ring>>,
    interrupt: Arc<dyn Interrupt>,
    files: Passthrough,
    server: Server<Passthrough>,
    volumes: Arc<Volumes>,
    epoll: OwnedFd,
    stop: Wake,
    /// Set with it, for a thread that has more to do than it gets done.
    stopped: AtomicBool,
    more: Wake,
    /// Threads that wait for events.
    idle: AtomicUsize,
    threads: Mutex<Vec<JoinHandle<()>>>,
    failure: Mutex<Option<DeviceError>>,
    failed: Arc<Wake>,
    /// Makes a thread's room for requests.
    room: fn() -> io::Result<ByCrate>,
}

/// The threads. Dropping it ends them.
pub struct Workers {
    shared: Arc<Shared>,
}

impl Workers {
    /// Serves `rings`, of which `notifications` tell. `failed` is set when the driver has
    /// broken the protocol, or a thread cannot go on, see [`Workers::failure`]. Each thread has
    /// a `room` of its own.
    pub fn start(
        rings: Vec<Ring>,
        notifications: &[EventFd],
        interrupt: Arc<dyn Interrupt>,
        volumes: Arc<Volumes>,
        failed: Arc<Wake>,
        room: fn() -> io::Result<ByCrate>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let (stop, more) = (Wake::new()?, Wake::new()?);
        for (queue, event) in (0..).zip(notifications) {
            epoll::add(&epoll, event_fd(event), EventData::new_u64(queue), EventFlags::IN | EventFlags::ET)?;
        }
        epoll::add(&epoll, &stop, EventData::new_u64(STOP), EventFlags::IN)?;
        epoll::add(&epoll, &more, EventData::new_u64(MORE), EventFlags::IN | EventFlags::ET)?;
        let shared = Arc::new(Shared {
            rings: rings.into_iter().map(Mutex::new).collect(),
            interrupt,
            files: Passthrough { volumes: volumes.clone() },
            server: Server::new(Passthrough { volumes: volumes.clone() }),
            volumes,
            epoll,
            stop,
            stopped: AtomicBool::new(false),
            more,
            idle: AtomicUsize::new(0),
            threads: Mutex::default(),
            failure: Mutex::default(),
            failed,
            room,
        });
        // What was made available before the first of them waits is not announced again.
        shared.more.set();
        let workers = Self { shared };
        workers.shared.spawn()?;
        Ok(workers)
    }

    /// What happened that only a reset mends, once.
    pub fn failure(&self) -> Option<DeviceError> {
        lock(&self.shared.failure).take()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        self.shared.stop.set();
        // A thread may be starting another.
        while let Some(thread) = { lock(&self.shared.threads).pop() } {
            // It has nothing to tell, not even that it panicked: that ends the process.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("threads", &lock(&self.shared.threads).len()).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Starts a thread unless there are enough. What it needs it has before it counts as one.
    fn spawn(self: &Arc<Self>) -> io::Result<()> {
        let mut threads = lock(&self.threads);
        if threads.len() < THREAD_LIMIT {
            let (shared, by_crate) = (self.clone(), (self.room)()?);
            let builder = thread::Builder::new().name("nacelle-fs".into()).stack_size(STACK);
            threads.push(builder.spawn(move || shared.run(&by_crate))?);
        }
        Ok(())
    }

    /// Serves until it is told to stop. A thread that ends otherwise would be missed by nobody but the guest, whose requests
    /// may all have been its to serve: the driver is told that the device needs a reset, after which there are new threads.
    fn run(self: &Arc<Self>, by_crate: &ByCrate) {
        if let Err(error) = self.prepare().and_then(|()| self.serve_all(by_crate)) {
            lock(&self.failure).get_or_insert(error);
            self.failed.set();
        }
    }

    fn prepare(&self) -> Result<(), DeviceError> {
        credentials::prepare_thread().map_err(|error| self.failed("a thread cannot get a umask of its own", &error))
    }

    fn serve_all(self: &Arc<Self>, by_crate: &ByCrate) -> Result<(), DeviceError> {
        let mut scratch = ChainScratch::new();
        loop {
            self.idle.fetch_add(1, Ordering::SeqCst);
            let event = self.wait();
            self.idle.fetch_sub(1, Ordering::SeqCst);
            match event {
                Ok(STOP) => return Ok(()),
                Ok(MORE) => {
                    self.more.clear();
                    (0..self.rings.len())
                        .rev()
                        .try_for_each(|index| self.serve(index as u16, &mut scratch, by_crate))?;
                }
                Ok(index) => u16::try_from(index).map_or(Ok(()), |index| self.serve(index, &mut scratch, by_crate))?,
                Err(error) => return Err(self.failed("a thread cannot wait for requests", &error)),
            }
        }
    }

    fn failed(&self, what: &str, error: &io::Error) -> DeviceError {
        DeviceError { device: NAME, reason: format!("{what}: {error}") }
    }

    fn wait(&self) -> io::Result<u64> {
        loop {
            let mut events = [MaybeUninit::<Event>::uninit(); 1];
            match epoll::wait(self.epoll.as_fd(), &mut events, None) {
                Ok((events, _)) => {
                    if let Some(event) = events.first() {
                        return Ok(event.data.u64());
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Serves a queue until it is empty.
    fn serve(self: &Arc<Self>, index: u16, scratch: &mut ChainScratch, by_crate: &ByCrate) -> Result<(), DeviceError> {
        let Some(ring) = self.rings.get(usize::from(index)) else { return Ok(()) };
        let mut budget = Budget::unlimited();
        while !self.stopped.load(Ordering::Relaxed) {
            let chain = {
                let mut ring = lock(ring);
                match ring.pop(&mut budget)? {
                    Some(chain) => chain,
                    None if ring.rearm() => continue,
                    None => return Ok(()),
                }
            };
            let endless = |error: ChainError| lock(ring).error(&error.to_string());
            let mut request = scratch.load(&chain, CHAIN_LIMIT).map_err(endless)?;
            let head = request.head;
            let header = take_header(&mut request);
            let may_wait = may_wait(header.opcode);
            if may_wait {
                let more = lock(ring).rearm();
                self.make_way(more);
            }
            let written = match self.answer(&header, request) {
                Some(written) => written,
                None => {
                    // Part of it may be used up.
                    let mut request = scratch.load(&chain, CHAIN_LIMIT).map_err(endless)?;
                    take_header(&mut request);
                    self.answer_by_crate(&header, request, by_crate)
                }
            };
            let signal = {
                let mut ring = lock(ring);
                if may_wait {
                    // What comes next is this thread's to see: a notification would wake another for nothing.
                    ring.disarm();
                }
                ring.complete(head, written)?;
                ring.is_signal_due()
            };
            // Without the queue: the guest may have this processor before the call returns.
            if signal {
                self.interrupt.queue(index);
            }
        }
        Ok(())
    }

    /// Lets another thread go on, for this one may be away for a while.
    fn make_way(self: &Arc<Self>, more: bool) {
        if self.idle.load(Ordering::SeqCst) == 0
            && let Err(error) = self.spawn()
        {
            crate::report("volumes have a thread less", &error);
        }
        if more {
            self.more.set();
        }
    }

    /// Answers a request whose `header` is taken from `chain` already. Returns how many bytes
    /// the answer has; none if the request is left to the crate.
    fn answer(&self, header: &InHeader, chain: Chain<'_>) -> Option<u32> {
        FsMetrics::count(&self.volumes.metrics.requests, 1);
        if chain.faulty {
            None
        } else if transfer::serves(header.opcode) {
            transfer::answer(&self.volumes, header, chain)
        } else {
            short::answer(&self.files, header, chain)
        }
    }

    /// Answers a request that is rare or not as it should be, if only by refusing it.
    fn answer_by_crate(&self, header: &InHeader, mut chain: Chain<'_>, by_crate: &ByCrate) -> u32 {
        let known = is_known(header.opcode);
        if known
            && !chain.faulty
            && let Some(written) = by_crate.answer(&self.server, header, &mut chain)
        {
            return written;
        }
        FsMetrics::count(&self.volumes.metrics.refused, 1);
        if [Opcode::Forget as u32, Opcode::BatchForget as u32].contains(&header.opcode) {
            return 0;
        }
        let error = if known { libc::EIO } else { libc::ENOSYS };
        let answer = OutHeader { len: size_of::<OutHeader>() as u32, error: -error, unique: header.unique };
        // Where there is no room for it there is nobody to tell.
        if chain.writable.len() < size_of::<OutHeader>() {
            return 0;
        }
        chain.writable.write(answer.as_slice());
        answer.len
    }
}

/// Takes the header of a request; one of zeros, which no request has, if there is none.
fn take_header(request: &mut Chain<'_>) -> InHeader {
    request.readable.read_object().unwrap_or_default()
}

/// Requests that may take as long as a disk or another host does.
fn may_wait(opcode: u32) -> bool {
    use Opcode::{Fallocate, Flush, Fsync, Fsyncdir, Read, Write};
    [Read, Write, Fsync, Fsyncdir, Flush, Fallocate].into_iter().any(|known| known as u32 == opcode)
}

/// Requests that the device serves. Others get an answer that the driver knows: it does
/// without. The crate does not get to see them: it makes an enum of any number.
fn is_known(opcode: u32) -> bool {
    use Opcode::{
        BatchForget, Create, Destroy, Fallocate, Flush, Forget, Fsync, Fsyncdir, Getattr, Getxattr, Init, Link,
        Listxattr, Lookup, Lseek, Mkdir, Mknod, Open, Opendir, Read, Readdir, Readdirplus, Readlink, Release,
        Releasedir, Removexattr, Rename, Rename2, Rmdir, Setattr, Setxattr, Statfs, Symlink, Unlink, Write,
    };
    [
        Lookup,
        Forget,
        Getattr,
        Setattr,
        Readlink,
        Symlink,
        Mknod,
        Mkdir,
        Unlink,
        Rmdir,
        Rename,
        Link,
        Open,
        Read,
        Write,
        Statfs,
        Release,
        Fsync,
        Setxattr,
        Getxattr,
        Listxattr,
        Removexattr,
        Flush,
        Init,
        Opendir,
        Readdir,
        Releasedir,
        Fsyncdir,
        Create,
        Destroy,
        BatchForget,
        Fallocate,
        Readdirplus,
        Rename2,
        Lseek,
    ]
    .into_iter()
    .any(|known| known as u32 == opcode)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::testing::{Driver, FEATURES, Interrupts, memory};

    /// The threads of a device that nobody asks anything.
    fn start(room: fn() -> io::Result<ByCrate>) -> io::Result<Workers> {
        let memory = memory(0x10_0000);
        let rings = [(0, 0x1000, 128), (1, 0x8000, 512)].map(|(index, base, size)| {
            let driver = Driver::new(&memory, base, size);
            Ring::new(NAME, index, driver.queue(), &memory, FEATURES).unwrap()
        });
        let (interrupt, failed) = (Arc::<Interrupts>::default(), Arc::new(Wake::new().unwrap()));
        Workers::start(rings.into(), &[], interrupt, Arc::new(Volumes::new()), failed, room)
    }

    #[test]
    fn a_first_thread_that_cannot_start_is_an_error_of_the_device() {
        let none = || Err(io::ErrorKind::OutOfMemory.into());
        assert_eq!(start(none).unwrap_err().kind(), io::ErrorKind::OutOfMemory);
    }

    #[test]
    fn a_further_thread_that_cannot_start_is_none_and_the_others_serve() {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let one = || match MADE.fetch_add(1, Ordering::SeqCst) {
            1 => Err(io::ErrorKind::OutOfMemory.into()),
            _ => ByCrate::new(),
        };
        let workers = start(one).unwrap();
        assert!(workers.shared.spawn().is_err());
        assert_eq!(lock(&workers.shared.threads).len(), 1, "it does not take the place of one that can");
        for _ in 0..THREAD_LIMIT {
            workers.shared.spawn().unwrap();
        }
        assert_eq!(lock(&workers.shared.threads).len(), THREAD_LIMIT);
        assert!(workers.failure().is_none());
    }
}
