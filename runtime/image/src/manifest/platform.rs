//! Platforms as images name them, in the spellings that other clients understand.

use serde_json::Value;

use super::lenient::Fields;

/// What something is built for; a part that nobody named is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Platform {
    pub(crate) os: String,
    pub(crate) architecture: String,
    variant: String,
}

impl Platform {
    pub(super) fn of(fields: &Fields<'_>) -> Result<Self, String> {
        let architecture = fields.text("architecture")?.to_ascii_lowercase();
        let architecture = match architecture.as_str() {
            "x86_64" | "x86-64" => "amd64".to_owned(),
            "i386" | "i486" | "i586" | "i686" | "x86" => "386".to_owned(),
            "aarch64" => "arm64".to_owned(),
            _ => architecture,
        };
        let os = fields.text("os")?.to_ascii_lowercase();
        Ok(Self { os, architecture, variant: fields.text("variant")?.to_ascii_lowercase() })
    }

    pub(super) fn read(value: &Value) -> Result<Self, String> {
        Self::of(&Fields::of(value)?)
    }

    /// Whether it is this host's.
    pub(super) fn is_ours(&self) -> bool {
        // Whoever leaves the system out means the one that containers come from.
        matches!(self.os.as_str(), "linux" | "") && self.architecture == "amd64"
    }

    /// Whether it is another's than this host's, for certain.
    pub(super) fn is_foreign(&self) -> bool {
        let other = |named: &str, ours: &str| !matches!(named, "" | "unknown") && named != ours;
        other(&self.os, "linux") || other(&self.architecture, "amd64")
    }

    /// By what instructions it wants beyond the baseline: the fewer, the better.
    pub(super) fn rank(&self) -> u8 {
        match self.variant.as_str() {
            "" | "v1" => 0,
            "v2" => 1,
            "v3" => 2,
            _ => 3,
        }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named = |part: &str| if part.is_empty() { "?".to_owned() } else { part.to_owned() };
        write!(f, "{}/{}", named(&self.os), named(&self.architecture))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn spellings_are_one_platform() {
        for value in [
            json!({"os": "linux", "architecture": "amd64"}),
            json!({"os": "Linux", "architecture": "x86_64"}),
            json!({"OS": "linux", "Architecture": "AMD64"}),
            json!({"architecture": "x86-64"}),
        ] {
            let platform = Platform::read(&value).unwrap();
            assert!(platform.is_ours() && !platform.is_foreign(), "{value}");
        }
        for value in [
            json!({"os": "windows", "architecture": "amd64"}),
            json!({"os": "linux", "architecture": "arm64"}),
            json!({"os": "linux", "architecture": "i386"}),
        ] {
            let platform = Platform::read(&value).unwrap();
            assert!(!platform.is_ours() && platform.is_foreign(), "{value}");
        }
        for value in [json!({}), json!(null), json!({"os": "unknown", "architecture": "unknown"}), json!({"os": null})]
        {
            let platform = Platform::read(&value).unwrap();
            assert!(!platform.is_ours() && !platform.is_foreign(), "{value}");
        }
    }
}
