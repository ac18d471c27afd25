//! Where a container's mounts go in its root.
//!
//! What lies at a mount's destination is the image's to say, and may be a link that leads to nothing, as `/etc/resolv.conf` in the
//! images of whole systems. The mount goes where the link leads, below the root. libcontainer makes what is missing there, but
//! not through a link.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::io::{Error, ErrorKind};
use std::path::{Component, Path, PathBuf};

use libcontainer::oci_spec::runtime::Spec;

use crate::error;

/// As many links as the kernel follows.
const LINKS: usize = 40;

/// Makes the destinations of bind mounts places without links below `root`, which is mounted and which nobody else uses yet.
/// Blocks.
pub fn settle(spec: &mut Spec, root: &Path) -> error::Result<()> {
    let mut taken: Vec<PathBuf> = Vec::new();
    for mount in spec.mounts_mut().iter_mut().flatten() {
        if mount.typ().as_deref() == Some("bind") {
            let asked = mount.destination().clone();
            let place = resolve(root, &asked, &taken).map_err(error::Error::path("find in the container", &asked))?;
            mount.set_destination(place);
        }
        taken.push(mount.destination().clone());
    }
    Ok(())
}

/// The place that `path` leads to, links followed below `root`, also those to what is not there. From a place on where
/// something is mounted before (`taken`), what the root holds does not matter.
pub(super) fn resolve(root: &Path, path: &Path, taken: &[PathBuf]) -> std::io::Result<PathBuf> {
    let mut left: VecDeque<OsString> = parts(path);
    let mut place = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = left.pop_front() {
        if part == ".." {
            place.pop();
            continue;
        }
        let next = place.join(&part);
        if taken.contains(&next) {
            return Ok(left.iter().fold(next, |place, part| place.join(part)));
        }
        let file = root.join(next.strip_prefix("/").unwrap_or(&next));
        match fs::symlink_metadata(&file) {
            Ok(metadata) if metadata.is_symlink() => {
                links += 1;
                if links > LINKS {
                    return Err(Error::from_raw_os_error(libc::ELOOP));
                }
                let target = fs::read_link(&file)?;
                if target.is_absolute() {
                    place = "/".into();
                }
                for part in parts(&target).into_iter().rev() {
                    left.push_front(part);
                }
            }
            Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Err(error),
            _ => place = next,
        }
    }
    Ok(place)
}

fn parts(path: &Path) -> VecDeque<OsString> {
    let named = |part: &Component<'_>| matches!(part, Component::Normal(_) | Component::ParentDir);
    path.components().filter(named).map(|part| part.as_os_str().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use serde_json::json;

    use super::*;

    #[test]
    fn links_are_followed_below_the_root_also_to_nothing() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc/real")).unwrap();
        fs::create_dir(root.path().join("var")).unwrap();
        for (link, target) in [
            ("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"),
            ("etc/localtime", "/usr/share/zoneinfo/UTC"),
            ("var/run", "/run"),
            ("etc/up", "../../../../above"),
            ("etc/link", "real"),
            ("etc/loop", "loop"),
        ] {
            symlink(target, root.path().join(link)).unwrap();
        }
        let place = |path: &str| resolve(root.path(), Path::new(path), &["/dev".into()]);
        for (path, expected) in [
            ("/etc/resolv.conf", "/run/systemd/resolve/stub-resolv.conf"),
            ("/etc/localtime", "/usr/share/zoneinfo/UTC"),
            ("/var/run/secrets/x", "/run/secrets/x"),
            ("/etc/up", "/above"),
            ("/etc/link/new", "/etc/real/new"),
            ("/nothing/at/all", "/nothing/at/all"),
            ("/dev/net/tun", "/dev/net/tun"),
        ] {
            assert_eq!(place(path).unwrap(), Path::new(expected), "{path}");
        }
        assert_eq!(place("/etc/loop").unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn what_is_mounted_before_hides_the_image_s_links() {
        let root = tempfile::tempdir().unwrap();
        symlink("/elsewhere", root.path().join("data")).unwrap();
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.1.0",
            "mounts": [
                {"destination": "/sys", "type": "sysfs", "source": "sysfs"},
                {"destination": "/data", "type": "bind", "source": "/a"},
                {"destination": "/elsewhere/sub", "type": "bind", "source": "/b"},
                {"destination": "/data/other", "type": "bind", "source": "/c"},
            ]
        }))
        .unwrap();
        settle(&mut spec, root.path()).unwrap();
        let places: Vec<_> =
            spec.mounts().iter().flatten().map(|mount| mount.destination().to_string_lossy().into_owned()).collect();
        assert_eq!(places, ["/sys", "/elsewhere", "/elsewhere/sub", "/elsewhere/other"]);
    }
}
