//! Laying one layer's tree over the layers below it, by the rules of the OCI image specification ("Applying
//! Changesets"): a whiteout hides a name, an opaque directory hides what it had, a directory over a directory
//! replaces its attributes and joins its names, anything else replaces.

use std::collections::HashMap;

use super::resolve::{Budget, ResolveError};
use super::{Directory, Id, Inode, Kind, Tree};

/// A layer does not fit onto the ones below it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MergeError {
    #[error("hard link to {}, which is in no lower layer", String::from_utf8_lossy(target))]
    MissingTarget { target: Vec<u8> },
    #[error("hard link to {}, which is a directory", String::from_utf8_lossy(target))]
    DirectoryTarget { target: Vec<u8> },
    #[error("more files than an image may have")]
    Full,
    #[error(transparent)]
    Steps(ResolveError),
}

impl Tree {
    /// Lays `upper`, whose files lie in layer `layer`, over this tree of at most `limit` inodes.
    pub(crate) fn merge(&mut self, mut upper: Tree, layer: u16, limit: usize) -> Result<(), MergeError> {
        let mut budget = Budget::new(limit);
        budget.entries(upper.len());
        let mut placed = self.lower_links(&upper, &mut budget)?;
        self.merge_attributes(Id::ROOT, &mut upper, Id::ROOT);
        let mut pending = vec![(Id::ROOT, Id::ROOT)];
        while let Some((here, upper_directory)) = pending.pop() {
            let names = upper.directory_mut(upper_directory).map(|d| std::mem::take(&mut d.entries));
            for (name, upper_id) in names.unwrap_or_default() {
                if self.len() >= limit {
                    return Err(MergeError::Full);
                }
                // Known already: a further name of a file.
                if let Some(id) = placed.get(&upper_id) {
                    self.link(here, name, *id);
                    continue;
                }
                match upper.get(upper_id).map(|inode| &inode.kind) {
                    Some(Kind::Whiteout) | None => {
                        if let Some(directory) = self.directory_mut(here) {
                            directory.entries.remove(&name);
                        }
                    }
                    Some(Kind::Directory(directory)) => {
                        let implied = directory.implied && !directory.opaque;
                        let directory = self.place_directory(here, name, implied, &mut budget)?;
                        self.merge_attributes(directory, &mut upper, upper_id);
                        pending.push((directory, upper_id));
                    }
                    Some(_) => {
                        let mut inode = upper.get_mut(upper_id).map(std::mem::take).unwrap_or_default();
                        if let Kind::File { source, .. } = &mut inode.kind {
                            source.layer = layer;
                        }
                        let id = self.add(inode).map_err(|_| MergeError::Full)?;
                        placed.insert(upper_id, id);
                        self.link(here, name, id);
                    }
                }
            }
        }
        Ok(())
    }

    /// Finds what the links of `upper` into lower layers mean, before anything of `upper` hides it.
    fn lower_links(&self, upper: &Tree, budget: &mut Budget) -> Result<HashMap<Id, Id>, MergeError> {
        let mut found = HashMap::new();
        for (index, inode) in (0u32..).zip(&upper.inodes) {
            let Kind::LowerLink { target } = &inode.kind else { continue };
            let path: Vec<&[u8]> = target.iter().map(Vec::as_slice).collect();
            let id = self.find(&path, budget).map_err(MergeError::Steps)?;
            let id = id.ok_or_else(|| MergeError::MissingTarget { target: path.join(&b'/') })?;
            if self.directory(id).is_some() {
                return Err(MergeError::DirectoryTarget { target: path.join(&b'/') });
            }
            found.insert(Id(index), id);
        }
        Ok(found)
    }

    /// The directory that `name` in `here` is to be, made if need be.
    fn place_directory(
        &mut self,
        here: Id,
        name: Vec<u8>,
        implied: bool,
        budget: &mut Budget,
    ) -> Result<Id, MergeError> {
        let existing = self.lookup(here, &name);
        let is_symlink = existing
            .and_then(|existing| self.get(existing))
            .is_some_and(|inode| matches!(inode.kind, Kind::Symlink { .. }));
        // A layer without an entry for `lib` that brings `lib/x` means whatever `lib` is below.
        if implied && is_symlink {
            match self.make_directory(here, &[&name], budget) {
                Ok(directory) => return Ok(directory),
                Err(ResolveError::Full) => return Err(MergeError::Full),
                Err(error @ ResolveError::Steps) => return Err(MergeError::Steps(error)),
                Err(ResolveError::NotADirectory | ResolveError::Loop) => {}
            }
        }
        if let Some(existing) = existing.filter(|existing| self.directory(*existing).is_some()) {
            return Ok(existing);
        }
        let id = self.add(Inode::implied_directory()).map_err(|_| MergeError::Full)?;
        self.link(here, name, id);
        Ok(id)
    }

    fn merge_attributes(&mut self, id: Id, upper: &mut Tree, upper_id: Id) {
        let Some(Inode { attributes, kind: Kind::Directory(Directory { opaque, implied, .. }) }) =
            upper.get_mut(upper_id)
        else {
            return;
        };
        let Some(inode) = self.get_mut(id) else { return };
        if !*implied {
            inode.attributes = std::mem::take(attributes);
        }
        if let Some(directory) = inode.directory_mut() {
            directory.implied &= *implied;
            if *opaque {
                directory.entries.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::file;
    use super::super::{Attributes, Source};
    use super::*;

    const LIMIT: usize = 10_000;

    /// A layer from a short notation: `d/` a directory, `d//` an implied one, `o!/` an opaque one, `x` a file, `-x` a
    /// whiteout, `a>b` a symlink, `a=b` a link to lower `b`. Files get their size from `size`.
    fn layer(size: u64, entries: &[&str]) -> Tree {
        let mut tree = Tree::default();
        for entry in entries {
            let (path, kind) = if let Some(path) = entry.strip_suffix("!/") {
                (path, Kind::Directory(Directory { opaque: true, ..Directory::default() }))
            } else if let Some(path) = entry.strip_suffix("//") {
                (path, Kind::Directory(Directory { implied: true, ..Directory::default() }))
            } else if let Some(path) = entry.strip_suffix('/') {
                (path, Kind::Directory(Directory::default()))
            } else if let Some((path, target)) = entry.split_once('>') {
                (path, Kind::Symlink { target: target.into() })
            } else if let Some((path, target)) = entry.split_once('=') {
                (path, Kind::LowerLink { target: target.split('/').map(Into::into).collect() })
            } else if let Some(path) = entry.strip_prefix('-') {
                (path, Kind::Whiteout)
            } else {
                (*entry, file(size).kind)
            };
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            let parent: Vec<&[u8]> = parent.split('/').map(str::as_bytes).collect();
            let parent = tree.make_directory(Id::ROOT, &parent, &mut Budget::new(LIMIT)).unwrap();
            let attributes = Attributes { uid: u32::try_from(size).unwrap(), ..Attributes::default() };
            let id = tree.add(Inode { attributes, kind }).unwrap();
            tree.link(parent, name.into(), id);
        }
        tree
    }

    /// Paths with the uid (the layer's size) of each, directories with a slash.
    fn listing(tree: &Tree) -> Vec<String> {
        let mut all = Vec::new();
        let mut pending = vec![(String::new(), Id::ROOT)];
        while let Some((path, id)) = pending.pop() {
            let inode = tree.get(id).unwrap();
            let uid = inode.attributes.uid;
            match &inode.kind {
                Kind::Directory(directory) => {
                    if id != Id::ROOT {
                        all.push(format!("{path}/ {uid}"));
                    }
                    for (name, child) in &directory.entries {
                        let name = String::from_utf8_lossy(name);
                        pending
                            .push((if path.is_empty() { name.to_string() } else { format!("{path}/{name}") }, *child));
                    }
                }
                Kind::Whiteout | Kind::LowerLink { .. } => panic!("{path} is left over"),
                _ => all.push(format!("{path} {uid}")),
            }
        }
        all.sort();
        all
    }

    fn merged(layers: &[&[&str]]) -> Tree {
        let mut tree = Tree::default();
        for (index, entries) in (0u16..).zip(layers) {
            tree.merge(layer(u64::from(index) + 1, entries).compact(), index, LIMIT).unwrap();
        }
        let tree = tree.compact();
        assert!(tree.is_valid());
        tree
    }

    #[test]
    fn upper_layers_replace_hide_and_join() {
        let tree = merged(&[
            &["etc/", "etc/a", "etc/b", "opt/", "opt/x", "var/", "var/log/", "var/log/1", "bin"],
            &["etc/", "-etc/a", "etc/c", "opt!/", "opt/y", "-var/log", "bin/", "bin/sh"],
        ]);
        assert_eq!(
            listing(&tree),
            ["bin/ 2", "bin/sh 2", "etc/ 2", "etc/b 1", "etc/c 2", "opt/ 2", "opt/y 2", "var/ 1"]
        );
    }

    #[test]
    fn whiteouts_reach_lower_layers_only() {
        let tree = merged(&[&["d/", "d/a"], &["-d"], &["d/", "d/b"]]);
        assert_eq!(listing(&tree), ["d/ 3", "d/b 3"]);
    }

    #[test]
    fn an_implied_directory_keeps_the_attributes_below_and_follows_symlinks() {
        let tree = merged(&[&["usr/", "usr/lib/", "lib>usr/lib", "up>../..", "f"], &["lib/x", "usr/y", "up/z", "f/g"]]);
        assert_eq!(
            listing(&tree),
            ["f/ 0", "f/g 2", "lib 1", "up 1", "usr/ 1", "usr/lib/ 1", "usr/lib/x 2", "usr/y 2", "z 2"]
        );
    }

    #[test]
    fn a_described_directory_replaces_a_symlink() {
        let tree = merged(&[&["usr/lib/a", "lib>usr/lib"], &["lib/", "lib/x"]]);
        assert_eq!(listing(&tree), ["lib/ 2", "lib/x 2", "usr/ 0", "usr/lib/ 0", "usr/lib/a 1"]);
    }

    #[test]
    fn links_reach_the_file_below_even_if_this_layer_hides_it() {
        let tree = merged(&[&["d/", "d/a"], &["b=d/a", "-d"]]);
        assert_eq!(listing(&tree), ["b 1"]);
        let mut lower = layer(1, &["d/"]);
        assert_eq!(
            lower.merge(layer(2, &["b=x/y"]), 1, LIMIT),
            Err(MergeError::MissingTarget { target: b"x/y".to_vec() })
        );
        assert_eq!(
            lower.merge(layer(2, &["b=d"]), 1, LIMIT),
            Err(MergeError::DirectoryTarget { target: b"d".to_vec() })
        );
    }

    #[test]
    fn hard_links_stay_and_files_know_their_layer() {
        let mut upper = layer(2, &["a"]);
        let id = upper.lookup(Id::ROOT, b"a").unwrap();
        upper.link(Id::ROOT, b"b".to_vec(), id);
        let mut tree = layer(1, &["c"]);
        tree.merge(upper, 7, LIMIT).unwrap();
        let (a, b) = (tree.lookup(Id::ROOT, b"a"), tree.lookup(Id::ROOT, b"b"));
        assert_eq!(a, b);
        let kind = &tree.get(a.unwrap()).unwrap().kind;
        assert_eq!(kind, &Kind::File { size: 2, source: Source { layer: 7, block: 0 } });
    }

    #[test]
    fn too_many_files_are_an_error() {
        let mut tree = layer(1, &["a"]);
        assert_eq!(tree.merge(layer(2, &["b", "c", "d"]), 1, 3), Err(MergeError::Full));
    }
}
