//! The order in which a tree is numbered and written: a directory, then all its names, depth first.

use super::{Id, Tree};

/// Every inode once, parents before children, siblings in the order of their names.
///
/// Files of a directory stay close together, which is how they are read.
pub(crate) struct Walk<'a> {
    tree: &'a Tree,
    seen: Vec<bool>,
    pending: Vec<Id>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(tree: &'a Tree) -> Self {
        Self { tree, seen: vec![false; tree.len()], pending: vec![Id::ROOT] }
    }
}

impl Iterator for Walk<'_> {
    type Item = Id;

    fn next(&mut self) -> Option<Id> {
        loop {
            let id = self.pending.pop()?;
            match self.seen.get_mut(id.index()) {
                Some(seen) if !*seen => *seen = true,
                _ => continue,
            }
            if let Some(directory) = self.tree.directory(id) {
                self.pending.extend(directory.entries.values().rev());
            }
            return Some(id);
        }
    }
}
