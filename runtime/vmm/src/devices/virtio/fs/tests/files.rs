//! What a guest does with the files of a volume.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use fuse_backend_rs::abi::fuse_abi::{
    Dirent, EntryOut, GetxattrIn, InHeader, MkdirIn, MknodIn, Opcode, OpenIn, OpenOut, OutHeader, ReadIn, SetattrIn,
    SetxattrIn, WRITE_KILL_PRIV,
};
use fuse_backend_rs::api::filesystem::SetattrValid;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::guest::{Guest, ROOT, directory, named, object};
use crate::devices::virtio::fs::Access;
use crate::devices::virtio::testing::{readable, writable};

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn files_are_read_and_written_through() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("data", host.path(), Access::Write);
    let file = guest.walk("data/file").unwrap();
    assert_eq!((file.attr.size, file.entry_valid, file.attr_valid), (7, 1, 1));
    let opened = guest.open(file.nodeid, libc::O_RDWR).unwrap();
    assert_eq!(guest.read(file.nodeid, opened.fh, 0, 4096).unwrap(), b"content");
    assert_eq!(guest.read(file.nodeid, opened.fh, 3, 2).unwrap(), b"te");
    guest.write(file.nodeid, opened.fh, 7, b" and more").unwrap();
    assert_eq!(fs::read(host.path().join("file")).unwrap(), b"content and more", "before the file is closed");
    guest.truncate(file.nodeid, 3).unwrap();
    assert_eq!(fs::read(host.path().join("file")).unwrap(), b"con");
    guest.release(file.nodeid, opened.fh);
    assert_eq!(guest.read(file.nodeid, opened.fh, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.volumes.handles.len(), 0);
}

#[test]
fn pages_stay_cached_until_the_content_changes() {
    const KEEP_CACHE: u32 = 2;
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("data", host.path(), Access::Write);
    let file = guest.walk("data/file").unwrap().nodeid;
    let mut kept = || guest.open(file, libc::O_RDONLY).unwrap().open_flags & KEEP_CACHE != 0;
    assert_eq!((kept(), kept(), kept()), (false, true, true));
    fs::write(host.path().join("file"), "longer than it was").unwrap();
    assert_eq!((kept(), kept()), (false, true));
    let root = guest.walk("data").unwrap().nodeid;
    let (made, opened) = guest.create(root, "made", 0o644).unwrap();
    assert_eq!(opened.open_flags & KEEP_CACHE, 0);
    assert_ne!(guest.open(made.nodeid, libc::O_RDONLY).unwrap().open_flags & KEEP_CACHE, 0, "as it was made");
}

#[test]
fn a_file_that_is_made_belongs_to_whom_makes_it() {
    let (host, mut guest) = (directory(), Guest::new());
    if !is_root() {
        return;
    }
    // As for a volume of an fsGroup: the caller may write by a group that the protocol does
    // not tell of. The guest's kernel knows it and has agreed.
    fs::set_permissions(host.path().join("sub"), fs::Permissions::from_mode(0o2770)).unwrap();
    std::os::unix::fs::chown(host.path().join("sub"), Some(0), Some(4711)).unwrap();
    guest.share("data", host.path(), Access::Write);
    guest.user = (1000, 1001);
    let sub = guest.walk("data/sub").unwrap().nodeid;
    let (made, opened) = guest.create(sub, "made", 0o666).unwrap();
    guest.release(made.nodeid, opened.fh);
    guest.call(Opcode::Mkdir, sub, &named(MkdirIn { mode: 0o777, umask: 0o22 }.as_slice(), &["directory"])).unwrap();
    guest.call(Opcode::Symlink, sub, &named(&[], &["link", "target"])).unwrap();
    for (name, mode) in [("made", 0o100_644), ("directory", 0o42_755), ("link", 0o120_777)] {
        let found = fs::symlink_metadata(host.path().join("sub").join(name)).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode()), (1000, 4711, mode), "{name}");
    }
    // Another user's file is not made as this one's.
    guest.user = (0, 0);
    let (made, _) = guest.create(sub, "roots", 0o600).unwrap();
    assert_eq!((made.attr.uid, made.attr.gid), (0, 4711));
}

#[test]
fn a_write_of_an_ordinary_user_clears_set_id_bits() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("data", host.path(), Access::Write);
    let path = host.path().join("file");
    let file = guest.walk("data/file").unwrap().nodeid;
    let opened = guest.open(file, libc::O_RDWR).unwrap().fh;
    for (flags, kept) in [(0, is_root()), (WRITE_KILL_PRIV, false), (0, is_root())] {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
        guest.write_as(file, opened, 0, b"x", flags).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o6000 != 0, kept, "{flags:#x}");
    }
}

#[test]
fn modes_and_owners_are_set_links_included() {
    let (host, mut guest) = (directory(), Guest::new());
    symlink("file", host.path().join("link")).unwrap();
    guest.share("data", host.path(), Access::Write);
    let file = guest.walk("data/file").unwrap().nodeid;
    let set = SetattrIn { valid: SetattrValid::MODE.bits(), mode: 0o4751, ..SetattrIn::default() };
    guest.call(Opcode::Setattr, file, set.as_slice()).unwrap();
    assert_eq!(guest.getattr(file).unwrap().mode, 0o104_751);
    if is_root() {
        let link = guest.walk("data/link").unwrap().nodeid;
        let set =
            SetattrIn { valid: (SetattrValid::UID | SetattrValid::GID).bits(), uid: 7, gid: 8, ..SetattrIn::default() };
        guest.call(Opcode::Setattr, link, set.as_slice()).unwrap();
        let (of_link, of_file) =
            (fs::symlink_metadata(host.path().join("link")).unwrap(), fs::metadata(host.path().join("file")).unwrap());
        assert_eq!((of_link.uid(), of_link.gid(), of_file.uid()), (7, 8, 0));
    }
}

#[test]
fn extended_attributes_are_the_files() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("data", host.path(), Access::Write);
    let file = guest.walk("data/file").unwrap().nodeid;
    let set = |name: &str, value: &[u8]| {
        let arguments = SetxattrIn { size: value.len() as u32, flags: 0 };
        [named(arguments.as_slice(), &[name]), value.to_vec()].concat()
    };
    match guest.call(Opcode::Setxattr, file, &set("user.color", b"blue")) {
        Err(libc::EOPNOTSUPP) => return eprintln!("skipped: no extended attributes in the temporary directory"),
        answer => answer.unwrap(),
    };
    assert_eq!(guest.call(Opcode::Setxattr, file, &set("security.selinux", b"x")), Err(libc::EOPNOTSUPP));
    let get = |size| named(GetxattrIn { size, padding: 0 }.as_slice(), &["user.color"]);
    assert_eq!(guest.call(Opcode::Getxattr, file, &get(100)).unwrap(), b"blue");
    assert_eq!(guest.call(Opcode::Getxattr, file, &get(0)).unwrap()[..4], 4_u32.to_le_bytes());
    assert_eq!(guest.call(Opcode::Getxattr, file, &get(2)), Err(libc::ERANGE));
    let list = GetxattrIn { size: u32::MAX, padding: 0 };
    assert_eq!(guest.call(Opcode::Listxattr, file, list.as_slice()).unwrap(), b"user.color\0");
    guest.call(Opcode::Removexattr, file, &named(&[], &["user.color"])).unwrap();
    assert_eq!(guest.call(Opcode::Getxattr, file, &get(100)), Err(libc::ENODATA));
}

/// All names of a directory, by requests with room for a few each.
fn names(guest: &mut Guest, node: u64, plus: bool) -> Vec<String> {
    let data = guest.call(Opcode::Opendir, node, OpenIn::default().as_slice()).unwrap();
    let fh = object::<OpenOut>(&data).fh;
    let (opcode, prefix) = if plus { (Opcode::Readdirplus, size_of::<EntryOut>()) } else { (Opcode::Readdir, 0) };
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let read = ReadIn { fh, offset, size: 2048, ..ReadIn::default() };
        let data = guest.call(opcode, node, read.as_slice()).unwrap();
        if data.is_empty() {
            return names;
        }
        let mut rest = &data[..];
        while !rest.is_empty() {
            let entry: Dirent = object(&rest[prefix..]);
            let start = prefix + size_of::<Dirent>();
            names.push(String::from_utf8(rest[start..start + entry.namelen as usize].to_vec()).unwrap());
            offset = entry.off;
            rest = &rest[(start + entry.namelen as usize).next_multiple_of(8)..];
        }
    }
}

#[test]
fn directories_are_listed_whole_and_what_is_known_is_forgotten() {
    let (host, mut guest) = (directory(), Guest::new());
    for number in 0..500 {
        fs::write(host.path().join(format!("sub/{number}")), "").unwrap();
    }
    guest.share("data", host.path(), Access::Write);
    let sub = guest.walk("data/sub").unwrap().nodeid;
    let expected: BTreeSet<_> =
        (0..500).map(|number| number.to_string()).chain([".", "..", "empty"].map(str::to_owned)).collect();
    for plus in [false, true] {
        let found = names(&mut guest, sub, plus);
        assert_eq!(found.len(), expected.len());
        assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected, "plus: {plus}");
    }
    assert_eq!(guest.volumes.nodes.len(), 502, "each entry but the dots, and the directory itself");
    assert!(names(&mut guest, ROOT, false).is_empty(), "which volumes there are is the agent's business");
}

#[test]
fn entries_are_renamed_linked_and_removed() {
    let (host, mut guest) = (directory(), Guest::new());
    let other = directory();
    guest.share("data", host.path(), Access::Write);
    guest.share("other", other.path(), Access::Write);
    let (root, away) = (guest.walk("data").unwrap().nodeid, guest.walk("other").unwrap().nodeid);
    let file = guest.walk("data/file").unwrap();
    guest.rename(root, "file", root, "renamed").unwrap();
    assert_eq!(guest.lookup(root, "file").map(|_| ()), Err(libc::ENOENT));
    let linked: EntryOut =
        object(&guest.call(Opcode::Link, root, &named(&file.nodeid.to_le_bytes(), &["linked"])).unwrap());
    assert_eq!((linked.nodeid, linked.attr.nlink), (file.nodeid, 2));
    assert_eq!(guest.rename(root, "renamed", away, "x"), Err(libc::EXDEV));
    let across = guest.call(Opcode::Link, away, &named(&file.nodeid.to_le_bytes(), &["x"]));
    assert_eq!(across, Err(libc::EXDEV));
    guest.call(Opcode::Unlink, root, &named(&[], &["renamed"])).unwrap();
    assert_eq!(guest.call(Opcode::Rmdir, root, &named(&[], &["sub"])), Err(libc::ENOTEMPTY));
    assert_eq!(fs::read(host.path().join("linked")).unwrap(), b"content");
}

#[test]
fn device_files_are_not_made_but_pipes_are() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("data", host.path(), Access::Write);
    let root = guest.walk("data").unwrap().nodeid;
    let mut make = |name: &str, mode, rdev| {
        let arguments = MknodIn { mode, rdev, umask: 0, padding: 0 };
        guest.call(Opcode::Mknod, root, &named(arguments.as_slice(), &[name])).map(drop)
    };
    assert_eq!(make("disk", libc::S_IFBLK | 0o666, 0x801), Err(libc::EPERM));
    assert_eq!(make("null", libc::S_IFCHR | 0o666, 0x103), Err(libc::EPERM));
    make("pipe", libc::S_IFIFO | 0o666, 0).unwrap();
    // The guest's kernel opens a pipe by itself; a guest that asks us must not wait for ever.
    let pipe = guest.walk("data/pipe").unwrap().nodeid;
    assert_eq!(guest.open(pipe, libc::O_RDONLY).map(|_| ()), Err(libc::EIO));
}

#[test]
fn a_request_is_the_same_in_whatever_pieces_it_comes() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("data", host.path(), Access::Write);
    let root = guest.walk("data").unwrap().nodeid;
    let made = |name: &str| named(MkdirIn { mode: 0o777, umask: 0 }.as_slice(), &[name]);
    // Some are served here, some are left to the crate.
    for (piece, opcode, body) in [
        (1, Opcode::Lookup, named(&[], &["file"])),
        (1, Opcode::Mkdir, made("by-bytes")),
        (7, Opcode::Lookup, named(&[], &["by-bytes"])),
        (7, Opcode::Mkdir, made("by-sevens")),
        (4096, Opcode::Mkdir, made("at-once")),
    ] {
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode: opcode as u32,
            unique: 99,
            nodeid: root,
            ..InHeader::default()
        };
        let message = [header.as_slice(), &body].concat();
        guest.memory.write_slice(&message, GuestAddress(0x40_0000)).unwrap();
        let pieces = |start: u64, length: usize| {
            let lengths = (0..length).step_by(piece).map(move |at| (start + at as u64, piece.min(length - at) as u32));
            lengths.collect::<Vec<_>>()
        };
        let answer = size_of::<OutHeader>() + size_of::<EntryOut>();
        let mut buffers: Vec<_> = pieces(0x40_0000, message.len()).iter().map(|(at, n)| readable(*at, *n)).collect();
        buffers.extend(pieces(0x60_0000, answer).iter().map(|(at, n)| writable(*at, *n)));
        guest.requests.add(&buffers);
        guest.notify(1);
        assert_eq!(guest.wait().1 as usize, answer, "{opcode:?} {piece}");
        let out: OutHeader = guest.memory.read_obj(GuestAddress(0x60_0000)).unwrap();
        assert_eq!((out.len as usize, out.error, out.unique), (answer, 0, 99), "{opcode:?} {piece}");
        let entry: EntryOut = guest.memory.read_obj(GuestAddress(0x60_0000 + size_of::<OutHeader>() as u64)).unwrap();
        assert_eq!(guest.getattr(entry.nodeid).unwrap().ino, entry.attr.ino, "{opcode:?} {piece}");
    }
    for name in ["by-bytes", "by-sevens", "at-once"] {
        assert!(host.path().join(name).is_dir(), "{name}");
    }
}

#[test]
fn a_request_outside_of_memory_is_refused_where_that_can_be_said() {
    let (host, mut guest) = (directory(), Guest::new());
    guest.share("data", host.path(), Access::Write);
    let root = guest.walk("data").unwrap().nodeid;
    let (body, size) = (named(&[], &["sub"]), size_of::<InHeader>() as u32);
    for opcode in [Opcode::Rmdir, Opcode::Unlink, Opcode::Lookup] {
        let len = size + body.len() as u32;
        let header = InHeader { len, opcode: opcode as u32, unique: 98, nodeid: root, ..InHeader::default() };
        guest.memory.write_slice(header.as_slice(), GuestAddress(0x40_0000)).unwrap();
        let outside = readable(0x80_0000, body.len() as u32);
        guest.requests.add(&[readable(0x40_0000, size), outside, writable(0x60_0000, 0x1000)]);
        guest.notify(1);
        assert_eq!(guest.wait().1 as usize, size_of::<OutHeader>(), "{opcode:?}");
        let out: OutHeader = guest.memory.read_obj(GuestAddress(0x60_0000)).unwrap();
        assert_eq!((out.error, out.unique), (-libc::EIO, 98), "{opcode:?}");
    }
    assert!(host.path().join("sub").is_dir());
}
