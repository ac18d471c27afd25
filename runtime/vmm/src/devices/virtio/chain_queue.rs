//! Chains that the driver made available to be written, kept until there is something to
//! write: one packet may take several of them, and one system call fills them all.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::iovec;
use vm_memory::VolatileSlice;

use super::chain::{ChainError, ChainScratch, IOV_MAX};
use super::descriptors::AvailableChain;

/// A chain and how much of the buffers is its.
#[derive(Debug)]
struct Held {
    // Keeps the memory that the buffers point into.
    chain: AvailableChain,
    buffers: usize,
    length: usize,
}

/// The chains, in the order they were made available.
#[derive(Debug)]
pub struct ChainQueue {
    scratch: ChainScratch,
    chains: VecDeque<Held>,
    buffers: VecDeque<iovec>,
    room: usize,
}

// SAFETY: the pointers lead into guest memory, which is mapped for as long as the chains that
// they are of are held, and may be accessed from any thread.
unsafe impl Send for ChainQueue {}

impl ChainQueue {
    /// No chains yet.
    pub fn new() -> Self {
        Self { scratch: ChainScratch::new(), chains: VecDeque::new(), buffers: VecDeque::new(), room: 0 }
    }

    /// Takes a chain of up to `limit` descriptors. One in which nothing can be written is not
    /// kept; its head is returned.
    ///
    /// # Errors
    /// If the chain is not one, see [`ChainError`].
    pub fn push(&mut self, chain: AvailableChain, limit: usize) -> Result<Option<u16>, ChainError> {
        let loaded = self.scratch.load(&chain, limit)?;
        let (length, buffers) = (loaded.writable.len(), loaded.writable.buffers());
        if loaded.faulty || length == 0 || buffers.len() > IOV_MAX {
            return Ok(Some(loaded.head));
        }
        let count = buffers.len();
        self.buffers.extend(buffers);
        self.chains.push_back(Held { chain, buffers: count, length });
        self.room += length;
        Ok(None)
    }

    /// How many chains there are.
    pub fn len(&self) -> usize {
        self.chains.len()
    }

    /// Bytes that fit into the chains, as far as one system call reaches.
    pub fn room(&self) -> usize {
        if self.is_full() { self.buffers.iter().take(IOV_MAX).map(|buffer| buffer.iov_len).sum() } else { self.room }
    }

    /// Whether more chains would be beyond the reach of one system call.
    pub fn is_full(&self) -> bool {
        self.buffers.len() >= IOV_MAX
    }

    /// Bytes that fit into the first chain.
    pub fn first(&self) -> usize {
        self.chains.front().map_or(0, |chain| chain.length)
    }

    /// Reads one packet from `file` into the chains. Returns its length; if that is all the
    /// room there is, it may have lost its end.
    ///
    /// # Errors
    /// What `readv` reports, `WouldBlock` included.
    pub fn read_packet(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let buffers = self.buffers.make_contiguous();
        let count = buffers.len().min(IOV_MAX);
        loop {
            // SAFETY: the buffers are writable guest memory, see [`Held`], and `count` of
            // them are there.
            let done = unsafe { libc::readv(file.as_raw_fd(), buffers.as_ptr(), count as libc::c_int) };
            match usize::try_from(done) {
                Ok(done) => return Ok(done),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Writes `data` at byte `offset` of the chains, as far as it fits.
    pub fn write_at(&self, mut offset: usize, mut data: &[u8]) {
        for buffer in &self.buffers {
            if data.is_empty() {
                return;
            }
            let here = buffer.iov_len.saturating_sub(offset).min(data.len());
            if here > 0 {
                let (piece, rest) = data.split_at(here);
                // SAFETY: `offset` and the `here` bytes after it lie in the buffer, which is
                // guest memory, see [`Held`].
                let slice = unsafe { VolatileSlice::new(buffer.iov_base.cast::<u8>().add(offset), here) };
                slice.copy_from(piece);
                data = rest;
            }
            offset = offset.saturating_sub(buffer.iov_len);
        }
    }

    /// How many chains the first `length` bytes take.
    pub fn chains_for(&self, length: usize) -> usize {
        let mut rest = length;
        let mut count = 0;
        for chain in &self.chains {
            if rest == 0 {
                break;
            }
            rest = rest.saturating_sub(chain.length);
            count += 1;
        }
        count
    }

    /// Lets go of the chains that the first `length` bytes take, and appends them to `used`
    /// with how much of each is filled.
    pub fn take(&mut self, mut length: usize, used: &mut Vec<(u16, u32)>) {
        while length > 0 {
            let Some(chain) = self.chains.pop_front() else { return };
            let here = chain.length.min(length);
            length -= here;
            self.buffers.drain(..chain.buffers.min(self.buffers.len()));
            self.room = self.room.saturating_sub(chain.length);
            // A chain is shorter than 4 GiB.
            used.push((chain.chain.head(), u32::try_from(here).unwrap_or(u32::MAX)));
        }
    }
}
