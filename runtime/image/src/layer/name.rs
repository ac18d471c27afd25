//! What an archive may call its entries.

/// Longest path, as in Linux (`PATH_MAX` without its NUL).
const MAX_PATH: usize = 4095;
/// Longest name in a directory, in Linux and in EROFS.
const MAX_NAME: usize = 255;

/// Hides a name of lower layers.
const WHITEOUT: &[u8] = b".wh.";
/// Hides all names that a directory has in lower layers.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Bookkeeping of AUFS, meaningless elsewhere.
const AUFS: &[u8] = b".wh..wh.";
/// Where AUFS keeps files that have several names, for hard links to mean.
const AUFS_LINKS: &[u8] = b".wh..wh.plnk";

/// The components of a path, taken relative to the image's root; none for the root itself.
///
/// Builders write `a/b`, `./a/b` and `/a/b` for the same file. `..` takes the component before it back, as the text
/// stands, and is nothing at the root: whatever a name says, it is one within the image.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    if path.len() > MAX_PATH {
        return Err("the path is longer than 4095 bytes");
    }
    let mut components = Vec::new();
    for component in path.split(|&b| b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => _ = components.pop(),
            _ if component.contains(&0) => return Err("the path holds a NUL byte"),
            _ if component.len() > MAX_NAME => return Err("a part of the path is longer than 255 bytes"),
            _ => components.push(component),
        }
    }
    Ok(components)
}

/// What an entry's path says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning<'a> {
    /// The root directory.
    Root,
    /// A file in a directory.
    Entry { parent: &'a [&'a [u8]], name: &'a [u8] },
    /// `name` of the directory is hidden.
    Whiteout { parent: &'a [&'a [u8]], name: &'a [u8] },
    /// All of the directory is hidden.
    Opaque { directory: &'a [&'a [u8]] },
    /// Not in the tree; a target of hard links.
    Aside { name: &'a [u8] },
    /// Nothing.
    Ignored,
}

/// The name of a file that AUFS keeps for hard links, if `components` is one's.
pub(super) fn aside<'a>(components: &[&'a [u8]]) -> Option<&'a [u8]> {
    match components {
        [AUFS_LINKS, name] => Some(name),
        _ => None,
    }
}

/// Tells whiteouts from entries.
pub(super) fn meaning<'a>(components: &'a [&'a [u8]]) -> Result<Meaning<'a>, &'static str> {
    let Some((&name, parent)) = components.split_last() else { return Ok(Meaning::Root) };
    if name == OPAQUE {
        return Ok(Meaning::Opaque { directory: parent });
    }
    if let Some(name) = aside(components) {
        return Ok(Meaning::Aside { name });
    }
    if components.iter().any(|component| component.starts_with(AUFS)) {
        return Ok(Meaning::Ignored);
    }
    match name.strip_prefix(WHITEOUT) {
        None => Ok(Meaning::Entry { parent, name }),
        Some(b"" | b"." | b"..") => Err("the whiteout hides no valid name"),
        Some(hidden) => Ok(Meaning::Whiteout { parent, name: hidden }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn honest_spellings_are_one_path() {
        for path in
            ["a/b", "./a/b", "a//b/", "././a/./b", "/a/b", "//a/b", "../a/b", "/../a/b", "x/../a/b", "a/x/y/../../b"]
        {
            assert_eq!(components(path.as_bytes()), Ok(vec![&b"a"[..], b"b"]), "{path}");
        }
        for root in ["", ".", "./", "/", "..", "a/..", "/../.."] {
            assert_eq!(components(root.as_bytes()), Ok(vec![]));
        }
        assert_eq!(components(b"..a/b.."), Ok(vec![&b"..a"[..], b"b.."]));
    }

    #[test]
    fn what_linux_cannot_name_is_refused() {
        let long = "n".repeat(256);
        let deep = "n/".repeat(2048);
        for path in ["a\0b", "a\0b/..", &long, &deep] {
            assert!(components(path.as_bytes()).is_err(), "{path}");
        }
    }

    #[test]
    fn whiteouts_are_told_apart() {
        let of = |path: &[&'static [u8]]| meaning(path).map(|meaning| format!("{meaning:?}"));
        assert!(of(&[b"d", b".wh.x"]).unwrap().starts_with("Whiteout"));
        assert!(of(&[b"d", b".wh..x"]).unwrap().starts_with("Whiteout"));
        assert!(of(&[b"d", b".wh..wh..opq"]).unwrap().starts_with("Opaque"));
        assert_eq!(of(&[b".wh..wh.aufs"]), Ok("Ignored".to_owned()));
        assert_eq!(of(&[b".wh..wh.plnk"]), Ok("Ignored".to_owned()));
        assert!(of(&[b".wh..wh.plnk", b"1"]).unwrap().starts_with("Aside"));
        assert_eq!(of(&[]), Ok("Root".to_owned()));
        for bad in [&b".wh."[..], b".wh..", b".wh..."] {
            assert!(meaning(&[bad]).is_err());
        }
    }

    proptest! {
        #[test]
        fn accepted_paths_stay_inside(path in proptest::collection::vec(prop_oneof![Just(b'.'), Just(b'/'), any::<u8>()], 0..40)) {
            if let Ok(parts) = components(&path) {
                for part in parts {
                    prop_assert!(!part.is_empty() && part != b"." && part != b".." && !part.contains(&b'/') && !part.contains(&0));
                }
            }
        }
    }
}
