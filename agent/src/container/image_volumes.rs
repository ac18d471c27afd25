//! Directories that an image declares for its data: they are there, and can be written to.
//!
//! The root of a container is an overlay on the pod's scratch disk, so a directory of it has the image's content and
//! takes what is written. Under a read-only root it is bound onto itself: what makes the root read-only is its mount.

use std::path::{Component, Path, PathBuf};

use libcontainer::oci_spec::OciSpecError;
use libcontainer::oci_spec::runtime::{Mount, MountBuilder, Spec};
use nacelle_proto::agent::v1::CreateContainerRequest;

use super::cwd;
use super::volumes::within;
use crate::error::{Error, Result};

/// Makes the image's volumes in the mounted `root`, for the given user and group where the image has none. Blocks.
pub fn make(root: &Path, request: &CreateContainerRequest, spec: &mut Spec, owner: (u32, u32)) -> Result<()> {
    for volume in &request.image_volumes {
        let path = cleaned(volume);
        let mounted =
            |path: &Path| spec.mounts().iter().flatten().any(|mount| cleaned_path(mount.destination()) == path);
        if path == Path::new("/") || mounted(&path) {
            continue;
        }
        cwd::make(root, &path, owner)?;
        if !(request.readonly_rootfs && request.image_volumes_writable) {
            continue;
        }
        // A link on the way is followed here, and not by whoever mounts.
        let source = within(root, &path.to_string_lossy())?;
        let inside = Path::new("/").join(source.strip_prefix(root).unwrap_or(&path));
        if mounted(&inside) {
            continue;
        }
        let mount = bind(&source, &inside).map_err(|error| Error::invalid("image_volumes", error.to_string()))?;
        let mounts = spec.mounts_mut().get_or_insert_default();
        // After what it lies in, before what lies in it.
        let depth = |mount: &Mount| mount.destination().components().count();
        let place = mounts.iter().position(|other| depth(other) > depth(&mount)).unwrap_or(mounts.len());
        mounts.insert(place, mount);
    }
    Ok(())
}

fn bind(source: &Path, destination: &Path) -> std::result::Result<Mount, OciSpecError> {
    MountBuilder::default()
        .source(source)
        .destination(destination)
        .typ("bind")
        .options(["bind", "rprivate", "rw"].map(str::to_owned).to_vec())
        .build()
}

/// A path from the root, however the image spells it.
fn cleaned(path: &str) -> PathBuf {
    cleaned_path(Path::new(path))
}

fn cleaned_path(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => _ = cleaned.pop(),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(root: &Path, request: CreateContainerRequest, mounts: &[&str]) -> Vec<(PathBuf, PathBuf)> {
        let mounts = mounts.iter().map(|path| bind(Path::new("/s"), Path::new(path)).unwrap()).collect::<Vec<_>>();
        let mut spec = Spec::default();
        spec.set_mounts(Some(mounts));
        let owner = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        make(root, &request, &mut spec, owner).unwrap();
        let mounts = spec.mounts().iter().flatten();
        mounts.map(|mount| (mount.destination().clone(), mount.source().clone().unwrap())).collect()
    }

    #[test]
    fn volumes_are_directories_that_can_be_written_to() {
        let outside = tempfile::tempdir().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let root = std::fs::canonicalize(directory.path()).unwrap();
        std::fs::create_dir_all(root.join("var/lib/data")).unwrap();
        std::os::unix::fs::symlink("/var/lib", root.join("link")).unwrap();
        std::os::unix::fs::symlink(outside.path(), root.join("out")).unwrap();
        let volumes = ["/var/lib/data", "missing/../new/place/", "/link/linked", "/mounted/", "/", "/../.."];
        let request = CreateContainerRequest {
            image_volumes: volumes.map(str::to_owned).to_vec(),
            image_volumes_writable: true,
            ..CreateContainerRequest::default()
        };
        // A root that can be written to needs no mounts.
        let mounts = ["/mounted", "/new/place/below/it"];
        assert_eq!(made(&root, request.clone(), &mounts).len(), 2);
        for path in ["var/lib/data", "new/place", "var/lib/linked"] {
            assert!(root.join(path).is_dir(), "{path}");
        }
        assert!(!root.join("mounted").exists() && !root.join("missing").exists());
        let request = CreateContainerRequest { readonly_rootfs: true, ..request };
        let own = |path: &str| (Path::new("/").join(path), root.join(path));
        let given = |path: &str| (PathBuf::from(path), PathBuf::from("/s"));
        let expected = [
            given("/mounted"),
            own("new/place"),
            own("var/lib/data"),
            own("var/lib/linked"),
            given("/new/place/below/it"),
        ];
        assert_eq!(made(&root, request.clone(), &mounts), expected);
        let follow = CreateContainerRequest { image_volumes_writable: false, ..request.clone() };
        assert_eq!(made(&root, follow, &mounts).len(), 2);
        let escape = CreateContainerRequest { image_volumes: vec!["/out/x".into()], ..request };
        let inside = outside.path().join("x");
        let inside = inside.strip_prefix("/").unwrap();
        assert_eq!(made(&root, escape, &[]), [own(inside.to_str().unwrap())]);
        assert!(!outside.path().join("x").exists());
    }
}
