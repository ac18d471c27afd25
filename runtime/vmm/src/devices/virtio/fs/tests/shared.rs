//! One file of the host is one file of the guest, whichever volumes lead to it.

use std::fs;
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::Opcode;

use super::guest::{Guest, ROOT, directory, held, named};
use crate::devices::virtio::fs::Access;

/// The number by which the guest knows a file.
fn node(guest: &mut Guest, path: &str) -> u64 {
    guest.walk(path).unwrap().nodeid
}

fn share_with_mounts(guest: &Guest, name: &str, path: &Path, access: Access) {
    guest.volumes.add(name, held(path), access, false).unwrap();
}

#[test]
fn volumes_that_begin_at_one_directory_are_one() {
    let (host, mut guest) = (directory(), Guest::new());
    fs::hard_link(host.path().join("file"), host.path().join("sub/hard")).unwrap();
    guest.share("a", host.path(), Access::Write);
    guest.share("b", host.path(), Access::ReadAll);
    for path in ["", "/file", "/sub", "/sub/empty"] {
        let [a, b] = ["a", "b"].map(|volume| node(&mut guest, &format!("{volume}{path}")));
        assert_eq!(a, b, "{path:?}");
    }
    assert_eq!(node(&mut guest, "a/file"), node(&mut guest, "b/sub/hard"), "two names of one file");
    assert_eq!(guest.volumes.nodes.len(), 3, "file, sub, empty");
}

#[test]
fn volumes_that_overlap_have_files_in_common_and_directories_of_their_own() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("whole", host.path(), Access::ReadAll);
    guest.share("sub", &host.path().join("sub"), Access::Write);
    guest.share("single", &host.path().join("file"), Access::Write);
    share_with_mounts(&guest, "mounts", host.path(), Access::ReadAll);
    assert_eq!(node(&mut guest, "whole/sub/empty"), node(&mut guest, "sub/empty"));
    assert_eq!(node(&mut guest, "mounts/sub/empty"), node(&mut guest, "sub/empty"));
    assert_eq!(node(&mut guest, "whole/file"), node(&mut guest, "single"));
    // To the guest's kernel a directory has one parent.
    assert_ne!(node(&mut guest, "whole/sub"), node(&mut guest, "sub"));
    assert_ne!(node(&mut guest, "whole"), node(&mut guest, "mounts"));
    let [empty, single] = ["sub/empty", "single"].map(|path| node(&mut guest, path));
    guest.truncate(empty, 3).unwrap();
    guest.truncate(single, 3).unwrap();
    assert_eq!(fs::read(host.path().join("file")).unwrap(), b"con");
}

#[test]
fn what_only_read_only_volumes_lead_to_stays_so() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("whole", host.path(), Access::ReadAll);
    guest.share("again", host.path(), Access::Read);
    share_with_mounts(&guest, "mounts", host.path(), Access::Read);
    guest.share("sub", &host.path().join("sub"), Access::Write);
    let (root, file) = (node(&mut guest, "whole"), node(&mut guest, "again/file"));
    let (outer, inner) = (node(&mut guest, "mounts/sub"), node(&mut guest, "sub"));
    let [of_whole, empty] = ["whole/sub", "sub/empty"].map(|path| node(&mut guest, path));
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(file, flags).map(|_| ()), Err(libc::EROFS));
    }
    assert_eq!(guest.truncate(file, 0), Err(libc::EROFS));
    for directory in [root, outer, of_whole, ROOT] {
        assert_eq!(guest.create(directory, "new", 0o644).map(|_| ()), Err(libc::EROFS));
        // Neither from nor to where it may write, whatever it knows the directories by.
        assert_eq!(guest.rename(inner, "empty", directory, "stolen"), Err(libc::EROFS));
        assert_eq!(guest.rename(directory, "file", inner, "stolen"), Err(libc::EROFS));
        let link = guest.call(Opcode::Link, directory, &named(&empty.to_le_bytes(), &["linked"]));
        assert_eq!(link, Err(libc::EROFS));
    }
    let link = guest.call(Opcode::Link, inner, &named(&file.to_le_bytes(), &["linked"]));
    assert_eq!(link, Err(libc::EROFS), "a name in a volume that may be written makes a file no other");
    for name in ["file", "sub"] {
        assert_eq!(guest.call(Opcode::Unlink, root, &named(&[], &[name])), Err(libc::EROFS));
    }
    // A file that a volume which may be written leads to as well is the guest's to change.
    guest.truncate(empty, 1).unwrap();
    assert_eq!(fs::read(host.path().join("file")).unwrap(), b"content");
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 2);
    assert_eq!(fs::read_dir(host.path().join("sub")).unwrap().count(), 1);
}

#[test]
fn a_volume_that_may_be_written_counts_from_the_next_lookup_to_its_end() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("read", host.path(), Access::ReadAll);
    let file = node(&mut guest, "read/file");
    assert_eq!(guest.open(file, libc::O_RDWR).map(|_| ()), Err(libc::EROFS));
    guest.share("write", host.path(), Access::Write);
    // The guest's kernel takes this for the word to look the path up anew.
    assert_eq!(guest.open(file, libc::O_RDWR).map(|_| ()), Err(libc::ESTALE));
    assert_eq!(node(&mut guest, "write/file"), file);
    let written = guest.open(file, libc::O_RDWR).unwrap().fh;
    let read = guest.open(file, libc::O_RDONLY).unwrap().fh;
    guest.write(file, written, 0, b"C").unwrap();
    // The other lets nothing more be looked up by it, and takes nothing of the first away.
    guest.volumes.remove("write");
    assert_eq!(guest.write(file, written, 0, b"x"), Err(libc::EBADF));
    assert_eq!(guest.read(file, read, 0, 7).unwrap(), b"Content");
    assert_eq!(guest.open(file, libc::O_RDWR).map(|_| ()), Err(libc::EROFS));
    assert_eq!(guest.truncate(file, 0), Err(libc::EROFS));
    assert_eq!(node(&mut guest, "read/file"), file);
    guest.volumes.remove("read");
    assert_eq!(guest.read(file, read, 0, 1), Err(libc::EBADF));
    assert_eq!((guest.volumes.nodes.len(), guest.volumes.handles.len()), (0, 0), "nothing is held");
}

#[test]
fn what_a_container_uses_outlives_the_volume_of_another() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("first", host.path(), Access::Write);
    guest.share("second", host.path(), Access::Write);
    let (sub, file) = (node(&mut guest, "first/sub"), node(&mut guest, "first/file"));
    let opened = guest.open(file, libc::O_RDWR).unwrap().fh;
    let (gone, temporary) = guest.create(sub, "temporary", 0o600).unwrap();
    guest.call(Opcode::Unlink, sub, &named(&[], &["temporary"])).unwrap();
    guest.volumes.remove("first");
    // By what is open, by a directory that somebody is in, and by a file without a name.
    guest.write(file, opened, 0, b"C").unwrap();
    let (made, _) = guest.create(sub, "made", 0o644).unwrap();
    assert_eq!(guest.lookup(sub, "made").unwrap().nodeid, made.nodeid);
    guest.write(gone.nodeid, temporary.fh, 0, b"x").unwrap();
    assert_eq!(guest.getattr(gone.nodeid).unwrap().size, 1);
    let root = node(&mut guest, "second");
    guest.rename(sub, "made", root, "moved").unwrap();
    assert_eq!(fs::read(host.path().join("file")).unwrap(), b"Content");
    assert!(host.path().join("moved").exists());
    guest.volumes.remove("second");
    assert_eq!(guest.getattr(sub).map(|_| ()), Err(libc::ESTALE));
    assert_eq!((guest.volumes.nodes.len(), guest.volumes.handles.len()), (0, 0));
}

#[test]
fn what_a_volume_begins_with_is_known_for_as_long_as_the_guest_asks() {
    use fuse_backend_rs::abi::fuse_abi::ForgetIn;
    use vm_memory::ByteValued;
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("data", host.path(), Access::Write);
    guest.share("single", &host.path().join("file"), Access::ReadAll);
    let (root, file) = (node(&mut guest, "data"), node(&mut guest, "data/file"));
    for id in [root, file] {
        // More often than it was told of them, too.
        guest.forget(id, ForgetIn { nlookup: 1 << 40 }.as_slice());
        guest.getattr(id).unwrap();
    }
    assert_eq!(node(&mut guest, "single"), file);
    guest.volumes.remove("single");
    assert_eq!(node(&mut guest, "data/file"), file);
    assert_eq!(guest.truncate(file, 0), Ok(()));
}
