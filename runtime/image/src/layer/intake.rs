//! From archive entries to a tree, with file content handed on as it comes.

use std::collections::HashMap;
use std::io::Read;

use super::LayerError;
use super::name::{Meaning, aside, components, meaning};
use super::xattr::xattr;
use crate::erofs::{BLOCK_SIZE, DataWriter};
use crate::limits::Limits;
use crate::tar::{Entry, EntryKind, Reader};
use crate::tree::{Attributes, Budget, Directory, Id, Inode, Kind, ResolveError, Source, Tree};

/// Longest target of a symbolic link, as in Linux.
const MAX_TARGET: usize = 4095;

/// Reads a whole archive into a tree; content goes to `data`. What follows the archive's end is not read.
pub(super) fn intake<R: Read>(input: R, data: &mut DataWriter, limits: &Limits) -> Result<Tree, LayerError> {
    let mut reader = Reader::new(input);
    let mut intake = Intake {
        tree: Tree::default(),
        limits,
        budget: Budget::new(limits.inodes),
        entries: 0,
        metadata: 0,
        aside: HashMap::new(),
        last: None,
    };
    while let Some(entry) = reader.next()? {
        intake.entry(entry, &mut reader, data)?;
    }
    Ok(intake.tree.compact())
}

struct Intake<'a> {
    tree: Tree,
    limits: &'a Limits,
    budget: Budget,
    entries: usize,
    metadata: u64,
    /// Files without a name in the tree, by the one that hard links have for them.
    aside: HashMap<Vec<u8>, Id>,
    /// The parent of the last entry, as that had it, and where it led: archives are in the order of directories.
    last: Option<(Vec<u8>, Id)>,
}

impl Intake<'_> {
    fn entry<R: Read>(
        &mut self,
        entry: Entry,
        reader: &mut Reader<R>,
        data: &mut DataWriter,
    ) -> Result<(), LayerError> {
        let name = entry.name.clone();
        self.count(&entry)?;
        let path = components(&name).map_err(|reason| LayerError::refused(&name, reason))?;
        match meaning(&path).map_err(|reason| LayerError::refused(&name, reason))? {
            // The root is the runtime's, not the image's: whoever packs a directory made for that packs its mode, too.
            Meaning::Ignored | Meaning::Root => Ok(()),
            Meaning::Aside { name: base } if entry.kind == EntryKind::File => {
                let inode = self.inode(entry, reader, data)?;
                let id = self.add(inode)?;
                self.aside.insert(base.to_vec(), id);
                Ok(())
            }
            Meaning::Aside { .. } => Ok(()),
            Meaning::Opaque { directory } => {
                let id = self.parent(directory, &name)?;
                if let Some(directory) = self.tree.directory_mut(id) {
                    directory.opaque = true;
                }
                Ok(())
            }
            Meaning::Whiteout { parent, name: hidden } => {
                let parent = self.parent(parent, &name)?;
                match self.tree.lookup(parent, hidden) {
                    // The name also exists in this layer, which a whiteout does not touch: only what a directory
                    // has below is hidden.
                    Some(id) => {
                        if let Some(directory) = self.tree.directory_mut(id) {
                            directory.opaque = true;
                        }
                        Ok(())
                    }
                    None => self.put(parent, hidden, Inode::default()),
                }
            }
            Meaning::Entry { parent, name: base } => {
                let parent = self.parent(parent, &name)?;
                match &entry.kind {
                    EntryKind::Directory => {
                        let id = self.make_directory(parent, base)?;
                        self.directory(id, entry)
                    }
                    EntryKind::HardLink { target } => {
                        let id = self.link_target(&name, target)?;
                        self.link(parent, base, id);
                        Ok(())
                    }
                    _ => {
                        let inode = self.inode(entry, reader, data)?;
                        self.put(parent, base, inode)
                    }
                }
            }
        }
    }

    /// Counts an entry against the limits before it is taken in.
    fn count(&mut self, entry: &Entry) -> Result<(), LayerError> {
        self.entries += 1;
        self.budget.entry();
        if self.entries > self.limits.inodes {
            return Err(LayerError::Limit(format!("more than {} entries", self.limits.inodes)));
        }
        let target = match &entry.kind {
            EntryKind::Symlink { target } | EntryKind::HardLink { target } => target.len(),
            _ => 0,
        };
        let xattrs: usize = entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.metadata = self.metadata.saturating_add((entry.name.len() + target + xattrs) as u64);
        if self.metadata > self.limits.metadata_bytes {
            let limit = self.limits.metadata_bytes;
            return Err(LayerError::Limit(format!("names and extended attributes exceed {limit} bytes")));
        }
        Ok(())
    }

    fn parent(&mut self, path: &[&[u8]], entry: &[u8]) -> Result<Id, LayerError> {
        let joined = path.join(&b'/');
        if let Some((_, id)) = self.last.as_ref().filter(|(last, _)| *last == joined) {
            return Ok(*id);
        }
        let id = self.tree.make_directory(Id::ROOT, path, &mut self.budget).map_err(|error| match error {
            ResolveError::Full => self.full(),
            ResolveError::NotADirectory | ResolveError::Loop | ResolveError::Steps => {
                LayerError::refused(entry, error.to_string())
            }
        })?;
        self.last = Some((joined, id));
        Ok(id)
    }

    fn link(&mut self, parent: Id, name: &[u8], id: Id) {
        if self.tree.lookup(parent, name).is_some() {
            // What is replaced may have been on the way.
            self.last = None;
        }
        self.tree.link(parent, name.to_vec(), id);
    }

    fn full(&self) -> LayerError {
        LayerError::Limit(format!("more than {} files", self.limits.inodes))
    }

    fn put(&mut self, parent: Id, name: &[u8], inode: Inode) -> Result<(), LayerError> {
        let id = self.add(inode)?;
        self.link(parent, name, id);
        Ok(())
    }

    fn add(&mut self, inode: Inode) -> Result<Id, LayerError> {
        if self.tree.len() >= self.limits.inodes {
            return Err(self.full());
        }
        self.tree.add(inode).map_err(|_| self.full())
    }

    /// The directory `name`; one that replaces a whiteout hides what was below.
    fn make_directory(&mut self, parent: Id, name: &[u8]) -> Result<Id, LayerError> {
        let existing = self.tree.lookup(parent, name);
        let kind = existing.and_then(|id| self.tree.get(id)).map(|inode| &inode.kind);
        if let (Some(id), Some(Kind::Directory(_))) = (existing, kind) {
            return Ok(id);
        }
        let opaque = kind == Some(&Kind::Whiteout);
        let mut inode = Inode::implied_directory();
        inode.kind = Kind::Directory(Directory { opaque, implied: true, ..Directory::default() });
        self.put(parent, name, inode)?;
        self.tree.lookup(parent, name).ok_or_else(|| self.full())
    }

    /// Sets what the archive says about the directory `id`.
    fn directory(&mut self, id: Id, entry: Entry) -> Result<(), LayerError> {
        let attributes = attributes(&entry)?;
        if let Some(inode) = self.tree.get_mut(id) {
            inode.attributes = attributes;
            if let Some(directory) = inode.directory_mut() {
                directory.implied = false;
            }
        }
        Ok(())
    }

    fn link_target(&mut self, entry: &[u8], target: &[u8]) -> Result<Id, LayerError> {
        let refused = |reason: &str| {
            let target = String::from_utf8_lossy(target);
            LayerError::refused(entry, format!("hard link to {target:?}: {reason}"))
        };
        let path = components(target).map_err(refused)?;
        if path.is_empty() {
            return Err(refused("the target is the root"));
        }
        if let Some(name) = aside(&path) {
            return self.aside.get(name).copied().ok_or_else(|| refused("AUFS's file is not in this layer"));
        }
        let found = self.tree.find(&path, &mut self.budget);
        if let Some(id) = found.map_err(|error| refused(&error.to_string()))? {
            match self.tree.get(id).map(|inode| &inode.kind) {
                Some(Kind::Directory(_)) => return Err(refused("the target is a directory")),
                Some(Kind::Whiteout) | None => {}
                Some(_) => return Ok(id),
            }
        }
        // Not in this layer: a file of a layer below, known when they are merged.
        let kind = Kind::LowerLink { target: path.iter().map(|part| part.to_vec()).collect() };
        self.add(Inode { attributes: Attributes::default(), kind })
    }

    fn inode<R: Read>(&self, entry: Entry, reader: &mut Reader<R>, data: &mut DataWriter) -> Result<Inode, LayerError> {
        let attributes = attributes(&entry)?;
        let kind = match entry.kind {
            EntryKind::File => {
                let end = data.position().saturating_add(entry.size).saturating_add(BLOCK_SIZE);
                if end > self.limits.layer_logical_bytes {
                    let limit = self.limits.layer_logical_bytes;
                    return Err(LayerError::Limit(format!("files of more than {limit} bytes, holes included")));
                }
                let block = data.write_file(entry.size, &entry.extents, reader)?;
                Kind::File { size: entry.size, source: Source { layer: 0, block } }
            }
            EntryKind::Symlink { target } => {
                if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) {
                    let reason = "a symbolic link's target must have 1 to 4095 bytes and no NUL";
                    return Err(LayerError::refused(&entry.name, reason));
                }
                Kind::Symlink { target }
            }
            EntryKind::CharDevice { major, minor } => {
                check_device(major, minor).map_err(|reason| LayerError::refused(&entry.name, reason))?;
                Kind::CharDevice { major, minor }
            }
            EntryKind::BlockDevice { major, minor } => {
                check_device(major, minor).map_err(|reason| LayerError::refused(&entry.name, reason))?;
                Kind::BlockDevice { major, minor }
            }
            EntryKind::Fifo => Kind::Fifo,
            EntryKind::Directory | EntryKind::HardLink { .. } => {
                return Err(LayerError::refused(&entry.name, "it has no inode of its own"));
            }
        };
        Ok(Inode { attributes, kind })
    }
}

/// Linux has 12 bits of major and 20 bits of minor number.
fn check_device(major: u32, minor: u32) -> Result<(), &'static str> {
    if major < 1 << 12 && minor < 1 << 20 {
        Ok(())
    } else {
        Err("the device number is larger than Linux's 12 and 20 bits")
    }
}

fn attributes(entry: &Entry) -> Result<Attributes, LayerError> {
    let mut xattrs = Vec::new();
    for (name, value) in &entry.xattrs {
        xattrs.extend(xattr(name, value).map_err(|reason| LayerError::refused(&entry.name, reason))?);
    }
    xattrs.sort();
    if crate::erofs::xattr_size(&xattrs).is_none() {
        return Err(LayerError::refused(&entry.name, "its extended attributes are larger than 256 KiB together"));
    }
    let Entry { mode, uid, gid, mtime, .. } = *entry;
    Ok(Attributes { mode, uid, gid, mtime, xattrs })
}
