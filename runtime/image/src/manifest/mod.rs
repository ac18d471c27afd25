//! Manifests, indexes and configurations: what they say, checked before anything is fetched on their word.
//!
//! They are read as leniently as other clients read them: of the few fields that are used, and one entry of an index
//! that makes no sense spoils no other.

mod config;
mod lenient;
mod platform;

use serde_json::Value;

pub use config::ImageConfig;
pub(crate) use config::{is_ours, parse_config};

use self::lenient::Fields;
use self::platform::Platform;
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

const LAYER_TYPES: [&str; 12] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd",
];

/// Points to content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

impl Descriptor {
    fn of(value: &Value) -> Result<Self, String> {
        let fields = Fields::of(value)?;
        let digest = fields.text("digest")?.parse::<Digest>().map_err(|error| error.to_string())?;
        let size = fields.get("size").and_then(Value::as_u64).ok_or("the size is not a number of bytes")?;
        Ok(Self { media_type: fields.text("mediaType")?, digest, size })
    }
}

/// An image among those that an index offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) digest: Digest,
    /// Whether the index says that it is for this host; else its configuration does.
    pub(crate) chosen: bool,
}

/// What a tag or digest leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Document {
    /// One image.
    Image { config: Descriptor, layers: Vec<Descriptor> },
    /// Images for several platforms: those that may be for here, the best first, never none.
    Index { candidates: Vec<Candidate> },
}

/// Reads a manifest or index; `what` is its name for messages, `content_type` what the registry called it.
pub(crate) fn parse(bytes: &[u8], content_type: Option<&str>, limits: &Limits, what: &str) -> Result<Document> {
    let corrupt =
        |reason: String| Error::corrupt(format!("manifest of {what}"), format!("it cannot be read: {reason}"));
    let document: Value = serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))?;
    let fields = Fields::of(&document).map_err(corrupt)?;
    let version = fields.get("schemaVersion").map_or(Some(2), Value::as_u64);
    if version != Some(2) || fields.get("fsLayers").is_some() {
        let version = fields.get("schemaVersion").cloned().unwrap_or_default();
        let reason = format!("its manifest has version {version}, only version 2 is supported; push it again");
        return Err(Error::refused(what, reason));
    }
    // The type within is covered by the digest, the header is not.
    let named = fields.text("mediaType").map_err(corrupt)?;
    let media_type = if named.is_empty() { content_type.unwrap_or_default() } else { &named };
    let is_index = match media_type {
        OCI_INDEX | DOCKER_LIST => true,
        OCI_MANIFEST | DOCKER_MANIFEST => false,
        // Older tools left the type out, and a plain web server does not know it.
        _ if named.is_empty() => fields.get("manifests").is_some(),
        other => return Err(Error::refused(what, format!("its manifest is of the unsupported type {other:?}"))),
    };
    let has = |name: &str| fields.get(name).is_some();
    // What is both may be taken for either, and means another image to whoever takes it for the other.
    match (is_index, has("manifests"), has("config"), has("layers")) {
        (true, _, false, false) => {
            let entries = fields.list("manifests").map_err(corrupt)?;
            Ok(Document::Index { candidates: choose(entries, what)? })
        }
        (false, false, true, _) => {
            let config = Descriptor::of(fields.get("config").unwrap_or(&Value::Null)).map_err(corrupt)?;
            let layers = fields.list("layers").map_err(corrupt)?.iter().map(Descriptor::of);
            let layers = layers.collect::<Result<Vec<_>, _>>().map_err(corrupt)?;
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

/// The images that may be for linux/amd64: those that the index calls so, the baseline first, then those of which it
/// says nothing.
fn choose(entries: &[Value], what: &str) -> Result<Vec<Candidate>> {
    let mut offered: Vec<String> = Vec::new();
    let mut candidates: Vec<(u8, Candidate)> = Vec::new();
    let mut unread = None;
    for entry in entries {
        match candidate(entry) {
            Ok((platform, Some(candidate))) => {
                candidates.push((platform.map_or(u8::MAX, |platform| platform.rank()), candidate))
            }
            Ok((platform, None)) => offered.extend(platform.map(|platform| platform.to_string())),
            Err(reason) => unread = Some(reason),
        }
    }
    candidates.sort_by_key(|(rank, _)| *rank);
    if candidates.is_empty() {
        offered.dedup();
        offered.truncate(20);
        let unread = unread.map(|reason| format!("; of an entry, {reason}")).unwrap_or_default();
        let reason = format!("it is not built for linux/amd64, only for [{}]{unread}", offered.join(", "));
        return Err(Error::refused(what, reason));
    }
    Ok(candidates.into_iter().map(|(_, candidate)| candidate).collect())
}

/// What an entry of an index is for, if it says so, and the entry, if that may be this host.
fn candidate(entry: &Value) -> Result<(Option<Platform>, Option<Candidate>), String> {
    let platform = Fields::of(entry)?.get("platform").map(Platform::read).transpose()?;
    if platform.as_ref().is_some_and(|platform| !platform.is_ours()) {
        return Ok((platform, None));
    }
    let Descriptor { media_type, digest, .. } = Descriptor::of(entry)?;
    let known = matches!(media_type.as_str(), "" | OCI_INDEX | OCI_MANIFEST | DOCKER_LIST | DOCKER_MANIFEST);
    let candidate = Candidate { digest, chosen: platform.is_some() };
    Ok((platform, known.then_some(candidate)))
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
        assert!(
            matches!(parsed(&index), Ok(Document::Index { candidates }) if candidates[0].digest == Digest::of(b"4"))
        );
        let foreign = json!({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [platform("linux", "arm64", "v8", b"1")]});
        let error = parsed(&foreign).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("linux/arm64"), "{error}");
        let bare = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor(OCI_MANIFEST, b"5")]});
        assert!(
            matches!(parsed(&bare), Ok(Document::Index { candidates }) if candidates[0].digest == Digest::of(b"5"))
        );
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
        assert_eq!(change("/layers", json!("none")), ErrorKind::Corrupt);
        assert_eq!(change("/config", json!(null)), ErrorKind::Corrupt);
    }

    /// As Go reads them.
    #[test]
    fn odd_manifests_are_read() {
        let mut bare = image();
        bare["layers"] = json!(null);
        bare["schemaVersion"].take();
        bare["annotations"] = json!("nonsense");
        assert!(matches!(parsed(&bare), Ok(Document::Image { layers, .. }) if layers.is_empty()));
        bare.as_object_mut().unwrap().remove("layers");
        assert!(matches!(parsed(&bare), Ok(Document::Image { .. })));
        let upper = json!({"SchemaVersion": 2, "Config": descriptor(CONFIG_TYPES[0], b"c"), "Layers": []});
        assert!(matches!(parsed(&upper), Ok(Document::Image { .. })));
        let mut foreign = image();
        foreign["layers"][0]["mediaType"] = json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip");
        assert!(matches!(parsed(&foreign), Ok(Document::Image { .. })));
        let mut both = image();
        both["manifests"] = json!([]);
        assert_eq!(parsed(&both).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn an_odd_entry_spoils_no_index() {
        let mut nowhere = descriptor(OCI_MANIFEST, b"nowhere");
        nowhere["platform"] = json!({});
        let mut strange = descriptor(OCI_MANIFEST, b"strange");
        strange["digest"] = json!("md5:0");
        strange["platform"] = json!({"os": "linux", "architecture": "amd64"});
        let mut alias = descriptor(OCI_MANIFEST, b"alias");
        alias["platform"] = json!({"os": "Linux", "architecture": "x86_64"});
        let attestation = descriptor("application/vnd.in-toto+json", b"attestation");
        let silent = descriptor(OCI_INDEX, b"silent");
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
            silent, nowhere, strange, 7, null, attestation, {"platform": {"os": 3}}, alias,
        ]});
        let Ok(Document::Index { candidates }) = parsed(&index) else { panic!("{:?}", parsed(&index)) };
        let expected = [(Digest::of(b"alias"), true), (Digest::of(b"silent"), false)];
        assert_eq!(candidates.iter().map(|c| (c.digest, c.chosen)).collect::<Vec<_>>(), expected);
        for empty in [json!({"mediaType": OCI_INDEX}), json!({"mediaType": OCI_INDEX, "manifests": null})] {
            assert_eq!(parsed(&empty).unwrap_err().kind(), ErrorKind::Refused);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_manifest_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(parse(&bytes, Some(OCI_MANIFEST), &Limits::default(), "test").is_err());
        }
    }
}
