//! A file system tree in memory: metadata only, file content is referred to by where it lies.
//!
//! Inodes live in one vector, directories map names to indices into it, and a hard link is a second name for the same
//! index. There is no recursion over the tree anywhere, so its depth, which an image chooses, cannot exhaust a stack.
//!
//! A layer's tree also holds what the layer says about the layers below it: whiteouts, opaque directories,
//! directories that are only implied by a deeper path, and hard links to files of a lower layer. [`Tree::merge`]
//! consumes these; a merged tree has none left.

mod merge;
mod resolve;
mod walk;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub(crate) use merge::MergeError;
pub(crate) use resolve::{Budget, ResolveError};
pub(crate) use walk::Walk;

/// Index of an inode in its tree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Id(u32);

impl Id {
    /// The root directory.
    pub(crate) const ROOT: Self = Self(0);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// A whole tree. The root always exists and is a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tree {
    inodes: Vec<Inode>,
}

/// What all types of file have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Inode {
    pub(crate) attributes: Attributes,
    pub(crate) kind: Kind,
}

/// Metadata that a directory entry of an upper layer replaces as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attributes {
    /// Permission bits, set-id and sticky included.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the epoch, and nanoseconds below 10^9.
    pub(crate) mtime: (i64, u32),
    /// Sorted by namespace and name, without duplicates.
    pub(crate) xattrs: Vec<Xattr>,
}

/// An extended attribute in the form EROFS stores it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Xattr {
    pub(crate) namespace: Namespace,
    /// Without the namespace's prefix; at most 255 bytes.
    pub(crate) name: Vec<u8>,
    /// At most 65535 bytes.
    pub(crate) value: Vec<u8>,
}

/// The namespaces EROFS knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Namespace {
    User,
    PosixAclAccess,
    PosixAclDefault,
    Trusted,
    Security,
}

/// What an inode is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    Directory(Directory),
    File {
        size: u64,
        source: Source,
    },
    Symlink {
        target: Vec<u8>,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    /// The name does not exist, whatever lower layers say.
    #[default]
    Whiteout,
    /// A further name of a file in a lower layer, by its path there.
    LowerLink {
        target: Vec<Vec<u8>>,
    },
}

/// Where a file's content lies, contiguously.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Source {
    /// Which layer, counted from the lowest; 0 in a layer's own tree.
    pub(crate) layer: u16,
    /// First block in that layer's image.
    pub(crate) block: u32,
}

/// A directory's names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Directory {
    /// The one directory that has a name for this one; the root is its own.
    pub(crate) parent: Id,
    pub(crate) entries: BTreeMap<Vec<u8>, Id>,
    /// Nothing of the same directory in lower layers shows.
    pub(crate) opaque: bool,
    /// Only a deeper path says that it exists: a lower layer's attributes stay.
    pub(crate) implied: bool,
}

impl Inode {
    /// What containers expect of a directory that nobody described: root's, and open to all for reading.
    pub(crate) fn implied_directory() -> Self {
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        Self { attributes, kind: Kind::Directory(Directory { implied: true, ..Directory::default() }) }
    }

    pub(crate) fn directory(&self) -> Option<&Directory> {
        match &self.kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    pub(crate) fn directory_mut(&mut self) -> Option<&mut Directory> {
        match &mut self.kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }
}

/// The tree has as many inodes as fit its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more files than a tree can hold")]
pub(crate) struct Full;

impl Default for Tree {
    fn default() -> Self {
        Self { inodes: vec![Inode::implied_directory()] }
    }
}

impl Tree {
    /// Inodes, unreachable ones included until [`Tree::compact`].
    pub(crate) fn len(&self) -> usize {
        self.inodes.len()
    }

    pub(crate) fn get(&self, id: Id) -> Option<&Inode> {
        self.inodes.get(id.index())
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut Inode> {
        self.inodes.get_mut(id.index())
    }

    /// All inodes, in no particular order.
    pub(crate) fn inodes(&self) -> impl Iterator<Item = &Inode> {
        self.inodes.iter()
    }

    /// As [`Tree::inodes`], to be changed.
    pub(crate) fn inodes_mut(&mut self) -> impl Iterator<Item = &mut Inode> {
        self.inodes.iter_mut()
    }

    /// Where the content of files lies, for those that have any.
    pub(crate) fn sources(&self) -> impl Iterator<Item = &Source> {
        self.inodes.iter().filter_map(|inode| match &inode.kind {
            Kind::File { size, source } if *size > 0 => Some(source),
            _ => None,
        })
    }

    /// As [`Tree::sources`], to be changed.
    pub(crate) fn sources_mut(&mut self) -> impl Iterator<Item = &mut Source> {
        self.inodes.iter_mut().filter_map(|inode| match &mut inode.kind {
            Kind::File { size, source } if *size > 0 => Some(source),
            _ => None,
        })
    }

    /// The directory `id`, if it is one.
    pub(crate) fn directory(&self, id: Id) -> Option<&Directory> {
        self.get(id)?.directory()
    }

    pub(crate) fn directory_mut(&mut self, id: Id) -> Option<&mut Directory> {
        self.get_mut(id)?.directory_mut()
    }

    /// What `name` in `directory` is.
    pub(crate) fn lookup(&self, directory: Id, name: &[u8]) -> Option<Id> {
        self.directory(directory)?.entries.get(name).copied()
    }

    /// Adds an inode that has no name yet.
    pub(crate) fn add(&mut self, inode: Inode) -> Result<Id, Full> {
        let id = u32::try_from(self.inodes.len()).map_err(|_| Full)?;
        self.inodes.push(inode);
        Ok(Id(id))
    }

    /// Gives `child` the name `name` in `directory`, in place of what had it.
    pub(crate) fn link(&mut self, directory: Id, name: Vec<u8>, child: Id) {
        if let Some(child) = self.directory_mut(child) {
            child.parent = directory;
        }
        if let Some(directory) = self.directory_mut(directory) {
            directory.entries.insert(name, child);
        }
    }

    /// Drops what has no name any more and numbers the rest in the order of a [`Walk`].
    pub(crate) fn compact(mut self) -> Self {
        let order: Vec<Id> = Walk::new(&self).collect();
        let mut renumbered = vec![None; self.inodes.len()];
        for (new, old) in (0u32..).zip(&order) {
            if let Some(slot) = renumbered.get_mut(old.index()) {
                *slot = Some(Id(new));
            }
        }
        let mut inodes = Vec::with_capacity(order.len());
        for old in order {
            let mut inode = self.get_mut(old).map(std::mem::take).unwrap_or_default();
            if let Some(directory) = inode.directory_mut() {
                let parent = renumbered.get(directory.parent.index()).copied().flatten();
                directory.parent = parent.unwrap_or(Id::ROOT);
                directory.entries.retain(|_, child| match renumbered.get(child.index()).copied().flatten() {
                    Some(new) => {
                        *child = new;
                        true
                    }
                    None => false,
                });
            }
            inodes.push(inode);
        }
        Self { inodes }
    }

    /// Whether this is a tree at all: for one that was read from a file.
    pub(crate) fn is_valid(&self) -> bool {
        let mut named = vec![false; self.inodes.len()];
        for (index, inode) in (0u32..).zip(&self.inodes) {
            for (name, child) in inode.directory().iter().flat_map(|directory| &directory.entries) {
                let directory = self.directory(*child);
                match named.get_mut(child.index()) {
                    // A directory with two names, or a root with one, would be a cycle or a graph.
                    Some(named) if *child != Id::ROOT && !(directory.is_some() && *named) => *named = true,
                    _ => return false,
                }
                if directory.is_some_and(|directory| directory.parent != Id(index))
                    || name.is_empty()
                    || name.len() > 255
                {
                    return false;
                }
            }
        }
        self.directory(Id::ROOT).is_some() && Walk::new(self).count() == self.inodes.len()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn file(size: u64) -> Inode {
        Inode {
            attributes: Attributes { mode: 0o644, ..Attributes::default() },
            kind: Kind::File { size, source: Source::default() },
        }
    }

    #[test]
    fn compacting_keeps_names_and_drops_the_rest() {
        let mut tree = Tree::default();
        let replaced = tree.add(file(1)).unwrap();
        tree.link(Id::ROOT, b"a".to_vec(), replaced);
        let kept = tree.add(file(2)).unwrap();
        tree.link(Id::ROOT, b"a".to_vec(), kept);
        tree.link(Id::ROOT, b"b".to_vec(), kept);
        assert!(!tree.is_valid(), "an inode has no name");
        let tree = tree.compact();
        assert_eq!(tree.len(), 2);
        assert!(tree.is_valid());
        assert_eq!(tree.lookup(Id::ROOT, b"a"), tree.lookup(Id::ROOT, b"b"));
        assert_eq!(tree.get(tree.lookup(Id::ROOT, b"a").unwrap()), Some(&file(2)));
    }

    #[test]
    fn graphs_are_not_trees() {
        let mut tree = Tree::default();
        let child = tree.add(Inode::implied_directory()).unwrap();
        tree.link(Id::ROOT, b"a".to_vec(), child);
        assert!(tree.is_valid());
        let mut cycle = tree.clone();
        cycle.link(child, b"up".to_vec(), Id::ROOT);
        assert!(!cycle.is_valid());
        tree.link(Id::ROOT, b"b".to_vec(), child);
        assert!(!tree.is_valid());
        let mut dangling = Tree::default();
        dangling.link(Id::ROOT, b"a".to_vec(), Id(9));
        assert!(!dangling.is_valid());
    }
}
