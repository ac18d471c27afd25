//! Nothing that a guest says harms more than its own volumes.

use std::fs;
use std::os::unix::fs::symlink;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode};
use proptest::prelude::*;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::guest::{Guest, directory};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::fs::Access;
use crate::devices::virtio::testing::{readable, writable};

#[test]
fn no_name_and_no_link_leads_out_of_a_volume() {
    let (host, mut guest) = (directory(), Guest::new());
    let outside = directory();
    symlink(outside.path(), host.path().join("out")).unwrap();
    symlink("/etc/passwd", host.path().join("passwd")).unwrap();
    guest.share("data", host.path(), Access::Write);
    let root = guest.walk("data").unwrap().nodeid;
    for name in ["..", ".", "", "../file", "/etc/passwd", "sub/empty", "out/file"] {
        assert_eq!(guest.lookup(root, name).map(|_| ()), Err(libc::EINVAL), "{name:?}");
    }
    for name in ["out", "passwd"] {
        let link = guest.lookup(root, name).unwrap();
        assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK, "{name}: the link itself");
        assert_eq!(guest.lookup(link.nodeid, "file").map(|_| ()), Err(libc::ENOTDIR), "{name}");
        assert_eq!(guest.open(link.nodeid, libc::O_RDWR).map(|_| ()), Err(libc::EIO), "{name}");
        assert!(guest.truncate(link.nodeid, 0).is_err(), "{name}");
        // Made over a link that the host put there meanwhile: not through it.
        assert_eq!(guest.create(root, name, 0o644).map(|_| ()), Err(libc::EIO), "{name}");
    }
    assert_eq!(fs::read(outside.path().join("file")).unwrap(), b"content");
}

#[test]
fn requests_that_the_device_does_not_know_are_answered() {
    let mut guest = Guest::new();
    for opcode in [Opcode::Ioctl, Opcode::Poll, Opcode::SetupMapping, Opcode::Bmap, Opcode::Setlkw] {
        assert_eq!(guest.call(opcode, 1, &[0xff; 64]), Err(libc::ENOSYS), "{opcode:?}");
    }
    // Known, and too short.
    assert_eq!(guest.call(Opcode::Write, 1, &[]), Err(libc::EIO));
    assert_eq!(guest.call(Opcode::Lookup, 1, b"no end"), Err(libc::EIO));
}

/// A message with some sense in it.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let node = prop_oneof![Just(1_u64), 2_u64..16, any::<u64>()];
    let length = prop_oneof![Just(None), any::<u32>().prop_map(Some)];
    let body = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        prop::collection::vec(prop_oneof![Just(0_u8), Just(1), Just(0xff), Just(b'/'), Just(b'.')], 0..200),
        "(data|locked|file|sub|new)\0(file|link|x)?\0?".prop_map(String::into_bytes),
    ];
    (0_u32..60, node, length, body).prop_map(|(opcode, nodeid, length, body)| {
        let whole = (size_of::<InHeader>() + body.len()) as u32;
        let len = length.unwrap_or(whole);
        let header = InHeader { len, opcode, unique: 77, nodeid, uid: 1000, gid: 1000, ..InHeader::default() };
        [header.as_slice(), &body].concat()
    })
}

/// One entry of a descriptor table: address, length, flags, next.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![0_u64..0x90_0000, Just(u64::MAX), (1_u64 << 32)..(1 << 32) + 0x90_0000];
    let length = prop_oneof![0_u32..5000, Just(u32::MAX), Just(0x80_0000)];
    (address, length, 0_u16..8, 0_u16..520)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_message_panics_the_device_or_leaves_the_volume(
        messages in prop::collection::vec(message(), 1..60),
        room in prop_oneof![Just(0_u32), 0_u32..40, Just(0x1000), Just(0x10_0000)],
    ) {
        let (host, mut guest) = (directory(), Guest::new());
        let outside = directory();
        symlink(outside.path(), host.path().join("link")).unwrap();
        guest.share("data", host.path(), Access::Write);
        // Two that are one, and a part of them.
        let locked = directory();
        for (name, below) in [("locked", ""), ("again", ""), ("part", "sub")] {
            guest.share(name, &locked.path().join(below), Access::ReadAll);
        }
        for path in ["data/sub/empty", "data/file", "locked/sub/empty", "again/file", "part/empty"] {
            guest.walk(path).unwrap();
        }
        for message in messages {
            guest.memory.write_slice(&message, GuestAddress(0x40_0000)).unwrap();
            let header = size_of::<InHeader>() as u32;
            let mut buffers = vec![readable(0x40_0000, header)];
            if message.len() > header as usize {
                buffers.push(readable(0x40_0000 + u64::from(header), message.len() as u32 - header));
            }
            buffers.push(writable(0x60_0000, room));
            guest.requests.add(&buffers);
            guest.notify(1);
            guest.wait();
        }
        prop_assert_eq!(fs::read(outside.path().join("file")).unwrap(), b"content");
        prop_assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 2);
        prop_assert_eq!(fs::read(locked.path().join("file")).unwrap(), b"content");
        prop_assert_eq!(fs::metadata(locked.path().join("sub/empty")).unwrap().len(), 0);
        let left = ["", "sub"].map(|below| fs::read_dir(locked.path().join(below)).unwrap().count());
        prop_assert_eq!(left, [2, 1], "what is read-only is as it was");
    }

    #[test]
    fn no_ring_content_panics_or_hangs_the_device(
        table in prop::collection::vec(descriptor(), 1..20),
        heads in prop::collection::vec(0_u16..600, 1..40),
        jump in prop::option::of(any::<u16>()),
    ) {
        let mut guest = Guest::raw();
        for (index, (address, length, flags, next)) in (0..).zip(&table) {
            guest.high.descriptor(index, *address, *length, *flags, *next);
            guest.requests.descriptor(index, *address, *length, *flags, *next);
        }
        for head in heads {
            guest.high.push(head);
            guest.requests.push(head);
        }
        if let Some(index) = jump {
            guest.high.set_available_index(index);
            guest.requests.set_available_index(index);
        }
        guest.notify(0);
        guest.notify(1);
        // Ends the threads, whatever they are at. An error is a device that needs a reset.
        let _ = guest.fs.poll_ready();
        guest.fs.reset();
    }
}
