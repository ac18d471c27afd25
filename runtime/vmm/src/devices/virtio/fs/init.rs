//! What the crate does not know yet of the first request, FUSE_INIT: that a guest's mounts may
//! map ids (FUSE 7.41, Linux 6.12).
//!
//! The crate drops flags that it does not know from what the guest offers and from its own
//! answer. This one needs nothing of the server but a word, which is put into the answer
//! before the guest gets it.

use fuse_backend_rs::abi::fuse_abi::{InHeader, OutHeader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::devices::virtio::ring::AvailableChain;

/// `FUSE_INIT_EXT` of `flags`: there is a `flags2`.
const INIT_EXT: u32 = 1 << 30;
/// `FUSE_ALLOW_IDMAP`, bit 40 of both together.
const ALLOW_IDMAP: u32 = 1 << 8;

/// `flags` and `flags2` of `fuse_init_in`, after `major`, `minor` and `max_readahead`.
const OFFERED: [u64; 2] = [size_of::<InHeader>() as u64 + 12, size_of::<InHeader>() as u64 + 16];
/// `flags` of `fuse_init_out`, after the same, and `flags2`, after more.
const ANSWERED: [u64; 2] = [size_of::<OutHeader>() as u64 + 12, size_of::<OutHeader>() as u64 + 32];

/// Adds to the answer of `written` bytes in `chain` that mounts may map ids, if the guest
/// offers to, and the answer is a good one with room for it.
pub fn allow_mapped_mounts(memory: &GuestMemoryMmap, chain: &AvailableChain<'_>, written: usize) {
    let read = |offset| {
        let buffers = chain.clone().readable().map(|buffer| (buffer.addr(), buffer.len()));
        locate(buffers, offset).and_then(|at| memory.read_obj::<u32>(at).ok())
    };
    let [Some(flags), Some(flags2)] = OFFERED.map(read) else { return };
    if flags & INIT_EXT == 0 || flags2 & ALLOW_IDMAP == 0 || (written as u64) < ANSWERED[1] + 4 {
        return;
    }
    let find = |offset| locate(chain.clone().writable().map(|buffer| (buffer.addr(), buffer.len())), offset);
    let [Some(flags), Some(flags2)] = ANSWERED.map(find) else { return };
    let add = |at, flag: u32| memory.read_obj::<u32>(at).and_then(|flags| memory.write_obj(flags | flag, at));
    // Both, or a guest that reads the first alone finds nothing new in the second.
    let _ = add(flags2, ALLOW_IDMAP).and_then(|()| add(flags, INIT_EXT));
}

/// Where the four bytes at `offset` of a message are, if they lie in one of its buffers.
fn locate(buffers: impl Iterator<Item = (GuestAddress, u32)>, offset: u64) -> Option<GuestAddress> {
    let mut rest = offset;
    for (address, length) in buffers {
        let length = u64::from(length);
        match rest.checked_add(4) {
            Some(end) if end <= length => return address.0.checked_add(rest).map(GuestAddress),
            _ => rest = rest.checked_sub(length)?,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_in_one_buffer_and_not_across_two() {
        let buffers = [(GuestAddress(100), 10), (GuestAddress(500), 8)];
        let find = |offset| locate(buffers.into_iter(), offset).map(|at| at.0);
        assert_eq!([0, 6, 10, 14].map(find), [100, 106, 500, 504].map(Some));
        assert_eq!([7, 9, 15, 18, u64::MAX].map(find), [None; 5]);
    }
}
