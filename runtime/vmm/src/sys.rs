//! The few system calls that have no safe wrapper elsewhere: mappings and signals.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::thread::JoinHandle;

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::EventFd;

/// Two MiB: what a huge page is aligned to.
pub const HUGE_PAGE: usize = 2 << 20;
/// Shown in `/proc/PID/maps` beside the guest's memory, as `[anon:nacelle-guest]`.
const GUEST_MEMORY_NAME: &std::ffi::CStr = c"nacelle-guest";

/// What a guest's memory comes from.
#[derive(Debug, Clone, Copy)]
pub enum Backing<'f> {
    /// Nothing: it is zero.
    Anonymous,
    /// A file, which what the guest writes goes to.
    File(&'f File),
    /// A file, which stays as it is: the process has copies of the pages that the guest writes.
    CopyOf(&'f File),
}

impl Backing<'_> {
    /// The flags of its mapping.
    pub fn flags(self) -> libc::c_int {
        match self {
            Self::Anonymous => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            Self::File(_) => libc::MAP_SHARED | libc::MAP_NORESERVE,
            Self::CopyOf(_) => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        }
    }

    fn descriptor(self) -> libc::c_int {
        match self {
            Self::Anonymous => -1,
            Self::File(file) | Self::CopyOf(file) => file.as_raw_fd(),
        }
    }
}

/// Maps `size` bytes of memory for a guest, aligned for huge pages and left out of core
/// dumps. It is never unmapped: it ends with the process. Of a file, which must have that size,
/// only `parts`, in whole pages, are mapped; the rest is zero, and nobody else's.
pub fn map_guest_memory(size: usize, backing: Backing<'_>, parts: &[Range<usize>]) -> io::Result<NonNull<u8>> {
    if parts.iter().any(|part| part.start > part.end || part.end > size) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let padded = size.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let anonymous = Backing::Anonymous.flags();
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no
    // existing memory.
    let start = unsafe { libc::mmap(ptr::null_mut(), padded, access, anonymous, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let before = start.align_offset(HUGE_PAGE);
    let after = HUGE_PAGE - before;
    // SAFETY: `before` < HUGE_PAGE, so all three pieces lie inside the mapping just made,
    // of which nobody else knows; parts of a file take the place of parts of the middle one. What
    // the advice fails to do is no error.
    unsafe {
        let aligned = start.byte_add(before);
        if before > 0 {
            libc::munmap(start, before);
        }
        if after > 0 {
            libc::munmap(aligned.byte_add(size), after);
        }
        // A file has a name already.
        libc::prctl(
            libc::PR_SET_VMA,
            libc::PR_SET_VMA_ANON_NAME as libc::c_ulong,
            aligned,
            size,
            GUEST_MEMORY_NAME.as_ptr(),
        );
        let file = backing.descriptor();
        let flags = backing.flags() | libc::MAP_FIXED;
        for part in parts.iter().filter(|part| file >= 0 && !part.is_empty()) {
            let place = aligned.byte_add(part.start);
            let offset = libc::off_t::try_from(part.start).map_err(|_| io::ErrorKind::InvalidInput)?;
            if libc::mmap(place, part.len(), access, flags, file, offset) != place {
                return Err(io::Error::last_os_error());
            }
        }
        libc::madvise(aligned, size, libc::MADV_DONTDUMP);
        NonNull::new(aligned.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }
}

/// Has the huge page of guest memory at `place` filled by small pages instead. It is advice: that it cannot be followed
/// is no error.
///
/// # Panics
///
/// When `place` is not aligned for a huge page.
pub fn advise_small_pages(place: NonNull<u8>) {
    assert!(place.addr().get().is_multiple_of(HUGE_PAGE), "a huge page begins there");
    // SAFETY: the advice changes no content of any mapping, whosever it is.
    unsafe { libc::madvise(place.as_ptr().cast(), HUGE_PAGE, libc::MADV_NOHUGEPAGE) };
}

/// A file's first bytes, mapped shared and writable.
#[derive(Debug)]
pub struct SharedMap {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is accessed through
// atomics only.
unsafe impl Send for SharedMap {}

impl SharedMap {
    /// Maps the first `size` bytes of `file`, which must be at least that long.
    pub fn new(file: &File, size: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, size })
    }

    /// Stores a byte; one beyond the mapping is dropped.
    pub fn store(&self, offset: usize, value: u8) {
        if offset < self.size {
            // SAFETY: in bounds of a live mapping, and `AtomicU8` has no alignment.
            unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(offset)) }.store(value, Ordering::Relaxed);
        }
    }

    /// Stores a word at an offset that is a multiple of 8, after all stores before it.
    pub fn store_u64(&self, offset: usize, value: u64) {
        if offset.is_multiple_of(8) && offset.checked_add(8).is_some_and(|end| end <= self.size) {
            // SAFETY: in bounds of a live mapping, aligned because mappings are.
            unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }.store(value, Ordering::Release);
        }
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`, which nothing refers to any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
    }
}

/// KVM's list of writes that it took note of without leaving the guest.
#[derive(Debug)]
pub struct CoalescedWrites {
    ring: NonNull<kvm_coalesced_mmio_ring>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `drain` takes it
// exclusively.
unsafe impl Send for CoalescedWrites {}

const RING_SIZE: usize = 4096;
const RING_ENTRIES: u32 = ((RING_SIZE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

impl CoalescedWrites {
    /// The list of the virtual machine that `vcpu` belongs to.
    pub fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        let offset = libc::off_t::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * RING_SIZE as libc::off_t;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let ring = unsafe {
            libc::mmap(
                ptr::null_mut(),
                RING_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if ring == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(ring.cast()).map(|ring| Self { ring }).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// Takes the writes off the list that are there, oldest first, as address and data. Not more than it has room for: other
    /// processors may go on writing meanwhile.
    pub fn drain(&mut self, mut write: impl FnMut(u64, &[u8])) {
        // SAFETY: the page is mapped as long as `self` lives; KVM advances `last`, we
        // `first`, both aligned words.
        let (first, last) = unsafe {
            let ring = self.ring.as_ptr();
            (AtomicU32::from_ptr(&raw mut (*ring).first), AtomicU32::from_ptr(&raw mut (*ring).last))
        };
        let mut next = first.load(Ordering::Relaxed);
        for _ in 0..RING_ENTRIES {
            if next >= RING_ENTRIES || next == last.load(Ordering::Acquire) {
                break;
            }
            // SAFETY: `next` is below the number of entries that follow the header in the
            // page, and KVM does not touch an entry between `first` and `last`.
            let entry = unsafe {
                let entries: *const kvm_coalesced_mmio = (&raw const (*self.ring.as_ptr()).coalesced_mmio).cast();
                entries.add(next as usize).read()
            };
            next = (next + 1) % RING_ENTRIES;
            fence(Ordering::Release);
            first.store(next, Ordering::Release);
            write(entry.phys_addr, entry.data.get(..entry.len as usize).unwrap_or(&entry.data));
        }
    }
}

impl Drop for CoalescedWrites {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`, which nothing refers to any more.
        unsafe { libc::munmap(self.ring.as_ptr().cast(), RING_SIZE) };
    }
}

/// The descriptor of an event.
pub fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns the descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The signal that takes a vCPU thread out of `KVM_RUN`.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn ignore_kick(_: libc::c_int) {}

/// Installs the handler that makes [`kick`] interrupt system calls. Idempotent.
pub fn install_kick_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid (no flags, so calls are not restarted); the
    // handler does nothing and so is safe in any context.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore_kick as *const () as libc::sighandler_t;
        libc::sigaction(kick_signal(), &action, ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Interrupts the system call that `thread` is in, if it is in one.
pub fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: the thread is not joined, since its handle exists, so its id is valid.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}

/// Blocks SIGTERM and SIGINT for this thread and those it spawns from now on, and returns
/// a descriptor that is readable when one of them is pending.
pub fn termination_signals() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before its use; signalfd returns a
    // descriptor that nobody else owns.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}
