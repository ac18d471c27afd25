//! What the kernel makes of our images: a tree that GNU tar packed, pulled, mounted, and compared with the original.
//!
//! Needs root, a kernel with EROFS and loop devices, and erofs-utils.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Compression, Layout, Registry, disk, program, run, store};

/// A mounted file system image.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, at: PathBuf) -> Self {
        fs::create_dir_all(&at).unwrap();
        run(Command::new("mount").args(["-t", "erofs", "-o", "ro,loop"]).arg(image).arg(&at));
        Self(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// All of a file that `stat`, `readlink`, `getfattr` and `cat` show; hard links by the first path of their inode.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut first: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let metadata = path.symlink_metadata().unwrap();
        let name = path.strip_prefix(root).unwrap().to_owned();
        let kind = metadata.file_type();
        let mut text = format!(
            "{:o} {}:{} {}.{:09} rdev {}",
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.rdev()
        );
        let mut buffer = vec![0u8; 1 << 16];
        let length = rustix::fs::llistxattr(&path, &mut buffer[..]).unwrap();
        let mut names: Vec<&[u8]> = buffer[..length].split(|&b| b == 0).filter(|name| !name.is_empty()).collect();
        names.sort();
        for name in names {
            let name = std::str::from_utf8(name).unwrap();
            let mut value = vec![0u8; 1 << 16];
            let length = rustix::fs::lgetxattr(&path, name, &mut value[..]).unwrap();
            text += &format!(" {name}={}", nacelle_image::Digest::of(&value[..length]));
        }
        if kind.is_dir() {
            text += &format!(" links {}", metadata.nlink());
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            let first = first.entry(metadata.ino()).or_insert_with(|| name.clone());
            *first = first.clone().min(name.clone());
            text += &format!(" size {}", metadata.size());
            if kind.is_symlink() {
                text += &format!(" -> {:?}", fs::read_link(&path).unwrap().as_os_str().as_bytes());
            } else if kind.is_file() {
                text += &format!(" {}", nacelle_image::Digest::of(&fs::read(&path).unwrap()));
            }
        }
        found.insert(name, text);
    }
    // Paths were found in no particular order, so the first is known at the end only.
    for (path, text) in &mut found {
        let metadata = root.join(path).symlink_metadata().unwrap();
        if !metadata.is_dir() {
            *text += &format!(" inode of {}", first[&metadata.ino()].display());
        }
    }
    // What the archive says of its root does not count.
    found.remove(Path::new(""));
    found
}

fn shell(directory: &Path, script: &str) {
    run(Command::new("bash").args(["-euc", script]).current_dir(directory));
}

fn assert_same(found: &BTreeMap<PathBuf, String>, expected: &BTreeMap<PathBuf, String>) {
    let names = |tree: &BTreeMap<PathBuf, String>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    for (path, text) in expected {
        assert_eq!(&found[path], text, "{}", path.display());
    }
}

#[tokio::test]
async fn the_kernel_shows_what_was_packed() {
    let work = tempfile::tempdir().unwrap();
    let original = work.path().join("original");
    fs::create_dir(&original).unwrap();
    shell(
        &original,
        "mkdir -p etc usr/bin usr/lib opt/hidden many deep
         printf root:x:0:0 > etc/passwd; : > empty; head -c 4096 /dev/urandom > block; head -c 4097 /dev/urandom > more
         head -c 3000000 /dev/urandom > usr/lib/large; cp /bin/true usr/bin/tool; chmod 4755 usr/bin/tool
         ln usr/bin/tool usr/bin/link; ln usr/bin/tool etc/link; ln -s usr/lib lib; ln -s /etc/../../x escape
         ln -s \"$(printf 't%.0s' {1..4050})\" long; mkfifo fifo; mknod null c 1 3; mknod disk b 259 70000
         chown 4000000000:70000 empty; chown -h 12:34 lib; chmod 1777 opt; chmod 000 block
         touch -d '1969-12-31T23:59:50.5Z' empty; touch -d '2030-01-01T00:00:00.123456789Z' more
         setfattr -n user.key -v value etc/passwd; setfattr -n trusted.key -v \"$(printf 'v%.0s' {1..3000})\" etc
         setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 usr/bin/tool
         truncate -s 50M sparse; printf middle | dd of=sparse bs=1 seek=25000000 conv=notrunc status=none
         for i in $(seq 1000); do echo $i > many/file-with-a-rather-long-name-$i; done
         d=deep; for i in $(seq 60); do d=$d/directory-$i; done; mkdir -p $d; echo bottom > $d/file
         printf '%s' \"$(printf 'n%.0s' {1..255})\" | xargs touch; : > $'new\\nline'; mkdir .dot; : > .dot/-dash
         echo hidden > opt/hidden/file; find . -depth -print0 | xargs -0 touch -hd '2024-02-03T04:05:06.789Z' --no-create",
    );
    // The second layer, as a builder would record these changes.
    let changes = work.path().join("changes");
    fs::create_dir(&changes).unwrap();
    let archive = |directory: &Path, arguments: &[&str]| {
        let options = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "-H", "pax", "-S", "-c", "-f", "-"];
        let output = Command::new("tar").args(options).arg("-C").arg(directory).args(arguments).output().unwrap();
        assert!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let first = archive(&original, &["."]);
    shell(
        &changes,
        "mkdir -p opt/hidden etc usr/bin; : > opt/hidden/.wh..wh..opq; echo shown > opt/hidden/new
         : > etc/.wh.passwd; : > .wh.deep; echo changed > more; mkdir block; : > block/inside; : > usr/bin/new
         chmod 711 etc; find . -depth -print0 | xargs -0 touch -hd '2025-01-01T00:00:00Z'",
    );
    // Without entries for usr and usr/bin: what is below keeps its attributes.
    let second = archive(
        &changes,
        &[
            "--no-recursion",
            "opt/hidden",
            "opt/hidden/.wh..wh..opq",
            "opt/hidden/new",
            "etc",
            "etc/.wh.passwd",
            ".wh.deep",
            "more",
            "block",
            "block/inside",
            "usr/bin/new",
        ],
    );

    let registry = Registry::start();
    let mut layout = Layout::default();
    layout.image("one", "amd64", &[(first.clone(), Compression::Gzip)]);
    layout.image("two", "amd64", &[(first, Compression::Gzip), (second, Compression::Zstd)]);
    registry.push(&layout, "one", "one", &[]);
    registry.push(&layout, "two", "two", &[]);
    let (_directory, store) = store();
    let one = store.pull(&registry.reference("one"), None, |_| {}).await.unwrap();
    let two = store.pull(&registry.reference("two"), None, |_| {}).await.unwrap();

    let fsck = program("fsck.erofs");
    for (name, image) in [("one", &one), ("two", &two)] {
        for layer in &image.rootfs_files()[1..] {
            run(Command::new(&fsck).arg("--extract").arg(layer));
        }
        let path = work.path().join(format!("{name}.erofs"));
        fs::write(&path, disk(image)).unwrap();
        run(Command::new(&fsck).arg("--extract").arg(&path));
    }

    // Holes are not stored.
    let layer = fs::metadata(&one.rootfs_files()[1]).unwrap();
    assert!(layer.size() > 50 << 20 && layer.blocks() * 512 < 20 << 20, "{} blocks", layer.blocks());

    let expected = tree(&original);
    assert!(expected.len() > 1080);
    {
        let mounted = Mounted::new(&work.path().join("one.erofs"), work.path().join("mnt-one"));
        assert_same(&tree(&mounted.0), &expected);
    }
    {
        // A layer by itself is a file system too.
        let mounted = Mounted::new(&one.rootfs_files()[1], work.path().join("mnt-layer"));
        assert_same(&tree(&mounted.0), &expected);
    }
    shell(
        &original,
        "touch -r opt ../opt-time; touch -r usr/bin ../bin-time; touch -r usr ../usr-time; touch -r . ../root-time
         rm -r opt/hidden etc/passwd deep more block; cp -a ../changes/opt/hidden opt/; rm opt/hidden/.wh*
         cp -a ../changes/more ../changes/block .; cp -a ../changes/usr/bin/new usr/bin/
         setfattr -x trusted.key etc; chmod 711 etc; touch -r ../changes/etc etc; touch -r ../changes/opt/hidden opt/hidden
         touch -r ../opt-time opt; touch -r ../bin-time usr/bin; touch -r ../usr-time usr; touch -r ../root-time .",
    );
    let mounted = Mounted::new(&work.path().join("two.erofs"), work.path().join("mnt-two"));
    assert_same(&tree(&mounted.0), &tree(&original));
    // Look-ups by name, not only listings.
    for index in [1, 500, 1000] {
        let text = fs::read_to_string(mounted.0.join(format!("many/file-with-a-rather-long-name-{index}"))).unwrap();
        assert_eq!(text.trim(), index.to_string());
    }
    assert!(!mounted.0.join("many/file-with-a-rather-long-name-1001").exists());
}
