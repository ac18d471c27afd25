//! Whole images: metadata laid out, encoded and written.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use super::ErofsError;
use super::directory::{self, Entry};
use super::format::{BLOCK_SIZE, InodeHeader, Layout, Superblock, encode_xattrs, file_type};
use super::layout::{Plan, names};
use crate::tree::{Id, Inode, Kind, Namespace, Source, Tree, Xattr};

/// Completes a layer image in `file`, whose data ends before `data_end`. Gives its length in blocks.
///
/// What the layer hides of lower layers is shown in overlayfs's words.
pub(crate) fn write_layer(file: &File, tree: &Tree, data_end: u32, uuid: [u8; 16]) -> Result<u32, ErofsError> {
    let tree = show_opaque(tree);
    let plan = Plan::new(&tree)?;
    let blocks = u32::try_from(u64::from(data_end) + plan.blocks()).map_err(|_| ErofsError::TooLarge)?;
    let address = |source: Source| Ok(source.block);
    write(file, &tree, &plan, data_end, blocks, uuid, &address)?;
    Ok(blocks)
}

/// Writes the root file system of `tree`, whose files lie in layers of `layer_blocks` blocks each, which follow this
/// file on the disk. Gives its own length in blocks.
pub(crate) fn write_rootfs(file: &File, tree: &Tree, layer_blocks: &[u32], uuid: [u8; 16]) -> Result<u32, ErofsError> {
    let plan = Plan::new(tree)?;
    let own = u32::try_from(1 + plan.blocks()).map_err(|_| ErofsError::TooLarge)?;
    let mut starts = Vec::with_capacity(layer_blocks.len());
    let mut end = own;
    for blocks in layer_blocks {
        starts.push(end);
        end = end.checked_add(*blocks).ok_or(ErofsError::TooLarge)?;
    }
    let address = |source: Source| {
        let start = starts.get(usize::from(source.layer)).ok_or(ErofsError::Tree("a file is in no layer"))?;
        start.checked_add(source.block).ok_or(ErofsError::TooLarge)
    };
    write(file, tree, &plan, 1, end, uuid, &address)?;
    Ok(own)
}

fn write(
    file: &File,
    tree: &Tree,
    plan: &Plan,
    meta_block: u32,
    blocks: u32,
    uuid: [u8; 16],
    address: &dyn Fn(Source) -> Result<u32, ErofsError>,
) -> Result<(), ErofsError> {
    let meta_start = u64::from(meta_block) * BLOCK_SIZE;
    let own_start = meta_block.checked_add(plan.inode_blocks).ok_or(ErofsError::TooLarge)?;
    let mut output = file;
    output.seek(SeekFrom::Start(meta_start))?;
    let mut output = Positioned { output: BufWriter::with_capacity(1 << 20, output), position: 0 };
    for (number, id) in (1u32..).zip(&plan.order) {
        let inode = tree.get(*id).ok_or(ErofsError::Tree("an inode is missing"))?;
        let place = plan.place(*id)?;
        let first_block = match &inode.kind {
            Kind::File { size, source } if *size > 0 => address(*source)?,
            Kind::Directory(_) | Kind::Symlink { .. } => {
                own_start.checked_add(place.own_block).ok_or(ErofsError::TooLarge)?
            }
            _ => 0,
        };
        let header = InodeHeader {
            compact: place.compact,
            layout: place.layout,
            kind: &inode.kind,
            attributes: &inode.attributes,
            size: place.size,
            links: place.links,
            first_block,
            number,
            xattr_size: place.xattr_size,
        };
        output.zeros_to(place.offset)?;
        output.write(&header.encode())?;
        output.write(&encode_xattrs(&inode.attributes.xattrs))?;
        if place.layout == Layout::Inline {
            let content = own_content(tree, plan, *id, inode)?;
            let full = content.len() - content.len() % BLOCK_SIZE as usize;
            output.write(content.get(full..).unwrap_or_default())?;
        }
    }
    for id in &plan.order {
        let inode = tree.get(*id).ok_or(ErofsError::Tree("an inode is missing"))?;
        let place = plan.place(*id)?;
        let inline = place.layout == Layout::Inline;
        if !matches!(inode.kind, Kind::Directory(_) | Kind::Symlink { .. }) || (inline && place.size < BLOCK_SIZE) {
            continue;
        }
        let content = own_content(tree, plan, *id, inode)?;
        let full = content.len() - content.len() % BLOCK_SIZE as usize;
        let part = if inline { content.get(..full).unwrap_or_default() } else { &content };
        output.zeros_to((u64::from(plan.inode_blocks) + u64::from(place.own_block)) * BLOCK_SIZE)?;
        output.write(part)?;
    }
    output.zeros_to(plan.blocks() * BLOCK_SIZE)?;
    output.output.flush()?;
    drop(output);

    let root = plan.place(Id::ROOT)?;
    let superblock = Superblock {
        uuid,
        blocks,
        meta_block,
        root_nid: u16::try_from(root.nid()).map_err(|_| ErofsError::Tree("the root is not first"))?,
        inodes: plan.order.len() as u64,
        time: plan.time,
    };
    file.write_all_at(&superblock.encode(), 0)?;
    Ok(())
}

/// The content of a directory or a symbolic link.
fn own_content(tree: &Tree, plan: &Plan, id: Id, inode: &Inode) -> Result<Vec<u8>, ErofsError> {
    if let Kind::Symlink { target } = &inode.kind {
        return Ok(target.clone());
    }
    let mut entries = Vec::new();
    for (name, child) in names(tree, inode) {
        let child = child.unwrap_or(id);
        let kind = &tree.get(child).ok_or(ErofsError::Tree("a name has no inode"))?.kind;
        entries.push(Entry { name, nid: plan.place(child)?.nid(), file_type: file_type(kind).1 });
    }
    Ok(directory::encode(&entries))
}

/// Marks opaque directories as overlayfs does.
fn show_opaque(tree: &Tree) -> Cow<'_, Tree> {
    let is_opaque = |inode: &Inode| inode.directory().is_some_and(|directory| directory.opaque);
    if !tree.inodes().any(is_opaque) {
        return Cow::Borrowed(tree);
    }
    let mut tree = tree.clone();
    for inode in tree.inodes_mut().filter(|inode| is_opaque(inode)) {
        let mark = Xattr { namespace: Namespace::Trusted, name: b"overlay.opaque".to_vec(), value: b"y".to_vec() };
        let mut xattrs = inode.attributes.xattrs.clone();
        xattrs.push(mark);
        xattrs.sort();
        // A directory whose attributes fill the format stays without: the mark is for people who look.
        if super::xattr_size(&xattrs).is_some() {
            inode.attributes.xattrs = xattrs;
        }
    }
    Cow::Owned(tree)
}

/// A writer that knows how far it is.
struct Positioned<W> {
    output: W,
    position: u64,
}

impl<W: Write> Positioned<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), ErofsError> {
        self.output.write_all(bytes)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn zeros_to(&mut self, position: u64) -> Result<(), ErofsError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut left = position.checked_sub(self.position).ok_or(ErofsError::Tree("places overlap"))?;
        while left > 0 {
            let count = usize::try_from(left).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            self.write(ZEROS.get(..count).unwrap_or_default())?;
            left -= count as u64;
        }
        Ok(())
    }
}
