//! What the crate does not know yet of the first request, FUSE_INIT: that a guest's mounts may
//! map ids (FUSE 7.41, Linux 6.12).
//!
//! The crate drops flags that it does not know from what the guest offers and from its own
//! answer. This one needs nothing of the server but a word, which is put into the answer
//! before the guest gets it.

use fuse_backend_rs::abi::fuse_abi::{InHeader, OutHeader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// `FUSE_INIT_EXT` of `flags`: there is a `flags2`.
const INIT_EXT: u32 = 1 << 30;
/// `FUSE_ALLOW_IDMAP`, bit 40 of both together.
const ALLOW_IDMAP: u32 = 1 << 8;

/// `flags` and `flags2` of `fuse_init_in`, after `major`, `minor` and `max_readahead`.
const OFFERED: [usize; 2] = [size_of::<InHeader>() + 12, size_of::<InHeader>() + 16];
/// `flags` of `fuse_init_out`, after the same, and `flags2`, after more.
const ANSWERED: [usize; 2] = [size_of::<OutHeader>() + 12, size_of::<OutHeader>() + 32];

/// Adds to an answer that mounts may map ids, if the request offers to and the answer is a
/// good one with room for it. Both are in `memory`, at an address and of a length.
pub fn allow_mapped_mounts(memory: &GuestMemoryMmap, request: (GuestAddress, usize), answer: (GuestAddress, usize)) {
    let at = |(start, length): (GuestAddress, usize), offset: usize| {
        (offset + 4 <= length).then(|| GuestAddress(start.0 + offset as u64))
    };
    let [Some(flags), Some(flags2)] = OFFERED.map(|offset| memory.read_obj::<u32>(at(request, offset)?).ok()) else {
        return;
    };
    if flags & INIT_EXT == 0 || flags2 & ALLOW_IDMAP == 0 {
        return;
    }
    let [Some(flags), Some(flags2)] = ANSWERED.map(|offset| at(answer, offset)) else { return };
    let add = |at, flag: u32| memory.read_obj::<u32>(at).and_then(|flags| memory.write_obj(flags | flag, at));
    // Both, or a guest that reads the first alone finds nothing new in the second.
    let _ = add(flags2, ALLOW_IDMAP).and_then(|()| add(flags, INIT_EXT));
}
