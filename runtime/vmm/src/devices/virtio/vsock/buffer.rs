//! Data from the guest that the host's socket did not take yet.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::net::{SendFlags, send};

use crate::devices::virtio::chain::GuestBytes;

/// Memory kept for the next time when the buffer runs empty.
const KEPT: usize = 4096;

/// A queue of bytes. Empty, it takes up next to nothing.
#[derive(Debug, Default)]
pub struct ByteBuffer {
    data: Vec<u8>,
    /// How much of `data` is gone already.
    start: usize,
}

impl ByteBuffer {
    pub fn len(&self) -> usize {
        self.data.len() - self.start
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Moves all of `data` to the end.
    pub fn append(&mut self, data: &mut GuestBytes<'_>) {
        let added = data.len();
        if self.start > 0 && self.data.len() + added > self.data.capacity() {
            self.data.drain(..self.start);
            self.start = 0;
        }
        let end = self.data.len();
        self.data.resize(end + added, 0);
        data.read(&mut self.data[end..]);
    }

    /// Sends what `socket` takes without waiting. Returns how much that was.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let sent = send(socket, &self.data[self.start..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        self.start += sent;
        if self.is_empty() {
            self.clear();
        }
        Ok(sent)
    }

    /// Throws everything away. Returns how much it was.
    pub fn clear(&mut self) -> usize {
        let dropped = self.len();
        self.start = 0;
        self.data.clear();
        self.data.shrink_to(KEPT);
        dropped
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::virtio::chain::ChainScratch;
    use crate::devices::virtio::ring::Ring;
    use crate::devices::virtio::testing::{Driver, memory, readable};

    #[test]
    fn bytes_come_out_in_order_and_memory_is_given_back() {
        let memory = memory(0x10_0000);
        let mut driver = Driver::new(&memory, 0x1000, 16);
        let mut ring = Ring::new("test", 0, driver.queue(), &memory, 0).unwrap();
        let mut scratch = ChainScratch::new();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut buffer = ByteBuffer::default();
        let mut put = 0_u8;
        let mut got = 0_u8;
        for round in 0..200 {
            for _ in 0..3 {
                let data: Vec<u8> = (0..1000)
                    .map(|_| {
                        put = put.wrapping_add(1);
                        put
                    })
                    .collect();
                memory.write_slice(&data, GuestAddress(0x8000)).unwrap();
                driver.add(&[readable(0x8000, 1), readable(0x8001, 999)]);
                let chain = ring.pop(&mut crate::devices::virtio::budget::Budget::unlimited()).unwrap().unwrap();
                let mut chain = scratch.load(&chain, 16).unwrap();
                buffer.append(&mut chain.readable);
                ring.complete(chain.head, 0).unwrap();
                driver.take().unwrap();
            }
            // Every other round something stays, so that old bytes lie before new ones.
            while buffer.len() > 1500 * (round % 2) {
                let sent = buffer.send(ours.as_fd()).unwrap();
                let mut data = vec![0; sent];
                theirs.read_exact(&mut data).unwrap();
                for byte in data {
                    got = got.wrapping_add(1);
                    assert_eq!(byte, got);
                }
            }
            assert!(buffer.data.capacity() <= 16384, "{}", buffer.data.capacity());
        }
        while !buffer.is_empty() {
            buffer.send(ours.as_fd()).unwrap();
        }
        assert!(buffer.data.capacity() <= KEPT);
    }
}
