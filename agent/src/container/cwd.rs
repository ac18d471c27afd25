//! The working directory, which an image may name without having it.

use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, mkdirat, open, openat2};
use rustix::io::Errno;

use super::mount_points::resolve;
use crate::error::{Error, Result};

/// Makes the directory `cwd` of the container whose root is `root`, parents included, as
/// far as it is missing, for the given user and group. Links in the image are followed
/// inside of it only, and what they lead to is made, too.
pub fn make(root: &Path, cwd: &Path, (uid, gid): (u32, u32)) -> Result<()> {
    let action = "make the working directory";
    let failed = |error: Errno| Error::Path { action, path: cwd.into(), source: error.into() };
    let place = resolve(root, cwd, &[]).map_err(Error::path(action, cwd))?;
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = open(root, directory, Mode::empty()).map_err(failed)?;
    let find = |path: &Path| -> std::result::Result<OwnedFd, Errno> {
        openat2(&top, path, directory, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    };
    let mut path = PathBuf::from("/");
    let mut parent = find(&path).map_err(failed)?;
    for part in place.components().filter(|part| *part != Component::RootDir) {
        path.push(part);
        parent = match find(&path) {
            Err(Errno::NOENT) => {
                mkdirat(&parent, part.as_os_str(), Mode::from_raw_mode(0o755)).map_err(failed)?;
                let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
                chownat(&parent, part.as_os_str(), uid, gid, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
                find(&path).map_err(failed)?
            }
            found => found.map_err(failed)?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_directories_are_made_and_links_stay_inside() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("real")).unwrap();
        std::os::unix::fs::symlink("/real", root.path().join("link")).unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("out")).unwrap();
        let owner = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        make(root.path(), Path::new("/link/a/b"), owner).unwrap();
        make(root.path(), Path::new("/link/a/b"), owner).unwrap();
        assert!(root.path().join("real/a/b").is_dir());
        make(root.path(), Path::new("/out/x"), owner).unwrap();
        assert!(!outside.path().join("x").exists());
        let inside = outside.path().strip_prefix("/").unwrap();
        assert!(root.path().join(inside).join("x").is_dir());
        std::os::unix::fs::symlink("../run/./later", root.path().join("real/run")).unwrap();
        make(root.path(), Path::new("/link/run/x"), owner).unwrap();
        assert!(root.path().join("run/later/x").is_dir());
        std::os::unix::fs::symlink("loop", root.path().join("loop")).unwrap();
        assert!(make(root.path(), Path::new("/loop/x"), owner).is_err());
        std::fs::write(root.path().join("file"), "").unwrap();
        assert!(make(root.path(), Path::new("/file/x"), owner).is_err());
    }
}
