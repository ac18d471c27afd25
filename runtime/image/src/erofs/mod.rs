//! A writer of EROFS images (`Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h` of Linux).
//!
//! Two kinds of image are written, both deterministic: the same tree gives the same bytes.
//!
//! - **A layer**: `[superblock][file data][metadata]`. Data is streamed while the archive is read; the metadata
//!   follows when all names are known, and the superblock is written last. It can be mounted by itself; whiteouts show
//!   in it in overlayfs's form.
//! - **A root file system**: `[superblock][metadata]`, whose files point behind its own end, into the layers. The
//!   disk a guest gets is this file and the layer files one after the other; each is a whole number of blocks. Block
//!   addresses count from the disk's start, so the concatenation is one ordinary file system and needs nothing of the
//!   kernel but uncompressed EROFS, while each layer lies on the host once and is cached once, whoever uses it.
//!
//! Only plain features are used: 4096-byte blocks, compact and extended inodes, flat and inline layout, inline extended
//! attributes. Holes of sparse files are holes of the layer file on the host.

mod data;
mod directory;
mod format;
mod image;
mod layout;
#[cfg(test)]
pub(crate) mod reader;

pub(crate) use data::DataWriter;
pub(crate) use format::{BLOCK_SIZE, xattr_size};
pub(crate) use image::{write_layer, write_rootfs};

/// The tree does not fit into an image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ErofsError {
    #[error("the file system would be larger than 16 TiB")]
    TooLarge,
    #[error("the tree is inconsistent: {0}")]
    Tree(&'static str),
    #[error("cannot write the image")]
    Write(#[from] std::io::Error),
}
