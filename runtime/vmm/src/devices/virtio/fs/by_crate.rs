//! Requests that the crate serves: those that are rare, or not as a driver makes them.
//!
//! It gets a copy of the request, and what it answers is copied to the driver: both lie in
//! memory of this process. What the crate has checked stays as it was, whatever the guest
//! writes meanwhile, and it sees two buffers where the driver has many.

use std::io;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::init;
use super::passthrough::Passthrough;
use crate::devices::virtio::chain::Chain;

/// Bytes of the longest message: a header, arguments, and two names or the data of a read or
/// a write.
const MESSAGE_LIMIT: usize = (1 << 20) + 0x1000;

/// Where a queue of its own has its parts, which the crate takes requests by.
const TABLE: GuestAddress = GuestAddress(0);
const AVAILABLE: GuestAddress = GuestAddress(0x100);
const REQUEST: GuestAddress = GuestAddress(0x1000);
const ANSWER: GuestAddress = GuestAddress(REQUEST.0 + MESSAGE_LIMIT as u64);
const SIZE: usize = 0x1000 + 2 * MESSAGE_LIMIT;

/// Room for one request and its answer.
#[derive(Debug)]
pub struct ByCrate {
    memory: GuestMemoryMmap,
}

impl ByCrate {
    /// Takes memory as it is needed.
    ///
    /// # Errors
    /// If there is no address space left.
    pub fn new() -> io::Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).map_err(io::Error::other)?;
        // Flags, the index after the last chain, and the one chain's first descriptor.
        memory.write_obj([0_u16, 1, 0].map(u16::to_le), AVAILABLE).map_err(io::Error::other)?;
        Ok(Self { memory })
    }

    /// Has `server` answer a request, `header` of which is taken from `chain` already. Returns
    /// how many bytes the answer has. None if the request makes no sense; then `chain` has all
    /// its room.
    pub fn answer(&self, server: &Server<Passthrough>, header: &InHeader, chain: &mut Chain<'_>) -> Option<u32> {
        let length = size_of::<InHeader>() + chain.readable.len();
        if length > MESSAGE_LIMIT || header.len as usize > MESSAGE_LIMIT {
            return None;
        }
        let room = chain.writable.len().min(MESSAGE_LIMIT);
        // The header that was looked at, not what the guest may have made of it since.
        self.memory.write_obj(*header, REQUEST).ok()?;
        let body = REQUEST.0 + size_of::<InHeader>() as u64;
        chain.readable.read_to(self.memory.get_slice(GuestAddress(body), chain.readable.len()).ok()?);
        let (reader, writer) = self.buffers(length, room)?;
        let written = server.handle_message(reader, writer.into(), None, None).ok()?.min(room);
        if header.opcode == Opcode::Init as u32 {
            init::allow_mapped_mounts(&self.memory, (REQUEST, length), (ANSWER, written));
        }
        chain.writable.write_from(self.memory.get_slice(ANSWER, written).ok()?);
        u32::try_from(written).ok()
    }

    fn buffers(&self, request: usize, answer: usize) -> Option<(Reader<'_>, VirtioFsWriter<'_>)> {
        let flags = |flags: u32| flags as u16;
        let table = [
            Descriptor::new(REQUEST.0, u32::try_from(request).ok()?, flags(VRING_DESC_F_NEXT), 1),
            Descriptor::new(ANSWER.0, u32::try_from(answer).ok()?, flags(VRING_DESC_F_WRITE), 0),
        ];
        for (index, descriptor) in (0..).zip(table) {
            self.memory.write_obj(RawDescriptor::from(descriptor), GuestAddress(TABLE.0 + 16 * index)).ok()?;
        }
        let mut queue = Queue::new(2).ok()?;
        queue.set_desc_table_address(Some(TABLE.0 as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE.0 as u32), None);
        queue.set_ready(true);
        let chain = queue.iter(&self.memory).ok()?.next()?;
        let reader = Reader::from_descriptor_chain(&self.memory, chain.clone()).ok()?;
        Some((reader, VirtioFsWriter::new(&self.memory, chain).ok()?))
    }
}
