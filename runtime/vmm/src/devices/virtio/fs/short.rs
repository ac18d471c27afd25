//! Requests that are short and many: names and attributes, opening and closing.
//!
//! Most of what the crate spends on one of these goes into looking up the driver's buffers.
//! Here a request is copied out of them and its answer into them. What is rare, or not as a
//! driver makes it, is left to the crate, which has an answer to everything.

use std::ffi::CStr;
use std::io;

use fuse_backend_rs::abi::fuse_abi::{
    AttrOut, CreateIn, EntryOut, ForgetIn, GETATTR_FH, GetattrIn, InHeader, Opcode, OpenIn, OpenOut, OutHeader,
    ReleaseIn,
};
use fuse_backend_rs::api::filesystem::{Context, FileSystem, OpenOptions};
use vm_memory::ByteValued;

use super::passthrough::Passthrough;
use super::transfer::out_header;
use crate::devices::virtio::chain::Chain;

/// Bytes of the longest request after its header: arguments and a name.
const BODY: usize = 320;
/// Bytes of the longest answer after its header.
const ANSWER: usize = ENTRY + OPEN;

/// What follows the header of an answer.
struct Answer {
    bytes: [u8; ANSWER],
    length: usize,
}

impl Answer {
    fn of(first: &[u8], second: &[u8]) -> Self {
        let mut answer = Self { bytes: [0; ANSWER], length: first.len() + second.len() };
        let (to_first, rest) = answer.bytes.split_at_mut(first.len());
        to_first.copy_from_slice(first);
        rest[..second.len()].copy_from_slice(second);
        answer
    }
}

/// A kind of request: how many bytes its answer has after the header, and what answers it, or
/// does not if the request is not as it should be.
struct Kind {
    opcode: Opcode,
    room: usize,
    serve: fn(&Passthrough, &InHeader, &[u8]) -> Option<io::Result<Answer>>,
}

const ENTRY: usize = size_of::<EntryOut>();
const OPEN: usize = size_of::<OpenOut>();
const KINDS: [Kind; 7] = [
    Kind { opcode: Opcode::Lookup, room: ENTRY, serve: look_up },
    Kind { opcode: Opcode::Getattr, room: size_of::<AttrOut>(), serve: attributes },
    Kind { opcode: Opcode::Create, room: ENTRY + OPEN, serve: create },
    Kind { opcode: Opcode::Open, room: OPEN, serve: open },
    Kind { opcode: Opcode::Release, room: 0, serve: release },
    Kind { opcode: Opcode::Unlink, room: 0, serve: unlink },
    Kind { opcode: Opcode::Forget, room: 0, serve: forget },
];

/// Answers a request if it is one of these, and returns how many bytes the answer has. None if
/// it is not, or not as it should be; then nothing has happened. `header` is taken from `chain`
/// already.
pub fn answer(files: &Passthrough, header: &InHeader, mut chain: Chain<'_>) -> Option<u32> {
    let kind = KINDS.iter().find(|kind| kind.opcode as u32 == header.opcode)?;
    let silent = matches!(kind.opcode, Opcode::Forget);
    let length = chain.readable.len();
    let room = if silent { 0 } else { size_of::<OutHeader>() + kind.room };
    if size_of::<InHeader>() + length != header.len as usize || chain.writable.len() < room {
        return None;
    }
    let mut body = [0; BODY];
    let body = body.get_mut(..length)?;
    chain.readable.read(body);
    let done = (kind.serve)(files, header, body)?;
    if silent {
        return Some(0);
    }
    let (out, answer) = match done {
        Ok(answer) => (out_header(header, Ok(answer.length)), Some(answer)),
        Err(error) => (out_header(header, Err(error)), None),
    };
    chain.writable.write(out.as_slice());
    if let Some(answer) = answer {
        chain.writable.write(&answer.bytes[..answer.length]);
    }
    Some(out.len)
}

fn look_up(files: &Passthrough, header: &InHeader, body: &[u8]) -> Option<io::Result<Answer>> {
    let name = CStr::from_bytes_with_nul(body).ok()?;
    Some(
        files
            .lookup(&context(header), header.nodeid, name)
            .map(|entry| Answer::of(EntryOut::from(entry).as_slice(), &[])),
    )
}

fn attributes(files: &Passthrough, header: &InHeader, body: &[u8]) -> Option<io::Result<Answer>> {
    let wanted: GetattrIn = arguments(body)?.0;
    let handle = (wanted.flags & GETATTR_FH != 0).then_some(wanted.fh);
    Some(files.getattr(&context(header), header.nodeid, handle).map(|(attributes, valid)| {
        let answer = AttrOut {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            dummy: 0,
            attr: attributes.into(),
        };
        Answer::of(answer.as_slice(), &[])
    }))
}

fn create(files: &Passthrough, header: &InHeader, body: &[u8]) -> Option<io::Result<Answer>> {
    let (wanted, name) = arguments::<CreateIn>(body)?;
    let name = CStr::from_bytes_with_nul(name).ok()?;
    let made = files.create(&context(header), header.nodeid, name, wanted);
    Some(made.map(|(entry, handle, options, _)| {
        Answer::of(EntryOut::from(entry).as_slice(), opened(handle, options).as_slice())
    }))
}

fn open(files: &Passthrough, header: &InHeader, body: &[u8]) -> Option<io::Result<Answer>> {
    let wanted: OpenIn = arguments(body)?.0;
    let done = files.open(&context(header), header.nodeid, wanted.flags, wanted.fuse_flags);
    Some(done.map(|(handle, options, _)| Answer::of(opened(handle, options).as_slice(), &[])))
}

fn release(files: &Passthrough, header: &InHeader, body: &[u8]) -> Option<io::Result<Answer>> {
    let wanted: ReleaseIn = arguments(body)?.0;
    let done = files.release(&context(header), header.nodeid, wanted.flags, wanted.fh, false, false, None);
    Some(done.map(|()| Answer::of(&[], &[])))
}

fn unlink(files: &Passthrough, header: &InHeader, body: &[u8]) -> Option<io::Result<Answer>> {
    let name = CStr::from_bytes_with_nul(body).ok()?;
    Some(files.unlink(&context(header), header.nodeid, name).map(|()| Answer::of(&[], &[])))
}

fn forget(files: &Passthrough, header: &InHeader, body: &[u8]) -> Option<io::Result<Answer>> {
    let wanted: ForgetIn = arguments(body)?.0;
    files.forget(&context(header), header.nodeid, wanted.nlookup);
    Some(Ok(Answer::of(&[], &[])))
}

/// Who asks.
fn context(header: &InHeader) -> Context {
    Context { uid: header.uid, gid: header.gid, pid: header.pid as i32 }
}

/// The arguments of a request, and what follows them.
fn arguments<T: ByteValued + Default>(body: &[u8]) -> Option<(T, &[u8])> {
    let (bytes, rest) = body.split_at_checked(size_of::<T>())?;
    let mut arguments = T::default();
    arguments.as_mut_slice().copy_from_slice(bytes);
    Some((arguments, rest))
}

fn opened(handle: Option<u64>, options: OpenOptions) -> OpenOut {
    OpenOut { fh: handle.unwrap_or_default(), open_flags: options.bits(), passthrough: 0 }
}
