//! The ImageService.

use std::time::{SystemTime, UNIX_EPOCH};

use nacelle_image::{Credentials, Image, ImageStore};
use nacelle_proto::runtime::v1 as cri;
use nacelle_proto::runtime::v1::image_service_server::ImageService;
use tonic::{Request, Response, Status};

use crate::status::{invalid, of_image};

type Reply<T> = Result<Response<T>, Status>;

/// The ImageService over an [`ImageStore`].
#[derive(Debug, Clone)]
pub struct Images {
    store: ImageStore,
}

impl Images {
    /// Serves this store.
    #[must_use]
    pub fn new(store: ImageStore) -> Self {
        Self { store }
    }
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn list_images(&self, request: Request<cri::ListImagesRequest>) -> Reply<cri::ListImagesResponse> {
        let wanted = request.into_inner().filter.and_then(|filter| filter.image).map(|image| image.image);
        let images = match wanted.filter(|name| !name.is_empty()) {
            Some(name) => self.store.get(&name).into_iter().collect(),
            None => self.store.list(),
        };
        Ok(Response::new(cri::ListImagesResponse { images: images.into_iter().map(image).collect() }))
    }

    type StreamImagesStream = tokio_stream::Empty<Result<cri::StreamImagesResponse, Status>>;

    async fn stream_images(&self, _: Request<cri::StreamImagesRequest>) -> Reply<Self::StreamImagesStream> {
        Err(Status::unimplemented("stream_images is not there yet"))
    }

    async fn image_status(&self, request: Request<cri::ImageStatusRequest>) -> Reply<cri::ImageStatusResponse> {
        let request = request.into_inner();
        let found = self.store.get(&name(request.image)?);
        let mut info = std::collections::HashMap::new();
        if let (Some(found), true) = (&found, request.verbose) {
            let spec = serde_json::to_value(&found.config).unwrap_or_default();
            info.insert("info".into(), serde_json::json!({ "imageSpec": spec }).to_string());
        }
        Ok(Response::new(cri::ImageStatusResponse { image: found.map(image), info }))
    }

    async fn pull_image(&self, request: Request<cri::PullImageRequest>) -> Reply<cri::PullImageResponse> {
        let request = request.into_inner();
        let name = name(request.image)?;
        let credentials = request.auth.map(credentials).transpose()?.flatten();
        let pulled = self.store.pull(&name, credentials, |_| {}).await.map_err(|e| of_image(&e))?;
        Ok(Response::new(cri::PullImageResponse { image_ref: pulled.id }))
    }

    async fn remove_image(&self, request: Request<cri::RemoveImageRequest>) -> Reply<cri::RemoveImageResponse> {
        let name = name(request.into_inner().image)?;
        self.store.remove(&name).await.map_err(|e| of_image(&e))?;
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<cri::ImageFsInfoRequest>) -> Reply<cri::ImageFsInfoResponse> {
        let usage = self.store.usage().map_err(|e| of_image(&e))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let filesystem = cri::FilesystemUsage {
            timestamp: i64::try_from(now).unwrap_or(i64::MAX),
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: usage.mount_point.to_string_lossy().into_owned() }),
            used_bytes: Some(cri::UInt64Value { value: usage.bytes }),
            inodes_used: Some(cri::UInt64Value { value: usage.inodes }),
        };
        Ok(Response::new(cri::ImageFsInfoResponse {
            image_filesystems: vec![filesystem.clone()],
            container_filesystems: vec![filesystem],
        }))
    }
}

/// The image's name, which must be there.
fn name(spec: Option<cri::ImageSpec>) -> Result<String, Status> {
    match spec.map(|spec| spec.image) {
        Some(name) if !name.is_empty() => Ok(name),
        _ => Err(invalid("image.image", "is empty")),
    }
}

/// The registry's credentials, in whichever of its forms the kubelet has them.
fn credentials(auth: cri::AuthConfig) -> Result<Option<Credentials>, Status> {
    if !auth.registry_token.is_empty() {
        return Ok(Some(Credentials::Bearer { token: auth.registry_token }));
    }
    if !auth.identity_token.is_empty() {
        return Err(invalid("auth.identity_token", "is not supported: give username and password or registry_token"));
    }
    if !auth.auth.is_empty() {
        return Credentials::from_basic(&auth.auth).map(Some).map_err(|problem| invalid("auth.auth", problem));
    }
    if auth.username.is_empty() {
        return Ok(None);
    }
    Ok(Some(Credentials::Basic { username: auth.username, password: auth.password }))
}

/// An image in the CRI's words.
fn image(image: Image) -> cri::Image {
    let user = image.config.config().as_ref().and_then(|config| config.user().clone()).unwrap_or_default();
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
