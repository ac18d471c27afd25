//! Paths within a tree. Nothing leads out of it: the root is its own parent, an absolute symlink starts there.

use super::{Id, Inode, Kind, Tree};

/// As in Linux.
const MAX_SYMLINKS: usize = 40;

/// A path does not lead to a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ResolveError {
    #[error("a part of the path is not a directory")]
    NotADirectory,
    #[error("too many symbolic links on the path")]
    Loop,
    #[error("more files than a layer may have")]
    Full,
}

impl Tree {
    /// The directory that `path` leads to from the directory `start`.
    ///
    /// Symbolic links are followed, the last component's too. Components that do not exist become implied
    /// directories; a whiteout on the way becomes an opaque one. At most `limit` inodes may then exist.
    pub(crate) fn make_directory(&mut self, start: Id, path: &[&[u8]], limit: usize) -> Result<Id, ResolveError> {
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
                    pending.extend(target.split(|&b| b == b'/').rev().map(<[u8]>::to_vec));
                    if target.starts_with(b"/") { Id::ROOT } else { here }
                }
                existing @ (None | Some(Kind::Whiteout)) => {
                    let opaque = existing.is_some();
                    if self.len() >= limit {
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

    /// What `path` is, following symbolic links in all components but the last.
    pub(crate) fn find(&self, path: &[&[u8]]) -> Option<Id> {
        let (last, parents) = path.split_last()?;
        let mut here = Id::ROOT;
        let mut pending: Vec<&[u8]> = parents.iter().rev().copied().collect();
        let mut symlinks = 0;
        while let Some(name) = pending.pop() {
            match name {
                b"" | b"." => {}
                b".." => here = self.directory(here)?.parent,
                _ => {
                    let child = self.lookup(here, name)?;
                    match &self.get(child)?.kind {
                        Kind::Directory(_) => here = child,
                        Kind::Symlink { target } if symlinks < MAX_SYMLINKS => {
                            symlinks += 1;
                            if target.starts_with(b"/") {
                                here = Id::ROOT;
                            }
                            pending.extend(target.split(|&b| b == b'/').rev());
                        }
                        _ => return None,
                    }
                }
            }
        }
        self.lookup(here, last)
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
        tree.make_directory(Id::ROOT, &parts, 100)
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
        assert_eq!(tree.find(&[b"lib", b"up", b"lib", b"f"]), Some(id));
        assert_eq!(tree.find(&[b"loop", b"f"]), None);
        assert!(matches!(tree.get(tree.find(&[b"loop"]).unwrap()).unwrap().kind, Kind::Symlink { .. }));
    }

    #[test]
    fn implied_directories_count() {
        let mut tree = Tree::default();
        assert_eq!(make(&mut tree, &"a/".repeat(101)), Err(ResolveError::Full));
        assert_eq!(tree.len(), 100);
    }
}
