//! The buffers of a descriptor chain, as pointers into guest memory that system calls
//! read and write in place.
//!
//! A chain is checked while it is loaded: every buffer lies in guest memory, the readable
//! ones come first, and the chain ends. The pointers live no longer than the borrow of the
//! available chain, which keeps the memory they point into. The guest may change the bytes at
//! any time, so they are only ever copied or handed to the kernel, never borrowed as a slice.

use std::ffi::c_int;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::iovec;
use vm_memory::{ByteValued, GuestMemory, VolatileSlice};

use super::descriptors::AvailableChain;
use super::regions::Regions;

/// The most buffers one system call takes.
pub(super) const IOV_MAX: usize = libc::UIO_MAXIOV as usize;

/// What makes a chain useless as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It has no end: a loop, a link out of the table, or an unreadable descriptor.
    #[error("descriptor chain {0} does not end")]
    Endless(u16),
    /// It has more descriptors than the device said it takes.
    #[error("descriptor chain {0} is longer than the device allows")]
    TooLong(u16),
}

/// Room for the buffers of one chain, reused so that requests allocate nothing.
#[derive(Debug, Default)]
pub struct ChainScratch {
    buffers: Vec<iovec>,
}

// SAFETY: the pointers are used through `Chain` only, which borrows both this and the memory
// they point into; what is left here between two chains is never followed.
unsafe impl Send for ChainScratch {}

impl ChainScratch {
    /// No room yet; it grows to the longest chain seen.
    #[must_use]
    pub const fn new() -> Self {
        Self { buffers: Vec::new() }
    }

    /// Looks up the buffers of `chain`, which may have up to `limit` descriptors.
    ///
    /// A buffer outside of memory, or a readable one after a writable one, is left out and
    /// noted in [`Chain::faulty`], so that the device can still answer the request.
    ///
    /// # Errors
    /// If the chain is not one, see [`ChainError`].
    pub fn load<'a>(&'a mut self, chain: &'a AvailableChain, limit: usize) -> Result<Chain<'a>, ChainError> {
        self.buffers.clear();
        let head = chain.head();
        let regions = chain.regions();
        let mut descriptors = 0_usize;
        let mut first_writable = None;
        let mut faulty = false;
        for descriptor in chain.descriptors() {
            let descriptor = descriptor.map_err(|_| ChainError::Endless(head))?;
            descriptors += 1;
            if descriptors > limit {
                return Err(ChainError::TooLong(head));
            }
            if descriptor.writable {
                first_writable.get_or_insert(self.buffers.len());
            } else if first_writable.is_some() {
                faulty = true;
                continue;
            }
            let length = descriptor.length as usize;
            // Nearly every buffer lies in one region, and that is much the faster way.
            if let Some(address) = regions.find(descriptor.address, length) {
                self.push(address, length);
                continue;
            }
            for slice in regions.memory().get_slices(descriptor.address, length) {
                match slice {
                    Ok(slice) => self.push(slice.ptr_guard_mut().as_ptr(), slice.len()),
                    Err(_) => {
                        faulty = true;
                        break;
                    }
                }
            }
        }
        let writable = first_writable.unwrap_or(self.buffers.len());
        let (readable, writable) = self.buffers.split_at_mut(writable);
        Ok(Chain { head, faulty, readable: GuestBytes::new(readable), writable: GuestBytes::new(writable) })
    }

    fn push(&mut self, address: *mut u8, length: usize) {
        if length > 0 {
            self.buffers.push(iovec { iov_base: address.cast(), iov_len: length });
        }
    }
}

/// A loaded chain.
#[derive(Debug)]
pub struct Chain<'a> {
    /// Its first descriptor, by which it is given back.
    pub head: u16,
    /// Whether buffers were left out because they were unusable.
    pub faulty: bool,
    /// What the driver wrote for the device.
    pub readable: GuestBytes<'a>,
    /// Where the device may write.
    pub writable: GuestBytes<'a>,
}

/// A run of bytes in guest memory that is used up from the front.
#[derive(Debug)]
pub struct GuestBytes<'a> {
    buffers: &'a mut [iovec],
    len: usize,
    memory: PhantomData<&'a Regions>,
}

impl<'a> GuestBytes<'a> {
    fn new(buffers: &'a mut [iovec]) -> Self {
        // A chain is shorter than 4 GiB, see `Descriptors`.
        let len = buffers.iter().map(|buffer| buffer.iov_len).sum();
        Self { buffers, len, memory: PhantomData }
    }

    /// The buffers as they are. They are guest memory for as long as that is borrowed.
    pub(super) fn buffers(&self) -> &[iovec] {
        self.buffers
    }

    /// Bytes left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the first bytes out. Returns how many there were.
    pub fn read(&mut self, mut data: &mut [u8]) -> usize {
        let wanted = data.len().min(self.len);
        self.consume(wanted, |slice| {
            let (here, rest) = std::mem::take(&mut data).split_at_mut(slice.len());
            // SAFETY: the slice is as long, and nothing of this process's own lies in guest
            // memory. Whatever the guest makes of the bytes meanwhile are bytes.
            unsafe { std::ptr::copy_nonoverlapping(slice.ptr_guard().as_ptr(), here.as_mut_ptr(), here.len()) };
            data = rest;
        });
        wanted
    }

    /// Copies the first `N` bytes out, or none if there are fewer.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut data = [0; N];
        if self.len < N {
            return None;
        }
        self.read(&mut data);
        Some(data)
    }

    /// Takes the first bytes as an object, or none if there are fewer.
    pub fn read_object<T: ByteValued + Default>(&mut self) -> Option<T> {
        let mut object = T::default();
        if self.len < size_of::<T>() {
            return None;
        }
        self.read(object.as_mut_slice());
        Some(object)
    }

    /// Copies as much of `data` in as fits. Returns how much did.
    pub fn write(&mut self, mut data: &[u8]) -> usize {
        let wanted = data.len().min(self.len);
        self.consume(wanted, |slice| {
            let (here, rest) = data.split_at(slice.len());
            // SAFETY: the slice is as long and writable, and nothing borrows guest memory.
            unsafe { std::ptr::copy_nonoverlapping(here.as_ptr(), slice.ptr_guard_mut().as_ptr(), here.len()) };
            data = rest;
        });
        wanted
    }

    /// Copies the first bytes to memory that is nobody's to borrow either. Returns how many
    /// there were.
    pub fn read_to(&mut self, mut to: VolatileSlice<'_>) -> usize {
        let wanted = to.len().min(self.len);
        self.consume(wanted, |slice| {
            slice.copy_to_volatile_slice(to);
            // It is as long as all that comes.
            to = to.offset(slice.len()).unwrap_or(to);
        });
        wanted
    }

    /// Copies as much of `from` in as fits. Returns how much did.
    pub fn write_from(&mut self, mut from: VolatileSlice<'_>) -> usize {
        let wanted = from.len().min(self.len);
        self.consume(wanted, |slice| {
            from.copy_to_volatile_slice(slice);
            from = from.offset(slice.len()).unwrap_or(from);
        });
        wanted
    }

    /// Writes up to `count` zero bytes. Returns how many fitted.
    pub fn write_zeros(&mut self, count: usize) -> usize {
        let wanted = count.min(self.len);
        self.consume(wanted, |slice| {
            let guard = slice.ptr_guard_mut();
            // SAFETY: the slice is that long and writable, and nothing borrows guest memory.
            unsafe { std::ptr::write_bytes(guard.as_ptr(), 0, slice.len()) };
        });
        wanted
    }

    /// Forgets all but the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        let mut rest = count.min(self.len);
        self.len = rest;
        let mut kept = 0;
        for buffer in self.buffers.iter_mut() {
            if rest == 0 {
                break;
            }
            buffer.iov_len = buffer.iov_len.min(rest);
            rest -= buffer.iov_len;
            kept += 1;
        }
        self.buffers = &mut std::mem::take(&mut self.buffers)[..kept];
    }

    /// Splits the first `count` bytes off, to be written later. None if there are fewer, or
    /// if they come in more than [`FRONT_PIECES`] pieces.
    pub fn split_front(&mut self, count: usize) -> Option<GuestFront<'a>> {
        if self.len < count {
            return None;
        }
        let mut front = GuestFront { pieces: [(std::ptr::null_mut(), 0); FRONT_PIECES], memory: PhantomData };
        let mut free = front.pieces.iter_mut();
        let mut fits = true;
        self.consume(count, |slice| match free.next() {
            Some(piece) => *piece = (slice.ptr_guard_mut().as_ptr(), slice.len()),
            None => fits = false,
        });
        fits.then_some(front)
    }

    /// Splits the last byte off.
    pub fn pop_last(&mut self) -> Option<GuestByte<'a>> {
        let last = self.buffers.iter_mut().rev().find(|buffer| buffer.iov_len > 0)?;
        last.iov_len -= 1;
        self.len -= 1;
        // SAFETY: the buffer was at least one byte longer.
        let address = unsafe { last.iov_base.cast::<u8>().add(last.iov_len) };
        Some(GuestByte { address, memory: PhantomData })
    }

    /// Fills the first `count` bytes with random ones, without waiting for entropy.
    ///
    /// # Errors
    /// What `getrandom` reports.
    pub fn write_random(&mut self, count: usize) -> io::Result<()> {
        let mut result = Ok(());
        self.consume(count.min(self.len), |slice| {
            let mut done = 0;
            while done < slice.len() && result.is_ok() {
                let guard = slice.ptr_guard_mut();
                // SAFETY: the slice is that long and writable.
                let filled = unsafe { libc::getrandom(guard.as_ptr().add(done).cast(), slice.len() - done, 0) };
                match usize::try_from(filled) {
                    Ok(filled) => done += filled,
                    Err(_) => result = retry_interrupted(io::Error::last_os_error()),
                }
            }
        });
        result
    }

    /// Reads the first `count` bytes from `file` at `offset`. False if the file ends before.
    ///
    /// # Errors
    /// What `preadv` reports.
    pub fn read_from_file(&mut self, file: BorrowedFd<'_>, mut offset: u64, count: usize) -> io::Result<bool> {
        let end = self.len - count.min(self.len);
        while self.len > end {
            let position = file_position(offset)?;
            let done = self.transfer(self.len - end, |buffers| {
                let file = file.as_raw_fd();
                match buffers {
                    // SAFETY: the buffer is writable guest memory, alive while `self` is borrowed.
                    [one] => unsafe { libc::pread(file, one.iov_base, one.iov_len, position) },
                    // SAFETY: as above.
                    many => unsafe { libc::preadv(file, many.as_ptr(), int_len(many), position) },
                }
            })?;
            if done == 0 {
                return Ok(false);
            }
            offset += done as u64;
        }
        Ok(true)
    }

    /// Reads as much of the first `count` bytes as `file` has in memory at `offset`. Returns how much that was; none is also
    /// what a file says that ends there.
    ///
    /// # Errors
    /// What `preadv2` reports; `WouldBlock` if nothing is in memory, `Unsupported` if the file cannot tell.
    pub fn read_cached_from_file(&mut self, file: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<usize> {
        let position = file_position(offset)?;
        self.transfer(count, |buffers| {
            // SAFETY: the buffers are writable guest memory, alive while `self` is borrowed.
            unsafe { libc::preadv2(file.as_raw_fd(), buffers.as_ptr(), int_len(buffers), position, libc::RWF_NOWAIT) }
        })
    }

    /// Writes the first `count` bytes to `file` at `offset`.
    ///
    /// # Errors
    /// What `pwritev` reports.
    pub fn write_to_file(&mut self, file: BorrowedFd<'_>, mut offset: u64, count: usize) -> io::Result<()> {
        let end = self.len - count.min(self.len);
        while self.len > end {
            let position = file_position(offset)?;
            let done = self.transfer(self.len - end, |buffers| {
                let file = file.as_raw_fd();
                match buffers {
                    // SAFETY: the buffer is guest memory, alive while `self` is borrowed.
                    [one] => unsafe { libc::pwrite(file, one.iov_base, one.iov_len, position) },
                    // SAFETY: as above.
                    many => unsafe { libc::pwritev(file, many.as_ptr(), int_len(many), position) },
                }
            })?;
            if done == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            offset += done as u64;
        }
        Ok(())
    }

    /// Receives up to `count` bytes from `socket`, without waiting. Returns 0 at the end of
    /// the stream, or if there is no room.
    ///
    /// # Errors
    /// What `recvmsg` reports, `WouldBlock` included.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, count: usize) -> io::Result<usize> {
        self.transfer(count, |buffers| {
            let socket = socket.as_raw_fd();
            if let [one] = buffers {
                // SAFETY: the buffer is writable guest memory, alive while `self` is borrowed.
                return unsafe { libc::recv(socket, one.iov_base, one.iov_len, libc::MSG_DONTWAIT) };
            }
            let mut message = message(buffers);
            // SAFETY: the header is valid, its buffers are as above.
            unsafe { libc::recvmsg(socket, &raw mut message, libc::MSG_DONTWAIT) }
        })
    }

    /// Sends as much as `socket` takes without waiting. Returns how much that was.
    ///
    /// # Errors
    /// What `sendmsg` reports, `WouldBlock` included.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.transfer(self.len, |buffers| {
            let socket = socket.as_raw_fd();
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            if let [one] = buffers {
                // SAFETY: the buffer is guest memory, alive while `self` is borrowed.
                return unsafe { libc::send(socket, one.iov_base, one.iov_len, flags) };
            }
            let message = message(buffers);
            // SAFETY: the header is valid, its buffers are as above.
            unsafe { libc::sendmsg(socket, &raw const message, flags) }
        })
    }

    /// Writes everything to `file` as one packet. Returns how much of it was taken.
    ///
    /// # Errors
    /// What `writev` reports, `WouldBlock` included; `InvalidInput` if it is in more pieces
    /// than one call takes.
    pub fn write_packet(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        if self.buffers.len() > IOV_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.transfer(self.len, |buffers| {
            // SAFETY: the buffers are guest memory, alive while `self` is borrowed.
            unsafe { libc::writev(file.as_raw_fd(), buffers.as_ptr(), int_len(buffers)) }
        })
    }

    /// Runs a system call on the first `count` bytes and uses up what it took.
    fn transfer(&mut self, count: usize, call: impl Fn(&[iovec]) -> isize) -> io::Result<usize> {
        let mut wanted = count.min(self.len);
        if wanted == 0 {
            return Ok(0);
        }
        let mut buffers = 0;
        let mut cut = 0;
        for buffer in self.buffers.iter_mut().take(IOV_MAX) {
            buffers += 1;
            if buffer.iov_len >= wanted {
                cut = buffer.iov_len - wanted;
                buffer.iov_len = wanted;
                break;
            }
            wanted -= buffer.iov_len;
        }
        let result = loop {
            let done = call(&self.buffers[..buffers]);
            match usize::try_from(done) {
                Ok(done) => break Ok(done),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        break Err(error);
                    }
                }
            }
        };
        if let Some(last) = self.buffers.get_mut(buffers - 1) {
            last.iov_len += cut;
        }
        let done = result?;
        self.consume(done.min(self.len), |_| {});
        Ok(done)
    }

    /// Uses up `count` bytes, at most what is left, and shows them to `each`.
    fn consume(&mut self, mut count: usize, mut each: impl FnMut(VolatileSlice<'_>)) {
        self.len -= count;
        let mut used = 0;
        for buffer in self.buffers.iter_mut() {
            let length = buffer.iov_len.min(count);
            if length > 0 {
                // SAFETY: the first `length` bytes of the buffer are guest memory.
                each(unsafe { VolatileSlice::new(buffer.iov_base.cast(), length) });
            }
            count -= length;
            if length < buffer.iov_len {
                // SAFETY: `length` is less than the buffer's.
                buffer.iov_base = unsafe { buffer.iov_base.byte_add(length) };
                buffer.iov_len -= length;
                break;
            }
            used += 1;
        }
        self.buffers = &mut std::mem::take(&mut self.buffers)[used..];
    }
}

/// The most pieces the start of a chain may be in to be split off.
pub const FRONT_PIECES: usize = 8;

/// The first bytes of a chain, such as a packet's header that is known after its payload.
#[derive(Debug)]
pub struct GuestFront<'a> {
    pieces: [(*mut u8, usize); FRONT_PIECES],
    memory: PhantomData<&'a Regions>,
}

impl GuestFront<'_> {
    /// Copies as much of `data` in as fits.
    pub fn write(self, mut data: &[u8]) {
        for (address, length) in self.pieces {
            let (piece, rest) = data.split_at(length.min(data.len()));
            if !piece.is_empty() {
                // SAFETY: the piece is that long and in guest memory, which is borrowed for as
                // long as `self`.
                unsafe { VolatileSlice::new(address, length) }.copy_from(piece);
            }
            data = rest;
        }
    }
}

/// One byte in guest memory, such as a request's status.
#[derive(Debug)]
pub struct GuestByte<'a> {
    address: *mut u8,
    memory: PhantomData<&'a Regions>,
}

impl GuestByte<'_> {
    /// Writes it.
    pub fn set(self, value: u8) {
        // SAFETY: the address is in guest memory, which is borrowed for as long as `self`.
        unsafe { self.address.write_volatile(value) };
    }
}

fn file_position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn retry_interrupted(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
}

/// How many buffers, for system calls that take an `int`; never more than [`IOV_MAX`].
fn int_len(buffers: &[iovec]) -> c_int {
    c_int::try_from(buffers.len()).unwrap_or(c_int::MAX)
}

fn message(buffers: &[iovec]) -> libc::msghdr {
    // SAFETY: all bytes zero are a valid, empty message header.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = buffers.as_ptr().cast_mut();
    message.msg_iovlen = buffers.len();
    message
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::devices::virtio::descriptors::QueueTable;
    use crate::devices::virtio::testing::{Buffer, Driver, readable, writable};

    /// Three regions, the first two without a gap; the queue's table is at 0.
    fn memory() -> GuestMemoryMmap {
        let ranges = [(GuestAddress(0), 0x2000), (GuestAddress(0x2000), 0x1000), (GuestAddress(0x8000), 0x1000)];
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    fn chain(memory: &GuestMemoryMmap, buffers: &[Buffer]) -> AvailableChain {
        let mut driver = Driver::new(memory, 0, 16);
        let head = driver.add(buffers);
        let table = QueueTable::new(Regions::new(memory), GuestAddress(0), 16, false).unwrap();
        AvailableChain::new(head, Arc::new(table))
    }

    #[test]
    fn a_buffer_may_lie_across_regions() {
        let memory = memory();
        memory.write_slice(b"across", GuestAddress(0x1ffd)).unwrap();
        let chain =
            chain(&memory, &[readable(0x1ffd, 6), readable(0x8000, 0), writable(0x1fff, 3), writable(0x8fff, 1)]);
        let mut scratch = ChainScratch::new();
        let mut loaded = scratch.load(&chain, 4).unwrap();
        assert!(!loaded.faulty);
        assert_eq!((loaded.readable.len(), loaded.writable.len()), (6, 4));
        assert_eq!(loaded.readable.read_array(), Some(*b"across"));
        assert_eq!(loaded.writable.write(b"backwards"), 4);
        let mut found = [0; 3];
        memory.read_slice(&mut found, GuestAddress(0x1fff)).unwrap();
        assert_eq!((&found, memory.read_obj::<u8>(GuestAddress(0x8fff)).unwrap()), (b"bac", b'k'));
    }

    #[test]
    fn what_is_no_buffer_is_left_out_and_noted() {
        let memory = memory();
        let mut scratch = ChainScratch::new();
        for (bad, rest) in [
            // After what is in memory of it.
            (writable(0x2fff, 2), 1),
            (writable(0x7fff, 2), 0),
            (writable(0x3000, 1), 0),
            (writable(u64::MAX, 2), 0),
            (readable(0x8000, 1), 0),
        ] {
            let chain = chain(&memory, &[readable(0x1000, 10), writable(0x1000, 20), bad, writable(0x8000, 5)]);
            let loaded = scratch.load(&chain, 4).unwrap();
            assert!(loaded.faulty, "{bad:?}");
            assert_eq!((loaded.readable.len(), loaded.writable.len()), (10, 25 + rest), "{bad:?}");
        }
    }

    #[test]
    fn a_chain_longer_than_the_limit_is_refused() {
        let memory = memory();
        let chain = chain(&memory, &[readable(0x1000, 1); 5]);
        let mut scratch = ChainScratch::new();
        assert_eq!(scratch.load(&chain, 5).unwrap().readable.len(), 5);
        assert_eq!(scratch.load(&chain, 4).unwrap_err(), ChainError::TooLong(chain.head()));
    }

    #[test]
    fn memory_is_there_as_long_as_a_chain_of_it() {
        let chain = chain(&memory(), &[writable(0x1000, 4)]);
        let mut scratch = ChainScratch::new();
        assert_eq!(scratch.load(&chain, 1).unwrap().writable.write(b"kept"), 4);
        assert_eq!(scratch.load(&chain, 1).unwrap().writable.read_array(), Some(*b"kept"));
    }
}
