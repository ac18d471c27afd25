//! Where every inode and every directory block goes, before a byte is written.
//!
//! The metadata area holds the inodes first, in the order of a walk, then the blocks of directories and of long
//! symbolic links. An inode with its attributes and inline data never crosses a block if it fits into one.

use std::collections::HashMap;

use super::ErofsError;
use super::directory;
use super::format::{BLOCK_SIZE, Layout, SLOT, xattr_size};
use crate::tree::{Attributes, Id, Inode, Kind, Tree, Walk};

/// The first slots stay empty: inode number 0 means a deleted entry to some programs.
const FIRST_OFFSET: u64 = 2 * SLOT;

/// One inode's place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// Bytes from the start of the metadata area.
    pub(super) offset: u64,
    pub(super) compact: bool,
    pub(super) layout: Layout,
    pub(super) size: u64,
    /// Blocks of its own in the metadata area, counted from the first one after the inodes.
    pub(super) own_block: u32,
    pub(super) links: u32,
    pub(super) xattr_size: usize,
}

impl Place {
    pub(super) fn nid(&self) -> u64 {
        self.offset / SLOT
    }
}

/// The whole area.
pub(super) struct Plan {
    /// In the order of the tree's walk.
    pub(super) order: Vec<Id>,
    places: Vec<Option<Place>>,
    /// Blocks of inodes, and blocks of directories and links after them.
    pub(super) inode_blocks: u32,
    pub(super) own_blocks: u32,
    /// Time of compact inodes.
    pub(super) time: (i64, u32),
}

impl Plan {
    /// Lays out `tree`, which is compact.
    pub(super) fn new(tree: &Tree) -> Result<Self, ErofsError> {
        let order: Vec<Id> = Walk::new(tree).filter(|id| tree.get(*id).is_some_and(is_written)).collect();
        let links = count_links(tree);
        let time = most_common_time(tree, &order);
        let mut places = vec![None; tree.len()];
        let (mut offset, mut own_blocks) = (FIRST_OFFSET, 0u64);
        for id in &order {
            let inode = tree.get(*id).ok_or(ErofsError::Tree("an inode is missing"))?;
            let links = links.get(id.index()).copied().unwrap_or(1);
            let size = match &inode.kind {
                Kind::File { size, .. } => *size,
                Kind::Symlink { target } => target.len() as u64,
                Kind::Directory(_) => directory::size(names(tree, inode).iter().map(|(name, _)| *name)),
                _ => 0,
            };
            let compact = fits_compact(&inode.attributes, size, links, time);
            let xattr_size =
                xattr_size(&inode.attributes.xattrs).ok_or(ErofsError::Tree("attributes are too large"))?;
            let fixed = if compact { SLOT } else { 2 * SLOT } + xattr_size as u64;
            let own_data = matches!(inode.kind, Kind::Symlink { .. } | Kind::Directory(_));
            let tail = if own_data { size % BLOCK_SIZE } else { 0 };
            let layout = if tail > 0 && fixed + tail <= BLOCK_SIZE { Layout::Inline } else { Layout::Plain };
            let length = if layout == Layout::Inline { fixed + tail } else { fixed };
            // What fits into a block stays within one; larger attributes may cross, their inode may not.
            let room = BLOCK_SIZE - offset % BLOCK_SIZE;
            let uncut = if length <= BLOCK_SIZE { length } else { fixed - xattr_size as u64 };
            if uncut > room {
                offset += room;
            }
            let own_block = u32::try_from(own_blocks).map_err(|_| ErofsError::TooLarge)?;
            if own_data {
                own_blocks += if layout == Layout::Inline { size / BLOCK_SIZE } else { size.div_ceil(BLOCK_SIZE) };
            }
            let place = Place { offset, compact, layout, size, own_block, links, xattr_size };
            if let Some(slot) = places.get_mut(id.index()) {
                *slot = Some(place);
            }
            offset = (offset + length).next_multiple_of(SLOT);
        }
        Ok(Self {
            order,
            places,
            inode_blocks: u32::try_from(offset.div_ceil(BLOCK_SIZE)).map_err(|_| ErofsError::TooLarge)?,
            own_blocks: u32::try_from(own_blocks).map_err(|_| ErofsError::TooLarge)?,
            time,
        })
    }

    pub(super) fn place(&self, id: Id) -> Result<Place, ErofsError> {
        self.places.get(id.index()).copied().flatten().ok_or(ErofsError::Tree("an inode has no place"))
    }

    /// Blocks of the whole area.
    pub(super) fn blocks(&self) -> u64 {
        u64::from(self.inode_blocks) + u64::from(self.own_blocks)
    }
}

/// All names of a directory, `.` and `..` included, sorted by their bytes.
pub(super) fn names<'a>(tree: &'a Tree, inode: &'a Inode) -> Vec<(&'a [u8], Option<Id>)> {
    let Some(directory) = inode.directory() else { return Vec::new() };
    let mut names: Vec<(&[u8], Option<Id>)> = Vec::with_capacity(directory.entries.len() + 2);
    names.push((b".", None));
    names.push((b"..", Some(directory.parent)));
    for (name, child) in &directory.entries {
        if tree.get(*child).is_some_and(is_written) {
            names.push((name, Some(*child)));
        }
    }
    names.sort_unstable_by_key(|(name, _)| *name);
    names
}

/// A link into a lower layer cannot be shown in a layer's own image.
fn is_written(inode: &Inode) -> bool {
    !matches!(inode.kind, Kind::LowerLink { .. })
}

/// Names per inode; a directory has one for `.` and one for each child's `..` too.
fn count_links(tree: &Tree) -> Vec<u32> {
    let mut links = vec![0u32; tree.len()];
    for id in Walk::new(tree) {
        let Some(directory) = tree.directory(id) else { continue };
        let mut own = 2u32;
        for child in directory.entries.values() {
            match links.get_mut(child.index()) {
                Some(_) if tree.directory(*child).is_some() => own = own.saturating_add(1),
                Some(count) => *count = count.saturating_add(1),
                None => {}
            }
        }
        if let Some(links) = links.get_mut(id.index()) {
            *links = own;
        }
    }
    links
}

/// A compact inode has half the size, 16 bits for most numbers, and the time of the superblock.
fn fits_compact(attributes: &Attributes, size: u64, links: u32, time: (i64, u32)) -> bool {
    let short = u32::from(u16::MAX);
    attributes.mtime == time
        && attributes.uid <= short
        && attributes.gid <= short
        && links <= short
        && u32::try_from(size).is_ok()
}

fn most_common_time(tree: &Tree, order: &[Id]) -> (i64, u32) {
    let mut counts: HashMap<(i64, u32), u32> = HashMap::new();
    for inode in order.iter().filter_map(|id| tree.get(*id)) {
        *counts.entry(inode.attributes.mtime).or_default() += 1;
    }
    // The largest of the most common, so that the result does not hang on the map's order.
    counts.into_iter().max_by_key(|(time, count)| (*count, *time)).map_or((0, 0), |(time, _)| time)
}
