//! On-disk structures, as bytes. All numbers are little endian; names are those of `erofs_fs.h`.

use crate::tree::{Attributes, Kind, Namespace, Xattr};

/// Bytes of a block: of the file system, of a directory block, of a page.
pub(crate) const BLOCK_SIZE: u64 = 4096;
pub(super) const BLOCK: usize = 4096;
/// Inodes are addressed in units of this many bytes.
pub(super) const SLOT: u64 = 32;
pub(super) const DIRENT: usize = 12;

const SUPER_OFFSET: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_SB_CHKSUM: u32 = 1;
const COMPAT_MTIME: u32 = 2;

const XATTR_HEADER: usize = 12;

/// What the superblock says about the whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Superblock {
    pub(super) uuid: [u8; 16],
    /// Blocks of the whole file system, data behind the metadata included.
    pub(super) blocks: u32,
    pub(super) meta_block: u32,
    pub(super) root_nid: u16,
    pub(super) inodes: u64,
    /// Time of all compact inodes.
    pub(super) time: (i64, u32),
}

impl Superblock {
    /// The first block of the image.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut sb = Encoder::default();
        sb.u32(MAGIC).u32(0).u32(COMPAT_SB_CHKSUM | COMPAT_MTIME).u8(12).u8(0);
        sb.u16(self.root_nid).u64(self.inodes).u64(self.time.0.cast_unsigned()).u32(self.time.1);
        sb.u32(self.blocks).u32(self.meta_block).u32(0).bytes(&self.uuid).bytes(&[0; 16]);
        sb.u32(0).pad(BLOCK - SUPER_OFFSET);
        // The checksum covers the block from the superblock on, its own field being zero.
        let checksum = crc32c(&sb.0).to_le_bytes();
        let mut block = vec![0; SUPER_OFFSET];
        block.extend_from_slice(&sb.0);
        for (to, from) in block.iter_mut().skip(SUPER_OFFSET + 4).zip(checksum) {
            *to = from;
        }
        block
    }
}

/// Where an inode's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// In consecutive blocks.
    Plain,
    /// The part after the last full block follows the inode.
    Inline,
}

/// The fixed part of an inode.
pub(super) struct InodeHeader<'a> {
    pub(super) compact: bool,
    pub(super) layout: Layout,
    pub(super) kind: &'a Kind,
    pub(super) attributes: &'a Attributes,
    pub(super) size: u64,
    pub(super) links: u32,
    pub(super) first_block: u32,
    pub(super) number: u32,
    /// From [`xattr_size`].
    pub(super) xattr_size: usize,
}

impl InodeHeader<'_> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let format = u16::from(!self.compact) | if self.layout == Layout::Inline { 2 << 1 } else { 0 };
        // One unit for the header, one for every four bytes after it.
        let xattr_count = match self.xattr_size {
            0 => 0,
            size => u16::try_from(1 + (size - XATTR_HEADER) / 4).unwrap_or(u16::MAX),
        };
        let union = match self.kind {
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
            }
            _ => self.first_block,
        };
        let mode = file_type(self.kind).0 | (self.attributes.mode & 0o7777);
        let mut inode = Encoder::default();
        inode.u16(format).u16(xattr_count).u16(mode);
        if self.compact {
            let short = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
            inode.u16(short(self.links)).u32(u32::try_from(self.size).unwrap_or(u32::MAX)).u32(0);
            inode.u32(union).u32(self.number).u16(short(self.attributes.uid)).u16(short(self.attributes.gid)).u32(0);
        } else {
            inode.u16(0).u64(self.size).u32(union).u32(self.number).u32(self.attributes.uid).u32(self.attributes.gid);
            inode
                .u64(self.attributes.mtime.0.cast_unsigned())
                .u32(self.attributes.mtime.1)
                .u32(self.links)
                .bytes(&[0; 16]);
        }
        inode.0
    }
}

/// `S_IFMT` bits and the directory entry's type.
pub(super) fn file_type(kind: &Kind) -> (u16, u8) {
    match kind {
        Kind::File { .. } => (0o100_000, 1),
        Kind::Directory(_) => (0o040_000, 2),
        // Overlayfs's whiteout is a character device with number 0.
        Kind::CharDevice { .. } | Kind::Whiteout => (0o020_000, 3),
        Kind::BlockDevice { .. } => (0o060_000, 4),
        Kind::Fifo => (0o010_000, 5),
        Kind::Symlink { .. } => (0o120_000, 7),
        // Left out before anything is written.
        Kind::LowerLink { .. } => (0, 0),
    }
}

/// Bytes that the attributes take after their inode; none if that is more than the format allows.
pub(crate) fn xattr_size(xattrs: &[Xattr]) -> Option<usize> {
    if xattrs.is_empty() {
        return Some(0);
    }
    let entries: usize =
        xattrs.iter().map(|xattr| (4 + xattr.name.len() + xattr.value.len()).next_multiple_of(4)).sum();
    (entries / 4 < usize::from(u16::MAX)).then_some(XATTR_HEADER + entries)
}

/// The attributes as they follow their inode.
pub(super) fn encode_xattrs(xattrs: &[Xattr]) -> Vec<u8> {
    let mut body = Encoder::default();
    if xattrs.is_empty() {
        return body.0;
    }
    body.bytes(&[0; XATTR_HEADER]);
    for xattr in xattrs {
        let namespace = match xattr.namespace {
            Namespace::User => 1,
            Namespace::PosixAclAccess => 2,
            Namespace::PosixAclDefault => 3,
            Namespace::Trusted => 4,
            Namespace::Security => 6,
        };
        // The lengths were checked when the attribute was taken in.
        let (name, value) = (xattr.name.len(), xattr.value.len());
        body.u8(u8::try_from(name).unwrap_or(u8::MAX)).u8(namespace).u16(u16::try_from(value).unwrap_or(u16::MAX));
        body.bytes(&xattr.name).bytes(&xattr.value);
        body.pad(body.0.len().next_multiple_of(4));
    }
    body.0
}

/// Appends numbers to bytes.
#[derive(Default)]
pub(super) struct Encoder(pub(super) Vec<u8>);

impl Encoder {
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn pad(&mut self, length: usize) -> &mut Self {
        self.0.resize(length.max(self.0.len()), 0);
        self
    }
}

/// CRC-32C as Linux's `crc32c(~0, ...)`: not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_castagnoli() {
        // The check value of CRC-32C, inverted back.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn structures_have_their_sizes() {
        let attributes = Attributes::default();
        let mut header = InodeHeader {
            compact: true,
            layout: Layout::Plain,
            kind: &Kind::Fifo,
            attributes: &attributes,
            size: 0,
            links: 1,
            first_block: 0,
            number: 1,
            xattr_size: 0,
        };
        assert_eq!(header.encode().len(), 32);
        header.compact = false;
        assert_eq!(header.encode().len(), 64);
        let superblock =
            Superblock { uuid: [1; 16], blocks: 1, meta_block: 1, root_nid: 2, inodes: 1, time: (0, 0) }.encode();
        assert_eq!(superblock.len(), BLOCK);
    }

    #[test]
    fn xattr_size_is_what_is_written() {
        let xattr =
            |name: &str, length| Xattr { namespace: Namespace::User, name: name.into(), value: vec![1; length] };
        for xattrs in [vec![], vec![xattr("a", 0)], vec![xattr("a", 3), xattr("bcd", 65535)]] {
            assert_eq!(xattr_size(&xattrs), Some(encode_xattrs(&xattrs).len()));
        }
        assert_eq!(xattr_size(&vec![xattr("a", 65535); 5]), None);
    }
}
