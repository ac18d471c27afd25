//! Volumes come and go, and so do guests.

use std::fs;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{ForgetIn, InitIn, Opcode};
use vm_memory::ByteValued;

use super::guest::{Guest, ROOT, directory, held};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::fs::{Access, VolumeError};
use crate::devices::virtio::testing::{FEATURES, Interrupts, activation};

#[test]
fn a_volume_is_there_from_its_addition_to_its_removal() {
    let (host, mut guest) = (directory(), Guest::new());
    assert_eq!(guest.walk("data").map(|_| ()), Err(libc::ENOENT));
    guest.share("data", host.path(), Access::Write);
    let file = guest.walk("data/file").unwrap().nodeid;
    let opened = guest.open(file, libc::O_RDONLY).unwrap().fh;
    assert!(matches!(guest.volumes.add("data", held(host.path()), Access::Write, true), Err(VolumeError::Taken(_))));
    guest.volumes.remove("data");
    guest.volumes.remove("data");
    assert_eq!(guest.walk("data").map(|_| ()), Err(libc::ENOENT));
    assert_eq!(guest.read(file, opened, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.getattr(file).map(|_| ()), Err(libc::ESTALE));
    assert_eq!((guest.volumes.nodes.len(), guest.volumes.handles.len()), (0, 0), "nothing of it is held");
    guest.share("data", host.path(), Access::Write);
    let again = guest.walk("data/file").unwrap().nodeid;
    assert_ne!(again, file, "a number means one file for ever");
}

#[test]
fn a_single_file_has_no_neighbours() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("hosts", &host.path().join("file"), Access::Write);
    let file = guest.walk("hosts").unwrap();
    assert_eq!(file.attr.mode & libc::S_IFMT, libc::S_IFREG);
    let opened = guest.open(file.nodeid, libc::O_RDWR).unwrap().fh;
    guest.write(file.nodeid, opened, 0, b"CON").unwrap();
    assert_eq!(fs::read(host.path().join("file")).unwrap(), b"CONtent");
    for name in ["file", "sub", "hosts"] {
        assert_eq!(guest.lookup(file.nodeid, name).map(|_| ()), Err(libc::ENOTDIR));
    }
    assert_eq!(guest.lookup(file.nodeid, "..").map(|_| ()), Err(libc::EINVAL));
}

#[test]
fn only_directories_and_files_by_proper_names_are_volumes() {
    let (host, guest) = (directory(), Guest::new());
    for name in ["", ".", "..", "a/b", "a b", "\u{e4}", &"x".repeat(256)] {
        let result = guest.volumes.add(name, held(host.path()), Access::Write, true);
        assert!(matches!(result, Err(VolumeError::Name(_))), "{name:?}");
    }
    let null = guest.volumes.add("null", held("/dev/null".as_ref()), Access::Write, true);
    assert!(matches!(null, Err(VolumeError::Kind(_))));
}

#[test]
fn a_volume_that_is_read_only_is_so_whatever_the_guest_tries() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("data", host.path(), Access::ReadAll);
    let root = guest.walk("data").unwrap().nodeid;
    let file = guest.walk("data/file").unwrap().nodeid;
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(file, flags).map(|_| ()), Err(libc::EROFS));
    }
    assert_eq!(guest.create(root, "new", 0o644).map(|_| ()), Err(libc::EROFS));
    assert_eq!(guest.truncate(file, 0), Err(libc::EROFS));
    assert_eq!(guest.rename(root, "file", root, "other"), Err(libc::EROFS));
    let opened = guest.open(file, libc::O_RDONLY).unwrap().fh;
    assert_eq!(guest.write(file, opened, 0, b"x"), Err(libc::EBADF), "the descriptor is not for writing");
    assert_eq!(fs::read(host.path().join("file")).unwrap(), b"content");
    // The device's own root can hold nothing at all.
    assert_eq!(guest.create(ROOT, "new", 0o644).map(|_| ()), Err(libc::EROFS));
}

#[test]
fn what_the_guest_forgets_is_let_go_of() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("data", host.path(), Access::Write);
    let file = guest.walk("data/file").unwrap().nodeid;
    guest.walk("data/file").unwrap();
    let forget = |guest: &mut Guest, nlookup| guest.forget(file, ForgetIn { nlookup }.as_slice());
    forget(&mut guest, 1);
    assert_eq!(guest.volumes.nodes.len(), 1);
    forget(&mut guest, 1);
    assert_eq!(guest.volumes.nodes.len(), 0);
    forget(&mut guest, u64::MAX);
    guest.walk("data/file").unwrap();
}

#[test]
fn a_link_that_the_host_swaps_leads_elsewhere_at_the_next_lookup() {
    let (host, mut guest) = (directory(), Guest::new());
    let data = host.path().join("..data");
    std::os::unix::fs::symlink("..first", &data).unwrap();
    guest.share("config", host.path(), Access::ReadAll);
    let first = guest.walk("config/..data").unwrap().nodeid;
    assert_eq!(guest.call(Opcode::Readlink, first, &[]).unwrap(), b"..first");
    std::os::unix::fs::symlink("..second", host.path().join("..data_tmp")).unwrap();
    fs::rename(host.path().join("..data_tmp"), &data).unwrap();
    let second = guest.walk("config/..data").unwrap().nodeid;
    assert_ne!(first, second, "the guest keeps what a link says");
    assert_eq!(guest.call(Opcode::Readlink, second, &[]).unwrap(), b"..second");
}

#[test]
fn a_reset_ends_the_threads_and_a_driver_may_begin_anew() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("data", host.path(), Access::Write);
    guest.walk("data/sub/empty").unwrap();
    guest.fs.reset();
    // What is asked of a device without driver is not answered.
    guest.notify(1);
    let interrupt = Arc::<Interrupts>::default();
    let mut again = Guest::new();
    again.volumes = guest.volumes.clone();
    guest.high = crate::devices::virtio::testing::Driver::new(&guest.memory, 0x10_0000, 128);
    guest.requests = crate::devices::virtio::testing::Driver::new(&guest.memory, 0x20_0000, 512);
    let queues = [&guest.high, &guest.requests];
    guest.fs.activate(activation(&guest.memory, &queues, FEATURES, &interrupt)).unwrap();
    guest.walk("data/sub/empty").expect("volumes outlive the driver");
    assert!(interrupt.take(1) > 0);
}

#[test]
fn mounts_may_map_ids_if_the_guest_can() {
    let answer = |flags: u32, flags2: u32| {
        let mut body = Vec::from(InitIn { major: 7, minor: 41, max_readahead: 0, flags }.as_slice());
        body.extend_from_slice(&flags2.to_ne_bytes());
        body.extend_from_slice(&[0; 44]);
        let data = Guest::raw().call(Opcode::Init, 0, &body).unwrap();
        // Of fuse_init_out, whose `flags` come after three words and `flags2` after eight.
        [12, 32].map(|at| u32::from_ne_bytes(data[at..at + 4].try_into().unwrap()))
    };
    let (extended, mapped) = (1 << 30, 1 << 8);
    let [flags, flags2] = answer(!0, !0);
    assert_eq!((flags & extended, flags2), (extended, mapped));
    assert_eq!(answer(!0, !mapped)[1], 0, "nothing that was not offered");
    assert_eq!(answer(!extended, !0)[1], 0, "what follows is no flags");
}
