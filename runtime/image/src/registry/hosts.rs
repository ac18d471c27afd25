//! `hosts.toml`: where a registry is served, in the form that containerd's users write.
//!
//! ```toml
//! server = "https://registry.example.org"        # asked last; the registry's own address if left out
//!
//! [host."https://mirror.example.org:5000"]       # asked in the order of the file
//!   capabilities = ["pull", "resolve"]           # all, if left out
//!   ca = "mirror.crt"                            # or a list; relative to this file
//!   client = [["client.cert", "client.key"]]     # or one file with both
//!   skip_verify = false
//!   override_path = false
//!   dial_timeout = "5s"
//!   [host."https://mirror.example.org:5000".header]
//!     x-key = "value"                            # or a list
//! ```
//!
//! The same settings at the top are those of the server. A key that is not known is skipped with a warning, because
//! such a file may be shared with a runtime that knows it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::endpoint::{Endpoint, default_endpoint};

/// Longest time a connection may be given.
const MAX_DIAL_TIMEOUT: f64 = 3600.0;

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    server: String,
    #[serde(default)]
    host: toml::Table,
    #[serde(flatten)]
    settings: toml::Table,
}

#[derive(Deserialize)]
struct Settings {
    #[serde(default)]
    capabilities: Vec<String>,
    #[serde(default)]
    ca: OneOrMany,
    client: Option<Client>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    header: toml::Table,
    #[serde(default)]
    override_path: bool,
    #[serde(default)]
    dial_timeout: String,
    #[serde(flatten)]
    unknown: toml::Table,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Default for OneOrMany {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Client {
    File(String),
    Files(Vec<ClientFiles>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ClientFiles {
    Both(String),
    Pair([String; 2]),
}

/// The endpoints that `text`, a `hosts.toml` in `directory`, gives to the registry `host`: the mirrors in their order,
/// then the server. Certificates are read.
///
/// # Errors
/// Says which key is wrong, and how.
pub(super) fn parse(text: &str, directory: &Path, host: &str) -> Result<Vec<Endpoint>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
    let mut endpoints = Vec::new();
    for (url, settings) in file.host {
        let key = format!("host.{url:?}");
        let toml::Value::Table(settings) = settings else { return Err(format!("{key} is not a table")) };
        endpoints.push(endpoint(&key, at(&url), settings, directory)?);
    }
    let server = if file.server.is_empty() { default_endpoint(host) } else { at(&file.server) };
    endpoints.push(endpoint("server", server, file.settings, directory)?);
    Ok(endpoints)
}

/// The server that a URL names, HTTPS if it does not say. Who writes `http://` here means it.
fn at(url: &str) -> Endpoint {
    let url = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
    Endpoint { plain_http: true, ..Endpoint::new(url) }
}

fn endpoint(key: &str, server: Endpoint, settings: toml::Table, directory: &Path) -> Result<Endpoint, String> {
    let wrong = |name: &str, problem: String| format!("{key}: {name}: {problem}");
    let settings: Settings = toml::Value::Table(settings)
        .try_into()
        .map_err(|error: toml::de::Error| format!("{key}: {}", error.to_string().trim_end()))?;
    for unknown in settings.unknown.keys() {
        tracing::warn!(directory = %directory.display(), "{key}: {unknown:?} in hosts.toml is not known, and skipped");
    }
    let (mut resolve, mut pull) = (settings.capabilities.is_empty(), settings.capabilities.is_empty());
    for capability in &settings.capabilities {
        match capability.to_ascii_lowercase().as_str() {
            "resolve" => resolve = true,
            "pull" => pull = true,
            "push" | "referrers" => {}
            _ => return Err(wrong("capabilities", format!("{capability:?} is not pull, resolve, push or referrers"))),
        }
    }
    let mut authorities = Vec::new();
    for path in settings.ca.into_vec() {
        authorities.push(certificate(&directory.join(path)).map_err(|problem| wrong("ca", problem))?);
    }
    let pairs = match settings.client {
        None => Vec::new(),
        Some(Client::File(file)) => vec![ClientFiles::Both(file)],
        Some(Client::Files(files)) => files,
    };
    let mut identity = None;
    for pair in pairs {
        let paths = match pair {
            ClientFiles::Both(file) => vec![directory.join(file)],
            ClientFiles::Pair(pair) => pair.iter().map(|file| directory.join(file)).collect(),
        };
        let pem = client(&paths).map_err(|problem| wrong("client", problem))?;
        if identity.replace(pem).is_some() {
            return Err(wrong("client", "more than one certificate is not supported: keep the one to show".to_owned()));
        }
    }
    let mut headers = Vec::new();
    for (name, value) in settings.header {
        let values: OneOrMany =
            value.try_into().map_err(|_| wrong("header", format!("{name:?} is neither text nor a list of texts")))?;
        headers.extend(values.into_vec().into_iter().map(|value| (name.clone(), value)));
    }
    let connect_timeout = match settings.dial_timeout.as_str() {
        "" => None,
        text => Some(parse_duration(text).ok_or_else(|| {
            wrong("dial_timeout", format!("{text:?} is not a time from 1ms to 1h such as \"500ms\", \"5s\" or \"1m\""))
        })?),
    };
    Ok(Endpoint {
        authorities,
        identity,
        skip_verify: settings.skip_verify,
        headers,
        override_path: settings.override_path,
        resolve,
        pull,
        connect_timeout,
        ..server
    })
}

/// A directory without `hosts.toml`, in the form of Docker's users: `*.crt` are authorities of the registry, `*.cert`
/// with `*.key` shows who we are.
///
/// # Errors
/// Says which file is wrong.
pub(super) fn certificates(directory: &Path, host: &str) -> Result<Vec<Endpoint>, String> {
    let mut endpoint = default_endpoint(host);
    let unreadable = |error: std::io::Error| format!("cannot be read: {error}");
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(unreadable)? {
        files.push(entry.map_err(unreadable)?.path());
    }
    files.sort();
    for path in files {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => endpoint.authorities.push(certificate(&path)?),
            Some("cert") => {
                let key = path.with_extension("key");
                let paths = if key.exists() { vec![path, key] } else { vec![path] };
                if endpoint.identity.replace(client(&paths)?).is_some() {
                    return Err("more than one .cert file: keep the one to show".to_owned());
                }
            }
            _ => {}
        }
    }
    // Who keeps certificates for a registry on loopback serves it over TLS.
    endpoint.plain_fallback &= endpoint.authorities.is_empty() && endpoint.identity.is_none();
    Ok(vec![endpoint])
}

fn certificate(path: &Path) -> Result<Vec<u8>, String> {
    let pem = std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    match reqwest::Certificate::from_pem_bundle(&pem) {
        Ok(found) if !found.is_empty() => Ok(pem),
        _ => Err(format!("{} holds no certificate in PEM form", path.display())),
    }
}

/// Certificate and key from these files, one after the other.
fn client(paths: &[PathBuf]) -> Result<Vec<u8>, String> {
    let mut pem = Vec::new();
    for path in paths {
        pem.extend(std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?);
        pem.push(b'\n');
    }
    let names = || paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" and ");
    match reqwest::Identity::from_pem(&pem) {
        Ok(_) => Ok(pem),
        Err(_) => Err(format!("{} hold no certificate with its private key in PEM form", names())),
    }
}

/// A time from 1 ms to 1 h such as `1m30s`, `500ms` or `1.5s`, as Go writes it; none if it is no such.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let factor = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * factor;
        rest = tail;
    }
    (0.001..=MAX_DIAL_TIMEOUT).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Result<Vec<Endpoint>, String> {
        parse(text, Path::new("/nowhere"), "registry.test")
    }

    #[test]
    fn mirrors_keep_their_order_and_the_server_is_last() {
        let endpoints = parsed(
            r#"
            server = "https://registry.test"
            [host."https://z.test/path"]
              capabilities = ["pull"]
              override_path = true
              skip_verify = true
              dial_timeout = "1m1.5s"
            [host."http://a.test:5000"]
              capabilities = ["Pull", "resolve", "push"]
            [host."http://a.test:5000".header]
              x-one = "1"
              x-two = ["2", "3"]
            [host."m.test"]
            "#,
        )
        .unwrap();
        let urls: Vec<_> = endpoints.iter().map(|endpoint| endpoint.url.as_str()).collect();
        assert_eq!(urls, ["https://z.test/path", "http://a.test:5000", "https://m.test", "https://registry.test"]);
        let [z, a, m, server] = &endpoints[..] else { panic!() };
        assert!(z.pull && !z.resolve && z.override_path && z.skip_verify);
        assert_eq!(z.connect_timeout, Some(Duration::from_millis(61_500)));
        assert!(a.pull && a.resolve && a.plain_http && a.base().is_ok());
        assert_eq!(a.headers.len(), 3);
        assert!(a.headers.contains(&("x-two".to_owned(), "3".to_owned())));
        assert!(m.pull && m.resolve);
        assert!(server.pull && server.resolve && server.headers.is_empty());
    }

    #[test]
    fn the_server_is_the_registry_itself_unless_named() {
        for text in ["", "[host.\"http://m.test\"]\n", "capabilities = [\"pull\"]"] {
            let endpoints = parsed(text).unwrap();
            assert_eq!(endpoints.last().unwrap().url, "https://registry.test", "{text}");
        }
        let top = parsed("server = \"http://other.test\"\ncapabilities = [\"pull\"]\nskip_verify = true").unwrap();
        let [server] = &top[..] else { panic!() };
        assert!(server.url == "http://other.test" && server.skip_verify && !server.resolve && server.base().is_ok());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("server =", "TOML"),
            ("server = 5", "server"),
            ("[host]\nx = 1", "host.\"x\""),
            ("[host.\"http://m\"]\ncapabilities = [\"fly\"]", "\"fly\""),
            ("[host.\"http://m\"]\nca = \"missing.crt\"", "/nowhere/missing.crt"),
            ("[host.\"http://m\"]\nca = 5", "host.\"http://m\""),
            ("[host.\"http://m\"]\nclient = [[\"a\", \"b\"]]", "/nowhere/a"),
            ("[host.\"http://m\"]\nclient = [[\"a\", \"b\", \"c\"]]", "host.\"http://m\""),
            ("[host.\"http://m\"]\ndial_timeout = \"5\"", "dial_timeout"),
            ("[host.\"http://m\".header]\nx = 5", "\"x\""),
        ] {
            let problem = parsed(text).unwrap_err();
            assert!(problem.contains(words), "{text}: {problem}");
        }
    }

    #[test]
    fn keys_of_other_runtimes_are_skipped() {
        assert_eq!(parsed("future = true\n[host.\"http://m\"]\nalso = { a = 1 }").unwrap().len(), 2);
    }

    proptest! {
        #[test]
        fn any_text_is_endpoints_or_an_error(text in "\\PC{0,80}|(server|host|ca|=|\\[|\\]|\"|\\.|\n| |x){0,40}") {
            let _ = parsed(&text);
        }

        #[test]
        fn any_duration_is_in_range_or_none(text in "[0-9.mshx]{0,10}") {
            if let Some(found) = parse_duration(&text) {
                prop_assert!(found <= Duration::from_secs(3600));
            }
        }
    }
}
