//! One network's configuration: a list of plugins (specification, section 1).

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::plugin::is_plain;
use crate::{Error, Result};

/// A version of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Version {
    /// 0.3.0: results have interfaces.
    #[serde(rename = "0.3.0")]
    V0_3_0,
    /// 0.3.1.
    #[serde(rename = "0.3.1")]
    V0_3_1,
    /// 0.4.0: CHECK, and DEL knows the result.
    #[serde(rename = "0.4.0")]
    V0_4_0,
    /// 1.0.0.
    #[serde(rename = "1.0.0")]
    V1_0_0,
    /// 1.1.0: GC and STATUS.
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    /// All, oldest first, as they are written.
    pub const ALL: [(&'static str, Self); 5] = [
        ("0.3.0", Self::V0_3_0),
        ("0.3.1", Self::V0_3_1),
        ("0.4.0", Self::V0_4_0),
        ("1.0.0", Self::V1_0_0),
        ("1.1.0", Self::V1_1_0),
    ];

    /// The version of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, version)| *version)
    }

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, version)| *version == self).map_or("", |(name, _)| name)
    }
}

/// A network and how a pod joins it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetworkList {
    /// The network's name.
    pub name: String,
    /// The version that its plugins are spoken to in.
    pub version: Version,
    /// Whether CHECK is known to be wrong.
    pub disable_check: bool,
    /// Whether others have attachments to it too, so that GC would take theirs away.
    #[serde(default)]
    pub disable_gc: bool,
    /// The plugins' configurations, in order.
    pub plugins: Vec<Map<String, Value>>,
    /// The file it comes from.
    pub source: PathBuf,
}

impl NetworkList {
    /// Reads a list, or a single plugin's configuration, which is a list of one.
    ///
    /// # Errors
    /// The text is no such configuration: what is wrong, and the file.
    pub fn parse(source: &Path, text: &[u8]) -> Result<Self> {
        parse(source, text).map_err(|reason| Error::Configuration { path: source.into(), reason })
    }

    /// Looks at what plugins and their programs are chosen by.
    ///
    /// # Errors
    /// What is wrong, with the field.
    pub fn validate(&self) -> std::result::Result<(), String> {
        let (name, first) = (&self.name, |byte: u8| byte.is_ascii_alphanumeric());
        if !name.bytes().next().is_some_and(first) || !name.bytes().all(|byte| first(byte) || b"_.-".contains(&byte)) {
            return Err(format!(
                "name: {name:?} must be letters, digits, '_', '.' and '-', and start with one of the first"
            ));
        }
        if self.plugins.is_empty() {
            return Err("plugins: is empty".into());
        }
        match self.plugins.iter().position(|plugin| !is_plain(Self::kind(plugin))) {
            Some(index) => Err(format!("plugins[{index}].type: must be the name of a plugin's program")),
            None => Ok(()),
        }
    }

    /// The `type` of a plugin: the name of its program.
    #[must_use]
    pub fn kind(plugin: &Map<String, Value>) -> &str {
        plugin.get("type").and_then(Value::as_str).unwrap_or_default()
    }
}

fn parse(source: &Path, text: &[u8]) -> std::result::Result<NetworkList, String> {
    let value: Value = serde_json::from_slice(text).map_err(|error| format!("is no JSON ({error})"))?;
    let Value::Object(mut object) = value else { return Err("is no JSON object".into()) };
    let name = match object.get("name") {
        Some(Value::String(name)) => name.clone(),
        _ => return Err("name: is missing, or no string".into()),
    };
    let version = version(&object)?;
    let disable_check = flag(&object, "disableCheck")?;
    let disable_gc = flag(&object, "disableGC")?;
    let plugins = match object.remove("plugins") {
        Some(Value::Array(plugins)) => plugins
            .into_iter()
            .enumerate()
            .map(|(index, plugin)| match plugin {
                Value::Object(plugin) => Ok(plugin),
                _ => Err(format!("plugins[{index}]: is no JSON object")),
            })
            .collect::<std::result::Result<Vec<_>, _>>()?,
        Some(_) => return Err("plugins: is no list".into()),
        None => vec![object],
    };
    let list = NetworkList { name, version, disable_check, disable_gc, plugins, source: source.into() };
    list.validate()?;
    Ok(list)
}

/// The highest version that both the configuration and we know.
fn version(object: &Map<String, Value>) -> std::result::Result<Version, String> {
    let mut named = Vec::new();
    match object.get("cniVersion") {
        Some(Value::String(name)) => named.push(name.as_str()),
        Some(_) => return Err("cniVersion: is no string".into()),
        None => {}
    }
    match object.get("cniVersions") {
        Some(Value::Array(names)) => named.extend(names.iter().filter_map(Value::as_str)),
        Some(_) => return Err("cniVersions: is no list".into()),
        None => {}
    }
    named.iter().filter_map(|name| Version::named(name)).max().ok_or_else(|| {
        let known = Version::ALL.map(|(name, _)| name).join(", ");
        let asked = if named.is_empty() { "none".into() } else { named.join(", ") };
        format!("cniVersion: {asked} is not supported: use one of {known}")
    })
}

/// A boolean, which earlier versions of the specification write as a string.
fn flag(object: &Map<String, Value>, key: &str) -> std::result::Result<bool, String> {
    match object.get(key) {
        None => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(Value::String(text)) if text == "true" => Ok(true),
        Some(Value::String(text)) if text == "false" => Ok(false),
        Some(_) => Err(format!("{key}: must be true or false")),
    }
}
