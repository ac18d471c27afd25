//! A reader of EROFS images for tests, written from the format's description and not from the writer.

use std::collections::BTreeMap;

/// A file as the image shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// Type bits and permissions.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) links: u32,
    pub(crate) nid: u64,
    pub(crate) rdev: u32,
    /// Of a file or a symbolic link.
    pub(crate) content: Vec<u8>,
    /// Namespace index and name.
    pub(crate) xattrs: BTreeMap<(u8, Vec<u8>), Vec<u8>>,
}

fn number<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes[offset..offset + N].try_into().unwrap()
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(number(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(number(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(number(bytes, offset))
}

/// All paths of an image, `""` for the root. Panics on anything the kernel would refuse or might misread.
pub(crate) fn read(image: &[u8]) -> BTreeMap<Vec<u8>, Found> {
    assert_eq!(image.len() % 4096, 0, "the image ends within a block");
    let sb = &image[1024..];
    assert_eq!(u32_at(sb, 0), 0xe0f5_e1e2);
    assert_eq!(sb[12], 12, "block size");
    assert_eq!(u32_at(sb, 80), 0, "incompatible features");
    assert_eq!(u32_at(sb, 36) as usize, image.len() / 4096, "blocks");
    let reader = Reader { image, meta: u32_at(sb, 40) as usize * 4096, time: (u64_at(sb, 24) as i64, u32_at(sb, 32)) };
    let mut found = BTreeMap::new();
    let root = u64::from(u16_at(sb, 14));
    let mut pending = vec![(Vec::new(), root, root)];
    let mut inodes = std::collections::BTreeSet::new();
    while let Some((path, nid, parent)) = pending.pop() {
        let (file, layout_data) = reader.inode(nid);
        inodes.insert(nid);
        if file.mode & 0o170_000 == 0o040_000 {
            for (name, child, file_type) in reader.entries(&layout_data) {
                match &name[..] {
                    b"." => assert_eq!(child, nid),
                    b".." => assert_eq!(child, parent),
                    _ => {
                        let (child_file, _) = reader.inode(child);
                        let expected = match child_file.mode >> 12 {
                            0o10 => 1,
                            0o04 => 2,
                            0o02 => 3,
                            0o06 => 4,
                            0o01 => 5,
                            0o12 => 7,
                            other => panic!("type {other:o}"),
                        };
                        assert_eq!(file_type, expected);
                        let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
                        pending.push(([&path[..], separator, &name].concat(), child, nid));
                    }
                }
            }
            found.insert(path, Found { content: Vec::new(), ..file });
        } else {
            found.insert(path, Found { content: layout_data, ..file });
        }
    }
    assert_eq!(u64_at(sb, 16), inodes.len() as u64, "inode count");
    found
}

struct Reader<'a> {
    image: &'a [u8],
    meta: usize,
    time: (i64, u32),
}

impl Reader<'_> {
    fn inode(&self, nid: u64) -> (Found, Vec<u8>) {
        assert_ne!(nid, 0);
        let start = self.meta + nid as usize * 32;
        let raw = &self.image[start..];
        let format = u16_at(raw, 0);
        let extended = format & 1 == 1;
        let fixed = if extended { 64 } else { 32 };
        assert!(start / 4096 == (start + fixed - 1) / 4096, "an inode crosses a block");
        let mode = u16_at(raw, 4);
        let (size, uid, gid, mtime, links) = if extended {
            let mtime = (u64_at(raw, 32) as i64, u32_at(raw, 40));
            (u64_at(raw, 8) as usize, u32_at(raw, 24), u32_at(raw, 28), mtime, u32_at(raw, 44))
        } else {
            let (uid, gid) = (u32::from(u16_at(raw, 24)), u32::from(u16_at(raw, 26)));
            (u32_at(raw, 8) as usize, uid, gid, self.time, u32::from(u16_at(raw, 6)))
        };
        let first = u32_at(raw, 16);
        let count = usize::from(u16_at(raw, 2));
        let xattr_bytes = if count == 0 { 0 } else { 12 + (count - 1) * 4 };
        let xattrs = xattrs(&raw[fixed..fixed + xattr_bytes]);
        let data = match (mode & 0o170_000, format >> 1) {
            (0o100_000 | 0o040_000 | 0o120_000, 0) => {
                let begin = if size == 0 { 0 } else { first as usize * 4096 };
                self.image[begin..begin + size].to_vec()
            }
            (0o040_000 | 0o120_000, 2) => {
                let full = size / 4096 * 4096;
                let tail = start + fixed + xattr_bytes;
                assert!(
                    size % 4096 > 0 && tail / 4096 == (tail + size % 4096 - 1) / 4096,
                    "inline data crosses a block"
                );
                [&self.image[first as usize * 4096..][..full], &self.image[tail..tail + size % 4096]].concat()
            }
            (_, 0) => {
                assert_eq!(size, 0);
                Vec::new()
            }
            other => panic!("layout {other:?}"),
        };
        let rdev = if matches!(mode >> 12, 2 | 6) { first } else { 0 };
        (Found { mode, uid, gid, mtime, links, nid, rdev, content: Vec::new(), xattrs }, data)
    }

    fn entries(&self, directory: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
        let mut entries: Vec<(Vec<u8>, u64, u8)> = Vec::new();
        for block in directory.chunks(4096) {
            let names = u16_at(block, 8) as usize;
            assert!(names > 0 && names.is_multiple_of(12) && names <= block.len());
            let count = names / 12;
            for index in 0..count {
                let entry = &block[index * 12..];
                let begin = u16_at(entry, 8) as usize;
                let end = if index + 1 < count { u16_at(entry, 20) as usize } else { block.len() };
                let name = block[begin..end].split(|&b| b == 0).next().unwrap().to_vec();
                assert!(!name.is_empty());
                if let Some((last, _, _)) = entries.last() {
                    assert!(*last < name, "names are not sorted");
                }
                entries.push((name, u64_at(entry, 0), entry[10]));
            }
        }
        entries
    }
}

fn xattrs(body: &[u8]) -> BTreeMap<(u8, Vec<u8>), Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut rest = body.get(12..).unwrap_or_default();
    while !rest.is_empty() {
        let (name, value) = (usize::from(rest[0]), u16_at(rest, 2) as usize);
        let duplicate = found.insert((rest[1], rest[4..4 + name].to_vec()), rest[4 + name..4 + name + value].to_vec());
        assert!(duplicate.is_none());
        rest = &rest[(4 + name + value).next_multiple_of(4)..];
    }
    found
}
