//! The ImageService.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nacelle_image::{Credentials, Image, ImageStore, Login, Reference};
use nacelle_proto::runtime::v1 as cri;
use nacelle_proto::runtime::v1::image_service_server::ImageService;
use nacelle_sandbox::{Manager, clock};
use tonic::Status;

use crate::calls::service;
use crate::pieces::{Pieces, in_pieces};
use crate::stats::filesystem;
use crate::status::{internal, invalid, of_image, of_sandbox};

/// The ImageService over an [`ImageStore`].
#[derive(Debug, Clone)]
pub struct Images {
    store: ImageStore,
    /// Whose pods' writable disks take space, too.
    manager: Manager,
    /// Tags and digests, in their normal form.
    pinned: BTreeSet<String>,
}

impl Images {
    /// Serves this store, whose images `manager` runs. Images with one of the names in `pinned`
    /// are shown as pinned, so that the kubelet does not remove them to make room.
    #[must_use]
    pub fn new(store: ImageStore, manager: Manager, pinned: &[String]) -> Self {
        let normal = |name: &String| name.parse::<Reference>().map(|reference| reference.to_string()).ok();
        Self { store, manager, pinned: pinned.iter().filter_map(normal).collect() }
    }

    /// The images that a filter lets through.
    fn images(&self, filter: Option<cri::ImageFilter>) -> Vec<cri::Image> {
        let wanted = filter.and_then(|filter| filter.image).map(|image| image.image);
        let images = match wanted.filter(|name| !name.is_empty()) {
            Some(name) => self.store.get(&name).into_iter().collect(),
            None => self.store.list(),
        };
        images.into_iter().map(|found| self.image(found)).collect()
    }

    /// An image in the CRI's words.
    fn image(&self, image: Image) -> cri::Image {
        let pinned = image.repo_tags.iter().chain(&image.repo_digests).any(|name| self.pinned.contains(name));
        cri::Image { pinned, ..translated(image) }
    }
}

service! {
    impl ImageService for Images {
        streams {
            StreamImagesStream = Pieces<cri::StreamImagesResponse>;
        }
        calls {
            Read list_images(cri::ListImagesRequest) -> cri::ListImagesResponse;
            Read stream_images(cri::StreamImagesRequest) -> Self::StreamImagesStream;
            Read image_status(cri::ImageStatusRequest) -> cri::ImageStatusResponse;
            Change pull_image(cri::PullImageRequest) -> cri::PullImageResponse;
            Change remove_image(cri::RemoveImageRequest) -> cri::RemoveImageResponse;
            Read image_fs_info(cri::ImageFsInfoRequest) -> cri::ImageFsInfoResponse;
        }
    }
}

impl Images {
    async fn list_images(&self, request: cri::ListImagesRequest) -> Result<cri::ListImagesResponse, Status> {
        Ok(cri::ListImagesResponse { images: self.images(request.filter) })
    }

    async fn stream_images(
        &self,
        request: cri::StreamImagesRequest,
    ) -> Result<Pieces<cri::StreamImagesResponse>, Status> {
        Ok(in_pieces(self.images(request.filter), |images| cri::StreamImagesResponse { images }))
    }

    async fn image_status(&self, request: cri::ImageStatusRequest) -> Result<cri::ImageStatusResponse, Status> {
        let found = self.store.get(&name(request.image)?);
        let mut info = std::collections::HashMap::new();
        if let (Some(found), true) = (&found, request.verbose) {
            let spec = serde_json::to_value(&found.config).unwrap_or_default();
            info.insert("info".into(), serde_json::json!({ "imageSpec": spec }).to_string());
        }
        Ok(cri::ImageStatusResponse { image: found.map(|found| self.image(found)), info })
    }

    async fn pull_image(&self, request: cri::PullImageRequest) -> Result<cri::PullImageResponse, Status> {
        let name = name(request.image)?;
        let login = request.auth.map(login).transpose()?.flatten();
        let pulled = self.store.pull(&name, login, |_| {}).await.map_err(|e| of_image(&e))?;
        Ok(cri::PullImageResponse { image_ref: pulled.id })
    }

    async fn remove_image(&self, request: cri::RemoveImageRequest) -> Result<cri::RemoveImageResponse, Status> {
        let name = name(request.image)?;
        self.store.remove(&name).await.map_err(|e| of_image(&e))?;
        Ok(cri::RemoveImageResponse {})
    }

    async fn image_fs_info(&self, _: cri::ImageFsInfoRequest) -> Result<cri::ImageFsInfoResponse, Status> {
        let (store, manager) = (self.store.clone(), self.manager.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let images = store.usage().map_err(|e| of_image(&e))?;
            let containers = manager.disk_usage().map_err(|e| of_sandbox(&e))?;
            Ok::<_, Status>((images, containers))
        });
        let (images, containers) = looked.await.map_err(|e| internal(&e))??;
        let now = clock::now();
        // The kubelet takes two names for two file systems, and counts the disk twice.
        let place = if on_one_disk(&images.mount_point, &containers.directory) {
            &containers.directory
        } else {
            &images.mount_point
        };
        Ok(cri::ImageFsInfoResponse {
            image_filesystems: vec![filesystem(place, images.bytes, images.inodes, now)],
            container_filesystems: vec![filesystem(&containers.directory, containers.bytes, containers.inodes, now)],
        })
    }
}

/// Whether two directories are on one file system.
fn on_one_disk(one: &Path, other: &Path) -> bool {
    let device = |path: &Path| path.metadata().map(|metadata| metadata.dev());
    matches!((device(one), device(other)), (Ok(one), Ok(other)) if one == other)
}

/// The image's name, which must be there.
fn name(spec: Option<cri::ImageSpec>) -> Result<String, Status> {
    match spec.map(|spec| spec.image) {
        Some(name) if !name.is_empty() => Ok(name),
        _ => Err(invalid("image.image", "is empty")),
    }
}

/// The registry's credentials, in whichever of its forms the kubelet has them.
fn login(auth: cri::AuthConfig) -> Result<Option<Login>, Status> {
    let credentials = if !auth.username.is_empty() {
        Credentials::Basic { username: auth.username, password: auth.password }
    } else if !auth.identity_token.is_empty() {
        Credentials::Refresh { token: auth.identity_token }
    } else if !auth.registry_token.is_empty() {
        Credentials::Bearer { token: auth.registry_token }
    } else if !auth.auth.is_empty() {
        Credentials::from_basic(&auth.auth).map_err(|problem| invalid("auth.auth", problem))?
    } else {
        return Ok(None);
    };
    let server = Some(auth.server_address).filter(|server| !server.is_empty());
    Ok(Some(Login { credentials, server }))
}

/// An image in the CRI's words, but for what is configured about it.
fn translated(image: Image) -> cri::Image {
    let user = &image.config.user;
    let user = user.split(':').next().unwrap_or_default();
    let (uid, username) = match user.parse::<i64>() {
        Ok(uid) => (Some(cri::Int64Value { value: uid }), String::new()),
        Err(_) if user.is_empty() => (Some(cri::Int64Value { value: 0 }), String::new()),
        Err(_) => (None, user.to_owned()),
    };
    cri::Image {
        size: image.size,
        repo_tags: image.repo_tags,
        repo_digests: image.repo_digests,
        uid,
        username,
        spec: Some(cri::ImageSpec { image: image.id.clone(), ..cri::ImageSpec::default() }),
        pinned: false,
        id: image.id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_of_credentials_is_understood() {
        let of = |auth: cri::AuthConfig| login(auth).unwrap();
        assert_eq!(of(cri::AuthConfig { server_address: "a.test".into(), ..Default::default() }), None);
        let basic = Credentials::Basic { username: "user".into(), password: "pass".into() };
        let plain = cri::AuthConfig { username: "user".into(), password: "pass".into(), ..Default::default() };
        assert_eq!(of(plain.clone()), Some(basic.clone().into()));
        let named = cri::AuthConfig { server_address: "a.test".into(), ..plain };
        assert_eq!(of(named), Some(Login { credentials: basic.clone(), server: Some("a.test".into()) }));
        let encoded = cri::AuthConfig { auth: "dXNlcjpwYXNz".into(), ..Default::default() };
        assert_eq!(of(encoded), Some(basic.into()));
        let identity = cri::AuthConfig { identity_token: "i".into(), ..Default::default() };
        assert_eq!(of(identity), Some(Credentials::Refresh { token: "i".into() }.into()));
        let token = cri::AuthConfig { registry_token: "r".into(), ..Default::default() };
        assert_eq!(of(token), Some(Credentials::Bearer { token: "r".into() }.into()));
        let status = login(cri::AuthConfig { auth: "!".into(), ..Default::default() }).unwrap_err();
        assert!(status.message().starts_with("auth.auth"), "{}", status.message());
    }
}
