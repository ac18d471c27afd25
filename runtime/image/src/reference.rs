//! Image references: `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`, with the defaults every client knows.
//!
//! `busybox` means `docker.io/library/busybox:latest`. The first component is a host if it holds a dot, a colon or a
//! capital, or is `localhost`. A reference with both a tag and a digest is the digest's: the tag is dropped, because
//! nothing says that the tag means this digest.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;
use crate::error::Error;

const DEFAULT_HOST: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// A normalised reference: always with its host, and with a tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    host: String,
    path: String,
    target: Target,
}

/// Which image of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// Whatever the registry's tag means at the time.
    Tag(String),
    /// The manifest or index with this digest.
    Digest(Digest),
}

impl Reference {
    /// Host and optional port, as in the reference (`docker.io`, not where that is served).
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository's path on its host.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Tag or digest.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Host and path, without tag or digest.
    #[must_use]
    pub fn repository(&self) -> String {
        format!("{}/{}", self.host, self.path)
    }

    /// The same repository's image `digest`.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { target: Target::Digest(digest), ..self.clone() }
    }

    /// The tag or the digest, as the registry's API wants it.
    #[must_use]
    pub fn target_name(&self) -> String {
        match &self.target {
            Target::Tag(tag) => tag.clone(),
            Target::Digest(digest) => digest.to_string(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = match self.target {
            Target::Tag(_) => ':',
            Target::Digest(_) => '@',
        };
        write!(f, "{}/{}{separator}{}", self.host, self.path, self.target_name())
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map_err(|reason| Error::InvalidReference {
            reference: text.chars().take(512).collect(),
            reason: reason.to_owned(),
        })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if Digest::from_hex(text).is_ok() {
        return Err("64 hexadecimal digits are an image id, not a name");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            (rest, Some(digest.parse::<Digest>().map_err(|_| "the digest is not sha256: and 64 hexadecimal digits")?))
        }
        None => (text, None),
    };
    // A colon after the last slash starts a tag; one before it belongs to the port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (host, path) = match name.split_once('/') {
        Some((first, rest)) if is_host(first) => (first, rest.to_owned()),
        _ => (DEFAULT_HOST, name.to_owned()),
    };
    check_host(host)?;
    let (host, path) = match host {
        DEFAULT_HOST | "index.docker.io" if !path.contains('/') => (DEFAULT_HOST, format!("library/{path}")),
        "index.docker.io" => (DEFAULT_HOST, path),
        _ => (host, path),
    };
    if host.len() + 1 + path.len() > MAX_NAME {
        return Err("the name is longer than 255 characters");
    }
    if !path.split('/').all(is_path_component) {
        return Err(
            "each part of the path must be lower case letters and digits, joined by one dot, one or two underscores, or dashes",
        );
    }
    let target = match digest {
        Some(digest) => Target::Digest(digest),
        None => Target::Tag(tag.unwrap_or(DEFAULT_TAG).to_owned()),
    };
    Ok(Reference { host: host.to_owned(), path, target })
}

fn is_host(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':']) || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn check_host(host: &str) -> Result<(), &'static str> {
    let (name, port) = if let Some(bracketed) = host.strip_prefix('[') {
        let (address, port) = bracketed.split_once(']').ok_or("the address of the host lacks its closing bracket")?;
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return Err("the host in brackets is not an IPv6 address");
        }
        match port {
            "" => return Ok(()),
            port => ("", port.strip_prefix(':').ok_or("the host's port must follow a colon")?),
        }
    } else {
        match host.split_once(':') {
            Some((name, port)) => (name, port),
            None => (host, "443"),
        }
    };
    if !port.bytes().all(|b| b.is_ascii_digit()) || !port.parse::<u16>().is_ok_and(|port| port > 0) {
        return Err("the host's port is not a number from 1 to 65535");
    }
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if host.starts_with('[') || name.split('.').all(label) { Ok(()) } else { Err("the host is not a valid name") }
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let mut bytes = tag.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !first || tag.len() > MAX_TAG || !bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-')) {
        return Err(
            "the tag must be 1 to 128 letters, digits, underscores, dots and dashes, not starting with a dot or a dash",
        );
    }
    Ok(())
}

/// Alphanumeric runs joined by `.`, `_`, `__` or any number of `-`.
fn is_path_component(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    component
        .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|run| matches!(run, "" | "." | "_" | "__") || run.bytes().all(|b| b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn familiar_names_get_their_defaults() {
        let with_digest = format!("registry.k8s.io/pause:3.9@{DIGEST}");
        let normalised = format!("registry.k8s.io/pause@{DIGEST}");
        for (given, expected) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/user/app:v1", "docker.io/user/app:v1"),
            ("user/app", "docker.io/user/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/a/b/c:x", "localhost:5000/a/b/c:x"),
            ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
            ("[::1]:5000/app:2", "[::1]:5000/app:2"),
            ("Registry/app", "Registry/app:latest"),
            ("a.b/c__d/e---f.g:T_1", "a.b/c__d/e---f.g:T_1"),
            (with_digest.as_str(), normalised.as_str()),
        ] {
            assert_eq!(given.parse::<Reference>().map(|r| r.to_string()).as_deref().ok(), Some(expected), "{given}");
        }
    }

    #[test]
    fn malformed_references_are_refused() {
        let long = format!("a.b/{}", "x".repeat(252));
        for bad in [
            "",
            ":",
            "@",
            "/",
            "a/",
            "/a",
            "a//b",
            "UPPER",
            "a.b/Upper",
            "a:",
            "a:-x",
            "a:.x",
            "a b",
            "a@sha256:12",
            "a@md5:00",
            "a___b",
            "a..b",
            "-a",
            "a-",
            "a_",
            "_a",
            "localhost:/a",
            "localhost:0/a",
            "localhost:65536/a",
            "localhost:+1/a",
            "-x.y/a",
            "x..y/a",
            "[::1/a",
            "[zz]/a",
            "[::1]5000/a",
            "a/../b",
            "a\0b",
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            long.as_str(),
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_not_and_the_normal_form_is_stable(text in "[a-zA-Z0-9:/@._\\[\\]-]{0,40}|\\PC{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let again: Reference = reference.to_string().parse().expect("a normal form parses");
                prop_assert_eq!(again, reference);
            }
        }
    }
}
