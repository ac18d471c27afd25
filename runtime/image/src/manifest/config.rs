//! The configuration of an image: the few fields that are used here.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};
use serde_json::Value;

use super::lenient::Fields;
use super::platform::Platform;
use crate::digest::Digest;
use crate::error::{Error, Result};

/// What an image says about itself and its processes. Serialises to the whole document that it was read from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImageConfig {
    /// Start of the command line.
    pub entrypoint: Vec<String>,
    /// Rest of the command line.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Working directory; empty if the image names none.
    pub working_dir: String,
    /// `name`, `uid`, `name:group` or `uid:gid`; empty if the image names none.
    pub user: String,
    /// Signal that asks a process to end; empty if the image names none.
    pub stop_signal: String,
    /// Directories for data of their own, as the image spells them, sorted.
    pub volumes: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    platform: Platform,
    /// Digests of the uncompressed archives of its layers, as spelt.
    diff_ids: Vec<String>,
    document: Value,
}

impl ImageConfig {
    /// Reads a configuration as leniently as other clients do; the error says what in it cannot be read.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let document: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let top = Fields::of(&document)?;
        let config = top.object("config")?;
        let labels = config.object("Labels")?;
        let labels = labels.names().map(|name| Ok((name.clone(), labels.text(name)?)));
        Ok(Self {
            entrypoint: config.texts("Entrypoint")?,
            cmd: config.texts("Cmd")?,
            env: config.texts("Env")?,
            working_dir: config.text("WorkingDir")?,
            user: config.text("User")?,
            stop_signal: config.text("StopSignal")?,
            volumes: config.object("Volumes")?.names().cloned().collect(),
            labels: labels.collect::<Result<_, String>>()?,
            platform: Platform::of(&top)?,
            diff_ids: top.object("rootfs")?.texts("diff_ids")?,
            document,
        })
    }
}

impl Serialize for ImageConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.document.serialize(serializer)
    }
}

/// Reads an image configuration and checks that it fits the manifest's `layers`, and this host unless `chosen` says
/// that an index did. Gives the layers' uncompressed digests.
///
/// # Errors
/// [`Error::Corrupt`] if it makes no sense or does not fit, [`Error::Refused`] if it is for another platform.
pub(crate) fn parse_config(
    bytes: &[u8],
    layers: usize,
    chosen: bool,
    what: &str,
) -> Result<(ImageConfig, Vec<Digest>)> {
    let corrupt = |reason: String| Error::corrupt(format!("configuration of {what}"), reason);
    let config = ImageConfig::parse(bytes).map_err(|error| corrupt(format!("it cannot be read: {error}")))?;
    if !chosen && config.platform.is_foreign() {
        return Err(Error::refused(what, format!("it is built for {}, not for linux/amd64", config.platform)));
    }
    let diff_ids = config.diff_ids.iter().map(|id| id.parse::<Digest>());
    let diff_ids = diff_ids.collect::<Result<Vec<_>, _>>().map_err(|error| corrupt(error.to_string()))?;
    if diff_ids.len() != layers {
        return Err(corrupt(format!("it describes {} layers, the manifest {layers}", diff_ids.len())));
    }
    Ok((config, diff_ids))
}

/// Whether a configuration names this host's platform: for one among several of which nobody else says.
pub(crate) fn is_ours(bytes: &[u8]) -> bool {
    ImageConfig::parse(bytes).is_ok_and(|config| config.platform.is_ours())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use serde_json::json;

    fn config(architecture: &Value) -> Vec<u8> {
        json!({"architecture": architecture, "os": "linux",
            "config": {"Entrypoint": null, "Cmd": ["sh"], "Labels": null, "User": "7:8"},
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"l")]}})
        .to_string()
        .into_bytes()
    }

    #[test]
    fn configurations_fit_platform_and_manifest() {
        let (parsed, ids) = parse_config(&config(&json!("amd64")), 1, false, "test").unwrap();
        assert_eq!(ids, [Digest::of(b"l")]);
        assert_eq!((parsed.cmd, parsed.user), (vec!["sh".to_owned()], "7:8".to_owned()));
        let kind =
            |bytes: &[u8], layers, chosen| parse_config(bytes, layers, chosen, "test").map_err(|error| error.kind());
        assert_eq!(kind(&config(&json!("amd64")), 2, false).unwrap_err(), ErrorKind::Corrupt);
        assert_eq!(kind(&config(&json!("arm64")), 1, false).unwrap_err(), ErrorKind::Refused);
        assert_eq!(kind(b"{", 1, false).unwrap_err(), ErrorKind::Corrupt);
        // What an index has chosen, and what says nothing.
        assert!(kind(&config(&json!("arm64")), 1, true).is_ok());
        for silent in [json!(null), json!(""), json!("unknown"), json!("x86_64"), json!("AMD64")] {
            assert!(kind(&config(&silent), 1, false).is_ok(), "{silent}");
        }
    }

    /// Each of these is read by Go's clients, some of them as an image without layers.
    #[test]
    fn odd_configurations_are_read() {
        for value in [
            json!({}),
            json!({"config": null, "rootfs": null}),
            json!({"rootfs": {"type": null, "diff_ids": null}}),
            json!({"config": {"Env": null, "Entrypoint": "", "Cmd": null}, "rootfs": {"diff_ids": []}}),
            json!({"config": {"ExposedPorts": {"1/tcp": null}, "Healthcheck": "nonsense", "OnBuild": 3}, "history": null}),
            json!({"created": "not a time", "os.features": [null]}),
        ] {
            let (config, ids) = parse_config(value.to_string().as_bytes(), 0, false, "test").unwrap();
            assert_eq!((config.cmd, ids), (Vec::<String>::new(), Vec::new()), "{value}");
        }
        let value = json!({"Config": {"volumes": {"/d": null, "/c": {}}, "LABELS": {"a": null, "b": "c"}, "cmd": [null],
            "Entrypoint": "alone"}});
        let config = ImageConfig::parse(value.to_string().as_bytes()).unwrap();
        assert_eq!(config.volumes, ["/c", "/d"]);
        assert_eq!(
            config.labels.into_iter().collect::<Vec<_>>(),
            [("a".into(), String::new()), ("b".into(), "c".into())]
        );
        assert_eq!((config.cmd, config.entrypoint), (vec![String::new()], vec!["alone".to_owned()]));
        for bad in
            [json!([]), json!({"config": "x"}), json!({"config": {"Cmd": [1]}}), json!({"rootfs": {"diff_ids": 1}})]
        {
            assert!(ImageConfig::parse(bad.to_string().as_bytes()).is_err(), "{bad}");
        }
    }
}
