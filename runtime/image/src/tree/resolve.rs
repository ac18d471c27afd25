//! Paths within a tree. Nothing leads out of it: the root is its own parent, an absolute symlink starts there.

use super::{Id, Inode, Kind, Tree};

/// As in Linux.
const MAX_SYMLINKS: usize = 40;

/// How much may still be done for a layer: what its links lead through costs time that its bytes do not show.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// Inodes that the tree may have.
    pub(crate) inodes: usize,
    steps: u64,
}

impl Budget {
    /// Components of symbolic links' targets that may be walked for each entry, on average, and for a layer at least.
    const STEPS_OF_ENTRY: u64 = 64;
    const STEPS_AT_LEAST: u64 = 1_000_000;

    /// For a layer, before its first entry.
    pub(crate) fn new(inodes: usize) -> Self {
        Self { inodes, steps: Self::STEPS_AT_LEAST }
    }

    /// One more entry.
    pub(crate) fn entry(&mut self) {
        self.entries(1);
    }

    /// So many more entries.
    pub(crate) fn entries(&mut self, count: usize) {
        self.steps = self.steps.saturating_add(Self::STEPS_OF_ENTRY.saturating_mul(count as u64));
    }

    /// Takes the way through a symbolic link's `target`.
    fn follow(&mut self, target: &[u8]) -> Result<(), ResolveError> {
        // The cost is that of looking at its bytes; a component has some.
        let cost = 1 + target.len() as u64 / 8;
        self.steps = self.steps.checked_sub(cost).ok_or(ResolveError::Steps)?;
        Ok(())
    }
}

/// The components of a symbolic link's target that lead anywhere, from the last.
fn leading(target: &[u8]) -> impl Iterator<Item = &[u8]> {
    target.split(|&b| b == b'/').rev().filter(|part| !matches!(*part, b"" | b"."))
}

/// A path does not lead to a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ResolveError {
    #[error("a part of the path is not a directory")]
    NotADirectory,
    #[error("too many symbolic links on the path")]
    Loop,
    #[error("more files than a layer may have")]
    Full,
    #[error("its links lead through more directories than any honest layer's")]
    Steps,
}

impl Tree {
    /// The directory that `path` leads to from the directory `start`.
    ///
    /// Symbolic links are followed, the last component's too. Components that do not exist become implied
    /// directories; a whiteout on the way becomes an opaque one. Both within `budget`.
    pub(crate) fn make_directory(
        &mut self,
        start: Id,
        path: &[&[u8]],
        budget: &mut Budget,
    ) -> Result<Id, ResolveError> {
        let mut here = start;
        let mut pending: Vec<Vec<u8>> = path.iter().rev().map(|part| part.to_vec()).collect();
        let mut symlinks = 0;
        while let Some(name) = pending.pop() {
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    here = self.directory(here).map_or(Id::ROOT, |directory| directory.parent);
                    continue;
                }
                _ => {}
            }
            let child = self.lookup(here, &name);
            here = match child.and_then(|child| self.get(child)).map(|inode| &inode.kind) {
                Some(Kind::Directory(_)) => child.unwrap_or(Id::ROOT),
                Some(Kind::Symlink { target }) => {
                    symlinks += 1;
                    if symlinks > MAX_SYMLINKS {
                        return Err(ResolveError::Loop);
                    }
                    budget.follow(target)?;
                    pending.extend(leading(target).map(<[u8]>::to_vec));
                    if target.starts_with(b"/") { Id::ROOT } else { here }
                }
                existing @ (None | Some(Kind::Whiteout)) => {
                    let opaque = existing.is_some();
                    if self.len() >= budget.inodes {
                        return Err(ResolveError::Full);
                    }
                    let mut inode = Inode::implied_directory();
                    if let Some(directory) = inode.directory_mut() {
                        directory.opaque = opaque;
                    }
                    let id = self.add(inode).map_err(|_| ResolveError::Full)?;
                    self.link(here, name, id);
                    id
                }
                Some(_) => return Err(ResolveError::NotADirectory),
            };
        }
        Ok(here)
    }

    /// What `path` is, following symbolic links in all components but the last, within `budget`.
    ///
    /// # Errors
    /// [`ResolveError::Steps`] only.
    pub(crate) fn find(&self, path: &[&[u8]], budget: &mut Budget) -> Result<Option<Id>, ResolveError> {
        let Some((last, parents)) = path.split_last() else { return Ok(None) };
        let mut here = Id::ROOT;
        let mut pending: Vec<&[u8]> = parents.iter().rev().copied().collect();
        let mut symlinks = 0;
        while let Some(name) = pending.pop() {
            match name {
                b"" | b"." => {}
                b".." => here = self.directory(here).map_or(Id::ROOT, |directory| directory.parent),
                _ => {
                    let Some(child) = self.lookup(here, name) else { return Ok(None) };
                    match self.get(child).map(|inode| &inode.kind) {
                        Some(Kind::Directory(_)) => here = child,
                        Some(Kind::Symlink { target }) if symlinks < MAX_SYMLINKS => {
                            symlinks += 1;
                            if target.starts_with(b"/") {
                                here = Id::ROOT;
                            }
                            budget.follow(target)?;
                            pending.extend(leading(target));
                        }
                        _ => return Ok(None),
                    }
                }
            }
        }
        Ok(self.lookup(here, last))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::file;
    use super::*;

    fn symlink(tree: &mut Tree, parent: Id, name: &str, target: &str) {
        let kind = Kind::Symlink { target: target.as_bytes().to_vec() };
        let id = tree.add(Inode { kind, ..Inode::default() }).unwrap();
        tree.link(parent, name.as_bytes().to_vec(), id);
    }

    fn make(tree: &mut Tree, path: &str) -> Result<Id, ResolveError> {
        let parts: Vec<&[u8]> = path.split('/').map(str::as_bytes).collect();
        tree.make_directory(Id::ROOT, &parts, &mut Budget::new(100))
    }

    #[test]
    fn symlinks_stay_within_the_tree() {
        let mut tree = Tree::default();
        let usr_lib = make(&mut tree, "usr/lib").unwrap();
        symlink(&mut tree, Id::ROOT, "lib", "usr/lib");
        symlink(&mut tree, usr_lib, "up", "../../../../../usr");
        symlink(&mut tree, usr_lib, "abs", "/usr/lib");
        symlink(&mut tree, Id::ROOT, "loop", "loop");
        assert_eq!(make(&mut tree, "lib"), Ok(usr_lib));
        assert_eq!(make(&mut tree, "lib/up/lib/abs"), Ok(usr_lib));
        assert_eq!(make(&mut tree, "loop/a"), Err(ResolveError::Loop));
        let id = tree.add(file(0)).unwrap();
        tree.link(usr_lib, b"f".to_vec(), id);
        assert_eq!(make(&mut tree, "lib/f/x"), Err(ResolveError::NotADirectory));
        let find = |path: &[&[u8]]| tree.find(path, &mut Budget::new(0)).unwrap();
        assert_eq!(find(&[b"lib", b"up", b"lib", b"f"]), Some(id));
        assert_eq!(find(&[b"loop", b"f"]), None);
        assert!(matches!(tree.get(find(&[b"loop"]).unwrap()).unwrap().kind, Kind::Symlink { .. }));
    }

    #[test]
    fn implied_directories_count() {
        let mut tree = Tree::default();
        assert_eq!(make(&mut tree, &"a/".repeat(101)), Err(ResolveError::Full));
        assert_eq!(tree.len(), 100);
    }
}
