//! Layers end to end: an archive in, an EROFS image out, read back by an independent reader.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use super::*;
use crate::digest::Digest;
use crate::erofs::reader::{Found, read};
use crate::erofs::{DataWriter, write_rootfs};
use crate::layer::intake::intake;
use crate::limits::Limits;
use crate::tree::Tree;

type Archive = Builder<Vec<u8>>;

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o640);
    header.set_uid(1000);
    header.set_gid(1001);
    header.set_mtime(1_600_000_000);
    header.set_device_major(0).unwrap();
    header.set_device_minor(0).unwrap();
    header
}

/// Adds an entry whose name `tar` itself would refuse to write.
fn raw(archive: &mut Archive, kind: EntryType, name: &str, link: &str, content: &[u8]) {
    let mut header = header(kind, content.len() as u64);
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    archive.append(&header, content).unwrap();
}

fn file(archive: &mut Archive, name: &str, content: &[u8]) {
    archive.append_data(&mut header(EntryType::Regular, content.len() as u64), name, content).unwrap();
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn expect(compressed: &[u8], archive: &[u8]) -> Expected {
    Expected { digest: Digest::of(compressed), size: compressed.len() as u64, diff_id: Digest::of(archive) }
}

/// The layer's image and tree.
fn built(compressed: &[u8], archive: &[u8], limits: &Limits) -> Result<(Vec<u8>, Tree), LayerError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer.erofs");
    let built = build(compressed, &expect(compressed, archive), &path, limits, &AtomicBool::new(false))?;
    let image = std::fs::read(&path).unwrap();
    assert_eq!(image.len() as u64, u64::from(built.blocks) * 4096);
    Ok((image, built.tree))
}

fn layer(archive: Archive) -> (Vec<u8>, Tree) {
    let archive = archive.into_inner().unwrap();
    built(&archive, &archive, &Limits::default()).unwrap()
}

fn refused(archive: Archive) -> LayerError {
    let archive = archive.into_inner().unwrap();
    built(&archive, &archive, &Limits::default()).map(|_| ()).unwrap_err()
}

/// What a guest sees of layers laid over one another.
fn merged(layers: Vec<(Vec<u8>, Tree)>) -> BTreeMap<Vec<u8>, Found> {
    let (mut tree, mut blocks, mut disk) = (Tree::default(), Vec::new(), Vec::new());
    for (index, (image, upper)) in (0u16..).zip(layers) {
        tree.merge(upper, index, 100_000).unwrap();
        blocks.push(u32::try_from(image.len() / 4096).unwrap());
        disk.extend(image);
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("rootfs.erofs");
    let file = std::fs::File::create(&path).unwrap();
    let own = write_rootfs(&file, &tree.compact(), &blocks, [1; 16]).unwrap();
    let mut image = std::fs::read(&path).unwrap();
    assert_eq!(image.len() as u64, u64::from(own) * 4096);
    image.extend(disk);
    read(&image)
}

#[test]
fn every_type_of_file_is_there() {
    let mut archive = Builder::new(Vec::new());
    archive.append_data(&mut header(EntryType::Directory, 0), "./", io::empty()).unwrap();
    file(&mut archive, "dir/empty", b"");
    let mut set_id = header(EntryType::Regular, 5000);
    set_id.set_mode(0o6755);
    archive.append_data(&mut set_id, "dir/sub/file", &[7; 5000][..]).unwrap();
    archive.append_link(&mut header(EntryType::Link, 0), "hard", "dir/sub/file").unwrap();
    archive.append_link(&mut header(EntryType::Symlink, 0), "link", "../outside/is/fine").unwrap();
    for (kind, name) in [(EntryType::Char, "null"), (EntryType::Block, "disk"), (EntryType::Fifo, "fifo")] {
        let mut special = header(kind, 0);
        special.set_device_major(259).unwrap();
        special.set_device_minor(70_000).unwrap();
        archive.append_data(&mut special, name, io::empty()).unwrap();
    }
    archive
        .append_pax_extensions([
            ("SCHILY.xattr.security.capability", &[1u8, 0, 0, 2][..]),
            ("SCHILY.xattr.user.big", &[5; 9000]),
            ("SCHILY.xattr.com.apple.provenance", b"x"),
            ("mtime", b"-3.25"),
            ("uid", b"4000000000"),
        ])
        .unwrap();
    file(&mut archive, "attributes", b"x");
    let (image, tree) = layer(archive);
    let found = read(&image);
    // Inode numbers count from where the metadata starts, so they are the same in both.
    assert!(found == merged(vec![(image, tree)]), "alone and merged differ");

    let of = |path: &str| &found[path.as_bytes()];
    assert_eq!((of("").mode, of("").links, of("").uid), (0o040_755, 3, 0), "the root is not the archive's");
    assert_eq!((of("dir").mode, of("dir").uid, of("dir").links), (0o040_755, 0, 3), "implied");
    assert_eq!(of("dir/empty").content, b"");
    assert_eq!((of("hard").mode, of("hard").links, of("hard").nid), (0o106_755, 2, of("dir/sub/file").nid));
    assert_eq!(of("hard").content, [7; 5000]);
    assert_eq!((of("link").mode, &of("link").content[..]), (0o120_640, &b"../outside/is/fine"[..]));
    let rdev = (70_000 & 0xff) | 259 << 8 | (70_000 & !0xff) << 12;
    assert_eq!((of("null").mode >> 12, of("null").rdev), (2, rdev));
    assert_eq!((of("disk").mode >> 12, of("disk").rdev), (6, rdev));
    assert_eq!(of("fifo").mode >> 12, 1);
    let attributes = of("attributes");
    assert_eq!((attributes.uid, attributes.mtime), (4_000_000_000, (-4, 750_000_000)));
    assert_eq!(attributes.xattrs.len(), 2);
    assert_eq!(attributes.xattrs[&(6, b"capability".to_vec())], [1, 0, 0, 2]);
    assert_eq!(attributes.xattrs[&(1, b"big".to_vec())], [5; 9000]);
}

#[test]
fn sizes_around_a_block_are_kept() {
    let mut archive = Builder::new(Vec::new());
    for length in [1, 3995, 4031, 4032, 4033, 4063, 4064, 4065, 4095] {
        let mut link = header(EntryType::Symlink, 0);
        archive.append_link(&mut link, format!("link-{length}"), "t".repeat(length)).unwrap();
    }
    for length in [4095, 4096, 4097, 8192, (1 << 20) - 4096, (1 << 20) + 1] {
        file(&mut archive, &format!("file-{length}"), &vec![3; length]);
    }
    for count in [1, 16, 36, 37, 38, 300] {
        for index in 0..count {
            file(&mut archive, &format!("dir-{count}/{index:0100}"), b"");
        }
    }
    let (image, tree) = layer(archive);
    let found = read(&image);
    assert_eq!(found.len(), merged(vec![(image, tree)]).len());
    for (path, file) in found {
        let path = String::from_utf8(path).unwrap();
        if let Some((kind, length)) = path.split_once('-').filter(|(kind, _)| *kind != "dir") {
            assert_eq!(file.content.len(), length.parse::<usize>().unwrap(), "{kind}");
        }
    }
}

#[test]
fn layers_hide_what_is_below() {
    let mut lower = Builder::new(Vec::new());
    for name in ["etc/a", "etc/b", "opt/x", "gone/y", "kept/z", "new/old"] {
        file(&mut lower, name, name.as_bytes());
    }
    let mut upper = Builder::new(Vec::new());
    file(&mut upper, "etc/.wh.a", b"");
    file(&mut upper, "opt/new", b"new");
    file(&mut upper, "opt/.wh..wh..opq", b"");
    file(&mut upper, ".wh.gone", b"");
    // A whiteout beside what this layer itself brings, before and after it.
    file(&mut upper, ".wh.new", b"");
    file(&mut upper, "new/file", b"");
    file(&mut upper, "kept/more", b"");
    file(&mut upper, ".wh.kept", b"");
    raw(&mut upper, EntryType::Link, "linked", "etc/b", b"");
    file(&mut upper, ".wh..wh.aufs", b"");
    let (lower, upper) = (layer(lower), layer(upper));
    let shown = read(&upper.0);
    assert_eq!((shown[&b"gone"[..]].mode >> 12, shown[&b"gone"[..]].rdev), (2, 0), "overlayfs's whiteout");
    assert_eq!(shown[&b"opt"[..]].xattrs[&(4, b"overlay.opaque".to_vec())], b"y");
    let found = merged(vec![lower, upper]);
    let names: Vec<String> = found.keys().map(|path| String::from_utf8(path.clone()).unwrap()).collect();
    assert_eq!(names, ["", "etc", "etc/b", "kept", "kept/more", "linked", "new", "new/file", "opt", "opt/new"]);
    assert_eq!(found[&b"linked"[..]].nid, found[&b"etc/b"[..]].nid);
    assert_eq!(found[&b"linked"[..]].content, b"etc/b");
    assert!(found[&b"opt"[..]].xattrs.is_empty());
}

/// ko, Nix and buildpacks write absolute names, kaniko absolute targets of hard links.
#[test]
fn names_are_relative_to_the_images_root() {
    let mut archive = Builder::new(Vec::new());
    raw(&mut archive, EntryType::Directory, "/var", "", b"");
    raw(&mut archive, EntryType::Regular, "/var/run/ko/kodata", "", b"ko");
    raw(&mut archive, EntryType::Regular, "//ko-app/app", "", b"app");
    raw(&mut archive, EntryType::Regular, "../../etc/passwd", "", b"passwd");
    raw(&mut archive, EntryType::Regular, "a/b/../../../c/./d", "", b"d");
    raw(&mut archive, EntryType::Link, "/hard", "/ko-app/app", b"");
    raw(&mut archive, EntryType::Link, "up", "x/../../etc/./passwd", b"");
    raw(&mut archive, EntryType::Link, "lower", "/../usr/bin/perl", b"");
    raw(&mut archive, EntryType::Regular, "/opt/.wh.x", "", b"");
    raw(&mut archive, EntryType::Regular, ".", "", b"");
    raw(&mut archive, EntryType::Symlink, "..", "x", b"");
    let mut below = Builder::new(Vec::new());
    file(&mut below, "usr/bin/perl", b"perl");
    file(&mut below, "opt/x", b"");
    let found = merged(vec![layer(below), layer(archive)]);
    let names: Vec<&str> = found.keys().map(|path| std::str::from_utf8(path).unwrap()).collect();
    let expected = [
        "",
        "c",
        "c/d",
        "etc",
        "etc/passwd",
        "hard",
        "ko-app",
        "ko-app/app",
        "lower",
        "opt",
        "up",
        "usr",
        "usr/bin",
        "usr/bin/perl",
        "var",
        "var/run",
        "var/run/ko",
        "var/run/ko/kodata",
    ];
    assert_eq!(names, expected);
    for (link, file) in [("hard", "ko-app/app"), ("up", "etc/passwd"), ("lower", "usr/bin/perl")] {
        let (link, file) = (&found[link.as_bytes()], &found[file.as_bytes()]);
        assert_eq!((link.nid, link.links), (file.nid, 2));
    }
    assert_eq!(found[&b"c/d"[..]].content, b"d");
}

#[test]
fn what_has_no_place_in_the_tree_is_refused_by_name() {
    for (kind, name, link) in [
        (EntryType::Link, "hard", "."),
        (EntryType::Link, "hard", "/a/../.."),
        (EntryType::Link, "hard", "directory"),
        (EntryType::Link, "hard", ".wh..wh.plnk/missing"),
        (EntryType::Regular, "d/.wh...", ""),
    ] {
        let mut archive = Builder::new(Vec::new());
        file(&mut archive, "directory/fine", b"x");
        raw(&mut archive, kind, name, link, b"");
        let error = refused(archive);
        assert!(matches!(&error, LayerError::Refused { entry, .. } if entry == name), "{name} {link}: {error}");
    }
    let mut archive = Builder::new(Vec::new());
    file(&mut archive, "file", b"x");
    file(&mut archive, "file/below", b"x");
    assert!(matches!(refused(archive), LayerError::Refused { .. }));
}

/// Layers of Docker's first storage driver have the content of a file with several names only there.
#[test]
fn files_that_aufs_set_aside_are_what_links_mean() {
    let mut archive = Builder::new(Vec::new());
    raw(&mut archive, EntryType::Directory, ".wh..wh.plnk", "", b"");
    raw(&mut archive, EntryType::Regular, ".wh..wh.plnk/101.202", "", b"content");
    raw(&mut archive, EntryType::Regular, ".wh..wh.plnk/303.404", "", b"of nobody");
    raw(&mut archive, EntryType::Link, "a", ".wh..wh.plnk/101.202", b"");
    raw(&mut archive, EntryType::Link, "b", "./.wh..wh.plnk/101.202", b"");
    let found = read(&layer(archive).0);
    let names: Vec<&[u8]> = found.keys().map(Vec::as_slice).collect();
    assert_eq!(names, [&b""[..], b"a", b"b"]);
    assert_eq!((found[&b"a"[..]].nid, &found[&b"a"[..]].content[..]), (found[&b"b"[..]].nid, &b"content"[..]));
}

#[test]
fn symlinks_lead_nowhere_else() {
    let mut archive = Builder::new(Vec::new());
    raw(&mut archive, EntryType::Symlink, "escape", "/../../../tmp", b"");
    raw(&mut archive, EntryType::Regular, "escape/pwned", "", b"x");
    let (image, _) = layer(archive);
    let found = read(&image);
    assert!(found.contains_key(&b"tmp/pwned"[..]));
}

/// `tar -C "$(mktemp -d)" .` packs a root that only its owner can enter.
#[test]
fn the_root_is_as_every_user_needs_it() {
    for name in ["./", "/", "."] {
        let mut archive = Builder::new(Vec::new());
        raw(&mut archive, EntryType::Directory, name, "", b"");
        let found = &read(&layer(archive).0)[&b""[..]];
        assert_eq!((found.mode, found.uid), (0o040_755, 0), "{name}");
    }
}

#[test]
fn what_led_to_a_directory_may_be_replaced() {
    let mut archive = Builder::new(Vec::new());
    file(&mut archive, "a/x", b"");
    file(&mut archive, "b/x", b"");
    raw(&mut archive, EntryType::Symlink, "l", "a", b"");
    raw(&mut archive, EntryType::Regular, "l/first", "", b"");
    raw(&mut archive, EntryType::Symlink, "l", "b", b"");
    raw(&mut archive, EntryType::Regular, "l/second", "", b"");
    let found = read(&layer(archive).0);
    assert!(found.contains_key(&b"a/first"[..]) && found.contains_key(&b"b/second"[..]), "{:?}", found.keys());
}

#[test]
fn later_entries_replace_earlier_ones() {
    let mut archive = Builder::new(Vec::new());
    file(&mut archive, "a", b"first");
    file(&mut archive, "a", b"second");
    file(&mut archive, "d/x", b"");
    file(&mut archive, "d", b"now a file");
    let found = read(&layer(archive).0);
    assert_eq!(found[&b"a"[..]].content, b"second");
    assert_eq!(found[&b"d"[..]].content, b"now a file");
    assert_eq!(found.len(), 3);
}

#[test]
fn limits_hold() {
    let mut archive = Builder::new(Vec::new());
    for index in 0..20 {
        file(&mut archive, &format!("d{index}/file"), &[1; 10_000]);
    }
    let archive = archive.into_inner().unwrap();
    let attempt = |limits: Limits| built(&archive, &archive, &limits).map(|_| ()).unwrap_err();
    let default = Limits::default();
    for limits in [
        Limits { inodes: 30, ..default },
        Limits { inodes: 19, ..default },
        Limits { layer_bytes: 100_000, ..default },
        Limits { layer_logical_bytes: 100_000, ..default },
        Limits { metadata_bytes: 100, ..default },
    ] {
        let error = attempt(limits);
        assert!(matches!(error, LayerError::Limit(_)), "{limits:?}: {error}");
    }
}

/// A few kilobytes that unpack to a hundred megabytes.
#[test]
fn bombs_end_at_the_limit() {
    let mut header = header(EntryType::Regular, 100 << 20);
    header.set_path("bomb").unwrap();
    header.set_cksum();
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.write_all(header.as_bytes()).unwrap();
    io::copy(&mut io::Read::take(io::repeat(0), 100 << 20), &mut encoder).unwrap();
    let bomb = encoder.finish().unwrap();
    let limits = Limits { layer_bytes: 10 << 20, ..Limits::default() };
    assert!(matches!(built(&bomb, b"", &limits), Err(LayerError::Limit(_))));
}

/// Preallocated disks and database files are long runs of zeros: holes, whatever their length.
#[test]
fn zeros_are_holes_and_count_for_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let attempt = |byte: u8| {
        let mut archive = Builder::new(Vec::new());
        file(&mut archive, "disk", &vec![byte; 8 << 20]);
        let archive = archive.into_inner().unwrap();
        let path = directory.path().join(byte.to_string());
        let mut data = DataWriter::new(std::fs::File::create(&path).unwrap(), &path, 1 << 20);
        let taken = intake(&archive[..], &mut data, &Limits::default()).map(|_| ());
        (taken, std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512)
    };
    let (taken, allocated) = attempt(0);
    taken.unwrap();
    assert!(allocated < 1 << 16, "{allocated}");
    let (taken, allocated) = attempt(7);
    assert!(matches!(taken, Err(LayerError::Limit(_))));
    assert!(allocated <= 1 << 20, "{allocated}");
}

/// Links that lead through links cost time which the layer's bytes do not show.
#[test]
fn links_may_not_lead_through_everything() {
    let mut archive = Builder::new(Vec::new());
    archive.append_data(&mut header(EntryType::Directory, 0), "l39", io::empty()).unwrap();
    for index in (0..39).rev() {
        let target = format!("{}l{}", "./".repeat(2000), index + 1);
        archive.append_pax_extensions([("linkpath", target.as_bytes())]).unwrap();
        raw(&mut archive, EntryType::Symlink, &format!("l{index}"), "", b"");
    }
    for index in 0..2000 {
        // By turns, so that none is where the last one was.
        file(&mut archive, &format!("l{}/f{index}", index % 2), b"");
    }
    let started = Instant::now();
    let error = refused(archive);
    assert!(error.to_string().contains("links lead through"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(20));
}

/// Whoever gave up has it end, not only its download.
#[test]
fn a_build_ends_when_it_is_given_up() {
    let given_up = AtomicBool::new(false);
    let mut start = header(EntryType::Regular, 30 << 30);
    start.set_path("endless").unwrap();
    start.set_cksum();
    let start = *start.as_bytes();
    let stream = io::Read::chain(&start[..], io::repeat(0));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer.erofs");
    let expected = Expected { size: 30 << 30, ..expect(b"", b"") };
    let error = std::thread::scope(|scope| {
        let building = scope.spawn(|| build(stream, &expected, &path, &Limits::default(), &given_up).map(|_| ()));
        std::thread::sleep(Duration::from_millis(200));
        given_up.store(true, Ordering::Relaxed);
        building.join().unwrap().unwrap_err()
    });
    assert!(matches!(&error, LayerError::Input(_)), "{error}");
}

#[test]
fn wrong_and_damaged_bytes_are_told_apart() {
    let mut archive = Builder::new(Vec::new());
    file(&mut archive, "a", &[1; 100_000]);
    let archive = archive.into_inner().unwrap();
    let compressed = gzip(&archive);
    let directory = tempfile::tempdir().unwrap();
    let mut count = 0;
    let mut attempt = |bytes: &[u8], expected: Expected| {
        count += 1;
        let path = directory.path().join(count.to_string());
        build(bytes, &expected, &path, &Limits::default(), &AtomicBool::new(false)).map(|_| ()).unwrap_err().to_string()
    };
    let good = expect(&compressed, &archive);
    let mut damaged = compressed.clone();
    damaged[200] ^= 1;
    assert!(attempt(&damaged, good).contains("expected digest"), "a flipped bit");
    assert!(attempt(&compressed[..100], good).contains("expected digest"), "a cut stream");
    assert!(attempt(b"<html>", good).contains("expected digest"), "something else");
    let other = Expected { diff_id: Digest::of(b"other"), ..good };
    assert!(attempt(&compressed, other).contains("configuration says"), "another archive");
    // What the manifest promises, and still no archive.
    assert!(attempt(b"no archive at all", expect(b"no archive at all", b"")).contains("malformed tar"));
    let cut = &compressed[..compressed.len() / 2];
    assert!(!attempt(cut, expect(cut, &archive)).contains("expected digest"));
    // Bytes after the end of the compressed stream are not lost on the digest.
    let trailing = [&compressed[..], b"more"].concat();
    assert!(!attempt(&trailing, good).is_empty());
}

#[derive(Debug, Clone)]
enum Kind {
    Directory,
    File(Vec<u8>),
    Symlink(String),
    Fifo,
    HardLink(prop::sample::Index),
}

#[derive(Debug, Clone)]
struct Spec {
    kind: Kind,
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: (u32, u32),
    xattr: Option<(String, Vec<u8>)>,
}

fn spec() -> impl Strategy<Value = Spec> {
    let kind = prop_oneof![
        Just(Kind::Directory),
        proptest::collection::vec(any::<u8>(), 0..9000).prop_map(Kind::File),
        "[a-z]{1,60}".prop_map(Kind::Symlink),
        "[a-z]{4000,4095}".prop_map(Kind::Symlink),
        Just(Kind::Fifo),
        any::<prop::sample::Index>().prop_map(Kind::HardLink),
    ];
    let xattr = proptest::option::of(("[a-z]{1,20}", proptest::collection::vec(any::<u8>(), 1..5000)));
    (kind, 0u16..=0o7777, any::<u32>(), any::<u32>(), (0u32..3, 0u32..1_000_000_000), xattr)
        .prop_map(|(kind, mode, uid, gid, mtime, xattr)| Spec { kind, mode, uid, gid, mtime, xattr })
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof!["[ab]", "[!-~&&[^/]]{1,10}", "[a-z]{80,255}"], 1..5).prop_map(|parts| {
        parts.iter().map(|part| if part.starts_with('.') { "dot" } else { part }).collect::<Vec<_>>().join("/")
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any tree comes back as it was put in, through any compression, alone and merged.
    #[test]
    fn any_tree_comes_back(files in proptest::collection::btree_map(path(), spec(), 0..40), compression in 0..3) {
        let mut archive = Builder::new(Vec::new());
        let mut expected: BTreeMap<String, Spec> = BTreeMap::new();
        let mut links: BTreeMap<String, String> = BTreeMap::new();
        for (path, spec) in files {
            let below_a_file = expected.iter().any(|(known, spec)| {
                !matches!(spec.kind, Kind::Directory) && path.starts_with(&format!("{known}/"))
            });
            let above = expected.keys().any(|known| known.starts_with(&format!("{path}/")));
            if below_a_file || (above && !matches!(spec.kind, Kind::Directory)) {
                continue;
            }
            let seconds = format!("{}.{:09}", spec.mtime.0, spec.mtime.1);
            let (uid, gid) = (spec.uid.to_string(), spec.gid.to_string());
            let mut pax = vec![("mtime", seconds.as_bytes()), ("uid", uid.as_bytes()), ("gid", gid.as_bytes())];
            let name = spec.xattr.as_ref().map(|(name, _)| format!("SCHILY.xattr.user.{name}"));
            if let (Some(name), Some((_, value))) = (&name, &spec.xattr) {
                pax.push((name, value));
            }
            let kinds = |kind, size| {
                let mut header = header(kind, size);
                header.set_mode(u32::from(spec.mode));
                header
            };
            if let Kind::HardLink(index) = &spec.kind {
                let targets: Vec<&String> =
                    expected.iter().filter(|(_, spec)| !matches!(spec.kind, Kind::Directory)).map(|(path, _)| path).collect();
                if targets.is_empty() {
                    continue;
                }
                let target = targets[index.index(targets.len())].clone();
                archive.append_link(&mut kinds(EntryType::Link, 0), &path, &target).unwrap();
                let first = links.get(&target).cloned().unwrap_or(target);
                let copy = expected[&first].clone();
                expected.insert(path.clone(), copy);
                links.insert(path, first);
                continue;
            }
            archive.append_pax_extensions(pax).unwrap();
            match &spec.kind {
                Kind::Directory => archive.append_data(&mut kinds(EntryType::Directory, 0), &path, io::empty()).unwrap(),
                Kind::File(content) => {
                    archive.append_data(&mut kinds(EntryType::Regular, content.len() as u64), &path, &content[..]).unwrap();
                }
                Kind::Symlink(target) => {
                    archive.append_link(&mut kinds(EntryType::Symlink, 0), &path, Path::new(target)).unwrap();
                }
                Kind::Fifo => archive.append_data(&mut kinds(EntryType::Fifo, 0), &path, io::empty()).unwrap(),
                Kind::HardLink(_) => {}
            }
            expected.insert(path, spec);
        }
        let archive = archive.into_inner().unwrap();
        let compressed = match compression {
            0 => archive.clone(),
            1 => gzip(&archive),
            _ => zstd::encode_all(&archive[..], 1).unwrap(),
        };
        let (image, tree) = built(&compressed, &archive, &Limits::default()).unwrap();
        for found in [read(&image), merged(vec![(image.clone(), tree)])] {
            for (path, spec) in &expected {
                let file = &found[path.as_bytes()];
                prop_assert_eq!(file.mode & 0o7777, spec.mode);
                prop_assert_eq!((file.uid, file.gid), (spec.uid, spec.gid));
                prop_assert_eq!(file.mtime, (i64::from(spec.mtime.0), spec.mtime.1));
                let xattrs: Vec<_> = file.xattrs.iter().map(|((_, name), value)| (name.clone(), value.clone())).collect();
                let wanted: Vec<_> = spec.xattr.iter().map(|(name, value)| (name.clone().into_bytes(), value.clone())).collect();
                prop_assert_eq!(xattrs, wanted);
                let (kind, content) = match &spec.kind {
                    Kind::Directory => (0o04, &b""[..]),
                    Kind::File(content) => (0o10, &content[..]),
                    Kind::Symlink(target) => (0o12, target.as_bytes()),
                    _ => (0o01, &b""[..]),
                };
                prop_assert_eq!(file.mode >> 12, kind);
                prop_assert_eq!(&file.content[..], content);
            }
            for (link, first) in &links {
                prop_assert_eq!(found[link.as_bytes()].nid, found[first.as_bytes()].nid);
                let names = 1 + links.values().filter(|other| *other == first).count();
                prop_assert_eq!(found[link.as_bytes()].links as usize, names);
            }
            // Nothing else is there but the directories that paths imply.
            for (path, file) in &found {
                let path = std::str::from_utf8(path).unwrap();
                let implied = file.mode == 0o040_755
                    && (path.is_empty() || expected.keys().any(|known| known.starts_with(&format!("{path}/"))));
                prop_assert!(implied || expected.contains_key(path), "{}", path);
            }
        }
    }

    /// Damage in an archive gives an image that can be read, or an error.
    #[test]
    fn damaged_archives_are_survived(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..30),
        swap in proptest::option::of((any::<prop::sample::Index>(), any::<prop::sample::Index>())),
    ) {
        let mut archive = Builder::new(Vec::new());
        file(&mut archive, "a/b/c", b"hello");
        raw(&mut archive, EntryType::Symlink, "l", "a/b", b"");
        raw(&mut archive, EntryType::Regular, "l/x", "", b"x");
        raw(&mut archive, EntryType::Link, "h", "a/b/c", b"");
        raw(&mut archive, EntryType::Regular, "a/.wh.q", "", b"");
        raw(&mut archive, EntryType::Regular, "a/.wh..wh..opq", "", b"");
        archive.append_pax_extensions([("SCHILY.xattr.user.a", &b"v"[..]), ("size", b"3")]).unwrap();
        file(&mut archive, &"n".repeat(200), b"123");
        let mut archive = archive.into_inner().unwrap();
        for (at, byte) in damage {
            let at = at.index(archive.len());
            archive[at] = byte;
        }
        let mut blocks: Vec<[u8; 512]> = archive.chunks_exact(512).map(|block| block.try_into().unwrap()).collect();
        if let Some((a, b)) = swap {
            let (a, b) = (a.index(blocks.len()), b.index(blocks.len()));
            blocks.swap(a, b);
        }
        for block in &mut blocks {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let archive = blocks.concat();
        // A file may be huge and all holes; the test takes images into memory.
        let limits = Limits { layer_logical_bytes: 16 << 20, ..Limits::default() };
        if let Ok((image, tree)) = built(&archive, &archive, &limits) {
            prop_assert!(tree.is_valid());
            let sidecar = postcard::to_stdvec(&tree).unwrap();
            prop_assert_eq!(postcard::from_bytes::<Tree>(&sidecar).unwrap(), tree);
            read(&image);
        }
    }

    /// Any bytes at all, compressed or not.
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..3000), magic in 0..3) {
        let start: &[u8] = match magic { 0 => b"", 1 => &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0], _ => &[0x28, 0xb5, 0x2f, 0xfd] };
        let bytes = [start, &bytes].concat();
        let _ = built(&bytes, &bytes, &Limits::default());
    }
}
