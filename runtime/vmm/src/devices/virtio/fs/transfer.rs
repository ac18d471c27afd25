//! Reads and writes: what moves the content of files.
//!
//! The crate could serve them, too, but it looks up each buffer several times and copies lists
//! of them, which costs more than the system call. Here they go from the driver's buffers to
//! the file and back in one. A request that is not as a driver makes it is left to the crate,
//! which has an answer to everything.

use std::io;
use std::os::fd::AsFd;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader, ReadIn, WRITE_KILL_PRIV, WriteIn, WriteOut};
use vm_memory::ByteValued;

use super::credentials::keep_set_id;
use super::metrics::FsMetrics;
use super::volumes::Volumes;
use crate::devices::virtio::chain::Chain;

/// Whether a request is a read or a write.
pub fn serves(opcode: u32) -> bool {
    opcode == Opcode::Read as u32 || opcode == Opcode::Write as u32
}

/// Answers a read or a write, and returns how many bytes the answer has. None if it is not as
/// it should be; then nothing has happened. `header` is taken from `chain` already.
pub fn answer(volumes: &Volumes, header: &InHeader, chain: Chain<'_>) -> Option<u32> {
    if header.opcode == Opcode::Read as u32 { read(volumes, chain, header) } else { write(volumes, chain, header) }
}

fn read(volumes: &Volumes, mut chain: Chain<'_>, header: &InHeader) -> Option<u32> {
    let wanted: ReadIn = chain.readable.read_object()?;
    let front = chain.writable.split_front(size_of::<OutHeader>())?;
    let size = wanted.size as usize;
    let room = chain.writable.len();
    if size > room {
        return None;
    }
    let done = volumes.handles.get(wanted.fh, header.nodeid).and_then(|handle| {
        chain.writable.read_from_file(handle.file.as_fd(), wanted.offset, size)?;
        Ok(room - chain.writable.len())
    });
    if let Ok(count) = done {
        FsMetrics::count(&volumes.metrics.read_bytes, count);
    }
    let out = out_header(header, done);
    front.write(out.as_slice());
    Some(out.len)
}

fn write(volumes: &Volumes, mut chain: Chain<'_>, header: &InHeader) -> Option<u32> {
    let wanted: WriteIn = chain.readable.read_object()?;
    let size = wanted.size as usize;
    let data = chain.readable.len();
    if size > data || chain.writable.len() < size_of::<OutHeader>() + size_of::<WriteOut>() {
        return None;
    }
    let done = volumes.handles.get(wanted.fh, header.nodeid).and_then(|handle| {
        keep_set_id(wanted.fuse_flags & WRITE_KILL_PRIV == 0)?;
        let result = chain.readable.write_to_file(handle.file.as_fd(), wanted.offset, size);
        // What is written is written: the caller hears of the error when it goes on.
        match data - chain.readable.len() {
            0 => result.map(|()| 0),
            count => Ok(count),
        }
    });
    let answer = done.as_ref().map(|count| WriteOut { size: *count as u32, padding: 0 }).ok();
    if let Some(answer) = answer {
        FsMetrics::count(&volumes.metrics.written_bytes, answer.size as usize);
    }
    let out = out_header(header, done.map(|_| size_of::<WriteOut>()));
    chain.writable.write(out.as_slice());
    if let Some(answer) = answer {
        chain.writable.write(answer.as_slice());
    }
    Some(out.len)
}

/// The header of an answer with `count` bytes after it, or of an error.
pub fn out_header(header: &InHeader, count: io::Result<usize>) -> OutHeader {
    let (count, error) = match count {
        Ok(count) => (count, 0),
        Err(error) => {
            let other = if error.kind() == io::ErrorKind::InvalidInput { libc::EINVAL } else { libc::EIO };
            (0, error.raw_os_error().unwrap_or(other))
        }
    };
    OutHeader { len: (size_of::<OutHeader>() + count) as u32, error: -error, unique: header.unique }
}
