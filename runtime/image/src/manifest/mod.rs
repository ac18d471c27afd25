//! Manifests, indexes and configurations: what they say, checked before anything is fetched on their word.

use oci_spec::image::{Arch, ImageConfiguration, Os};
use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::Limits;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// What a manifest request accepts.
pub(crate) const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

const CONFIG_TYPES: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

const LAYER_TYPES: [&str; 9] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// Points to content.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    platform: Option<Platform>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
    variant: Option<String>,
}

/// What a tag or digest leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Document {
    /// One image.
    Image { config: Descriptor, layers: Vec<Descriptor> },
    /// Images for several platforms; this is the one for here.
    Index { chosen: Descriptor },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u32,
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

/// Reads a manifest or index; `what` is its name for messages, `content_type` what the registry called it.
pub(crate) fn parse(bytes: &[u8], content_type: Option<&str>, limits: &Limits, what: &str) -> Result<Document> {
    let raw: Raw = serde_json::from_slice(bytes)
        .map_err(|error| Error::corrupt(format!("manifest of {what}"), format!("it cannot be read: {error}")))?;
    if raw.schema_version != 2 {
        let reason =
            format!("its manifest has version {}, only version 2 is supported; push it again", raw.schema_version);
        return Err(Error::refused(what, reason));
    }
    // The type within is covered by the digest, the header is not.
    let media_type = raw.media_type.as_deref().or(content_type).unwrap_or_default();
    let is_index = match media_type {
        OCI_INDEX | DOCKER_LIST => true,
        OCI_MANIFEST | DOCKER_MANIFEST => false,
        // Older tools left the type out, and a plain web server does not know it.
        _ if raw.media_type.is_none() => raw.manifests.is_some(),
        other => return Err(Error::refused(what, format!("its manifest is of the unsupported type {other:?}"))),
    };
    match raw {
        Raw { manifests: Some(manifests), config: None, layers: None, .. } if is_index => {
            Ok(Document::Index { chosen: choose(manifests, what)? })
        }
        Raw { config: Some(config), layers: Some(layers), manifests: None, .. } if !is_index => {
            check_image(&config, &layers, limits, what)?;
            Ok(Document::Image { config, layers })
        }
        _ => Err(Error::corrupt(format!("manifest of {what}"), "its fields do not fit its type")),
    }
}

fn check_image(config: &Descriptor, layers: &[Descriptor], limits: &Limits, what: &str) -> Result<()> {
    if !CONFIG_TYPES.contains(&config.media_type.as_str()) {
        let reason = format!("it is not a container image: its configuration is of type {:?}", config.media_type);
        return Err(Error::refused(what, reason));
    }
    if config.size > limits.config_bytes {
        return Err(Error::limit(what, format!("a configuration of more than {} bytes", limits.config_bytes)));
    }
    if layers.len() > limits.layers {
        return Err(Error::limit(what, format!("more than {} layers", limits.layers)));
    }
    for layer in layers {
        if !LAYER_TYPES.contains(&layer.media_type.as_str()) {
            let reason = format!("layer {} is of the unsupported type {:?}", layer.digest, layer.media_type);
            return Err(Error::refused(what, reason));
        }
        if layer.size > limits.layer_bytes {
            let reason = format!("layer {} has more than {} bytes", layer.digest, limits.layer_bytes);
            return Err(Error::limit(what, reason));
        }
    }
    Ok(())
}

/// The image for linux/amd64: the baseline variant if there are several.
fn choose(manifests: Vec<Descriptor>, what: &str) -> Result<Descriptor> {
    let mut offered: Vec<String> = Vec::new();
    let mut candidates: Vec<Descriptor> = Vec::new();
    let only_one = manifests.len() == 1;
    for manifest in manifests {
        match &manifest.platform {
            Some(platform) if platform.os == "linux" && platform.architecture == "amd64" => candidates.push(manifest),
            Some(platform) => offered.push(format!("{}/{}", platform.os, platform.architecture)),
            // An index around a single image, as some tools write it; its configuration says what it is.
            None if only_one => candidates.push(manifest),
            None => {}
        }
    }
    let variant = |manifest: &Descriptor| manifest.platform.as_ref().and_then(|platform| platform.variant.clone());
    candidates.sort_by_key(|manifest| match variant(manifest).as_deref() {
        None | Some("" | "v1") => 0,
        Some("v2") => 1,
        Some("v3") => 2,
        Some(_) => 3,
    });
    candidates.into_iter().next().ok_or_else(|| {
        offered.dedup();
        offered.truncate(20);
        Error::refused(what, format!("it is not built for linux/amd64, only for [{}]", offered.join(", ")))
    })
}

/// Reads an image configuration and checks that it fits this host and the manifest's `layers`. Gives the layers'
/// uncompressed digests.
pub(crate) fn parse_config(bytes: &[u8], layers: usize, what: &str) -> Result<(ImageConfiguration, Vec<Digest>)> {
    let corrupt = |reason: String| Error::corrupt(format!("configuration of {what}"), reason);
    let config: ImageConfiguration =
        serde_json::from_slice(bytes).map_err(|error| corrupt(format!("it cannot be read: {error}")))?;
    if *config.os() != Os::Linux || *config.architecture() != Arch::Amd64 {
        let reason = format!("it is built for {}/{}, not for linux/amd64", config.os(), config.architecture());
        return Err(Error::refused(what, reason));
    }
    let diff_ids = config.rootfs().diff_ids().iter().map(|id| id.parse::<Digest>());
    let diff_ids = diff_ids.collect::<Result<Vec<_>, _>>().map_err(|error| corrupt(error.to_string()))?;
    if diff_ids.len() != layers {
        return Err(corrupt(format!("it describes {} layers, the manifest {layers}", diff_ids.len())));
    }
    Ok((config, diff_ids))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn descriptor(media_type: &str, content: &[u8]) -> Value {
        json!({"mediaType": media_type, "digest": Digest::of(content), "size": content.len()})
    }

    fn parsed(value: &Value) -> Result<Document> {
        parse(value.to_string().as_bytes(), None, &Limits::default(), "test")
    }

    fn image() -> Value {
        json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(CONFIG_TYPES[0], b"c"),
            "layers": [descriptor(LAYER_TYPES[1], b"l")],
        })
    }

    fn platform(os: &str, architecture: &str, variant: &str, content: &[u8]) -> Value {
        let mut value = descriptor(OCI_MANIFEST, content);
        value["platform"] = json!({"os": os, "architecture": architecture, "variant": variant});
        value
    }

    #[test]
    fn images_of_both_kinds_are_read() {
        assert!(matches!(parsed(&image()), Ok(Document::Image { layers, .. }) if layers.len() == 1));
        let mut docker = image();
        docker["mediaType"] = json!(DOCKER_MANIFEST);
        docker["config"]["mediaType"] = json!(CONFIG_TYPES[1]);
        docker["layers"][0]["mediaType"] = json!(LAYER_TYPES[7]);
        assert!(matches!(parsed(&docker), Ok(Document::Image { .. })));
        let mut untyped = image();
        untyped["mediaType"].take();
        assert!(matches!(parsed(&untyped), Ok(Document::Image { .. })));
    }

    #[test]
    fn the_baseline_of_this_platform_is_chosen() {
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
            platform("linux", "arm64", "v8", b"1"), platform("unknown", "unknown", "", b"2"),
            platform("linux", "amd64", "v3", b"3"), platform("linux", "amd64", "", b"4"),
        ]});
        assert!(matches!(parsed(&index), Ok(Document::Index { chosen }) if chosen.digest == Digest::of(b"4")));
        let foreign = json!({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [platform("linux", "arm64", "v8", b"1")]});
        let error = parsed(&foreign).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("linux/arm64"), "{error}");
        let bare = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor(OCI_MANIFEST, b"5")]});
        assert!(matches!(parsed(&bare), Ok(Document::Index { chosen }) if chosen.digest == Digest::of(b"5")));
    }

    #[test]
    fn what_is_not_an_image_is_refused() {
        let change = |pointer: &str, value: Value| {
            let mut image = image();
            *image.pointer_mut(pointer).unwrap() = value;
            parsed(&image).unwrap_err().kind()
        };
        assert_eq!(change("/schemaVersion", json!(1)), ErrorKind::Refused);
        assert_eq!(change("/mediaType", json!("text/html")), ErrorKind::Refused);
        assert_eq!(change("/mediaType", json!(OCI_INDEX)), ErrorKind::Corrupt);
        assert_eq!(change("/config/mediaType", json!("application/vnd.cncf.helm.config.v1+json")), ErrorKind::Refused);
        assert_eq!(change("/config/size", json!(u64::MAX)), ErrorKind::Exhausted);
        assert_eq!(change("/config/size", json!(-1)), ErrorKind::Corrupt);
        assert_eq!(
            change("/layers/0/mediaType", json!("application/vnd.oci.image.layer.v1.tar+encrypted")),
            ErrorKind::Refused
        );
        assert_eq!(change("/layers/0/digest", json!("md5:0")), ErrorKind::Corrupt);
        assert_eq!(change("/layers/0/size", json!(u64::MAX)), ErrorKind::Exhausted);
        assert_eq!(change("/layers", json!(vec![descriptor(LAYER_TYPES[0], b"l"); 513])), ErrorKind::Exhausted);
        assert_eq!(change("/layers", json!(null)), ErrorKind::Corrupt);
    }

    #[test]
    fn configurations_fit_platform_and_manifest() {
        let config = |architecture: &str| {
            json!({"architecture": architecture, "os": "linux", "config": {"Entrypoint": null, "Cmd": ["sh"], "Labels": null},
                "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"l")]}}).to_string()
        };
        let (parsed, ids) = parse_config(config("amd64").as_bytes(), 1, "test").unwrap();
        assert_eq!(ids, [Digest::of(b"l")]);
        assert_eq!(parsed.config().as_ref().unwrap().cmd().as_deref(), Some(&["sh".to_owned()][..]));
        assert_eq!(parse_config(config("amd64").as_bytes(), 2, "test").unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(parse_config(config("arm64").as_bytes(), 1, "test").unwrap_err().kind(), ErrorKind::Refused);
        assert_eq!(parse_config(b"{", 1, "test").unwrap_err().kind(), ErrorKind::Corrupt);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_manifest_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(parse(&bytes, Some(OCI_MANIFEST), &Limits::default(), "test").is_err());
        }
    }
}
