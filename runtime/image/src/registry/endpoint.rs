//! Where the registry of a host name is served.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::error::{Error, Result};

/// One server that has a registry's images: the registry itself, or a mirror of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// `http://` or `https://`, host, port, and the path under which the API is served (see
    /// [`Endpoint::override_path`]).
    pub url: String,
    /// Whether plain HTTP may be spoken to it although it is not on loopback, and credentials be given to it that way:
    /// whoever configures such an address says so.
    pub plain_http: bool,
    /// Whether plain HTTP is spoken where it turns out that TLS is not.
    pub plain_fallback: bool,
    /// Certificates (PEM) of authorities to trust beside the system's.
    pub authorities: Vec<Vec<u8>>,
    /// Certificate and private key (PEM) to show to a server that asks who we are.
    pub identity: Option<Vec<u8>>,
    /// Whether the server's certificate is not looked at.
    pub skip_verify: bool,
    /// Sent with each request to this server, and to no other that it may redirect to.
    pub headers: Vec<(String, String)>,
    /// Whether the API is served at the URL's own path, not under `/v2` below it.
    pub override_path: bool,
    /// Whether it may say what a tag means.
    pub resolve: bool,
    /// Whether it may deliver content.
    pub pull: bool,
    /// How long a connection may take to be made; None for the usual time.
    pub connect_timeout: Option<Duration>,
}

/// Without the secrets.
impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("url", &self.url).finish_non_exhaustive()
    }
}

/// The server that a host name means by itself: HTTPS, on loopback plain HTTP where that is not spoken, and Docker
/// Hub's own exception.
#[must_use]
pub fn default_endpoint(host: &str) -> Endpoint {
    let server = if host == "docker.io" { "registry-1.docker.io" } else { host };
    let plain_fallback = is_loopback(without_port(host)) && !host.ends_with(":443");
    Endpoint { plain_fallback, ..Endpoint::new(format!("https://{server}")) }
}

impl Endpoint {
    /// A server at `url` that does everything, with no settings of its own.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            plain_http: false,
            plain_fallback: false,
            authorities: Vec::new(),
            identity: None,
            skip_verify: false,
            headers: Vec::new(),
            override_path: false,
            resolve: true,
            pull: true,
            connect_timeout: None,
        }
    }

    /// The address of its API, without a slash at the end, if it is one that may be used.
    pub(super) fn base(&self) -> Result<reqwest::Url> {
        let invalid = |reason: &str| Error::Configuration { what: self.url.clone(), reason: reason.to_owned() };
        let mut url = reqwest::Url::parse(&self.url).map_err(|_| invalid("the registry's address is not a URL"))?;
        match url.scheme() {
            "https" => {}
            "http" if self.plain_http || url_is_loopback(&url) => {}
            "http" => {
                return Err(invalid(
                    "plain HTTP is for loopback addresses, and for those that a hosts.toml names with http://",
                ));
            }
            _ => return Err(invalid("the registry's address is neither http:// nor https://")),
        }
        let path = url.path().trim_end_matches('/');
        let path = if self.override_path || path.ends_with("/v2") { path.to_owned() } else { format!("{path}/v2") };
        url.set_path(&path);
        url.set_query(None);
        url.set_fragment(None);
        Ok(url)
    }

    /// Whether it is not the registry `host` itself, but stands for it.
    pub(super) fn is_mirror_of(&self, host: &str) -> bool {
        let authority = authority(&self.url);
        authority != host && !(host == "docker.io" && authority == "registry-1.docker.io")
    }

    /// Whether credentials that were given for `server` are for this endpoint of the registry `host`.
    pub(super) fn is_meant_by(&self, server: &str, host: &str) -> bool {
        let server = match authority(server) {
            "index.docker.io" | "registry-1.docker.io" => "docker.io",
            other => other,
        };
        if self.is_mirror_of(host) { authority(&self.url) == server } else { host == server }
    }
}

/// Host and port of a URL, or of what may be one without its scheme.
pub(super) fn authority(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    authority.rsplit_once('@').map_or(authority, |(_, host)| host)
}

/// Whether requests to `url` stay on this host.
pub(super) fn url_is_loopback(url: &reqwest::Url) -> bool {
    url.host_str().is_some_and(is_loopback)
}

fn without_port(host: &str) -> &str {
    if host.starts_with('[') {
        return host.split_once(']').map_or(host, |(address, _)| address);
    }
    host.split_once(':').map_or(host, |(name, _)| name)
}

/// `localhost`, 127.0.0.0/8 or ::1, with or without brackets.
fn is_loopback(name: &str) -> bool {
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_loopback_only_unless_configured() {
        for (host, expected) in [
            ("docker.io", "https://registry-1.docker.io"),
            ("quay.io", "https://quay.io"),
            ("10.0.0.1:5000", "https://10.0.0.1:5000"),
            ("localhost.example.com", "https://localhost.example.com"),
            ("127.0.0.1.example.com", "https://127.0.0.1.example.com"),
            ("localhost:5000", "https://localhost:5000"),
            ("localhost:443", "https://localhost:443"),
            ("127.3.2.1:80", "https://127.3.2.1:80"),
            ("[::1]:5000", "https://[::1]:5000"),
            ("[::2]:5000", "https://[::2]:5000"),
        ] {
            let endpoint = default_endpoint(host);
            assert_eq!(endpoint.url, expected);
            let loopback = ["localhost:5000", "127.3.2.1:80", "[::1]:5000"].contains(&host);
            assert_eq!(endpoint.plain_fallback, loopback, "{host}");
            assert!(endpoint.base().is_ok());
            assert!(!endpoint.is_mirror_of(host), "{host}");
        }
        let plain = |url: &str| Endpoint::new(url).base();
        assert!(plain("http://10.0.0.1:5000").is_err());
        assert!(plain("ftp://127.0.0.1").is_err());
        assert!(plain("nonsense").is_err());
        assert!(plain("http://[::1]:5000").is_ok());
        assert!(Endpoint { plain_http: true, ..Endpoint::new("http://10.0.0.1:5000") }.base().is_ok());
    }

    #[test]
    fn the_api_is_below_v2_unless_the_path_is_overridden() {
        for (url, override_path, expected) in [
            ("https://a.test", false, "https://a.test/v2"),
            ("https://a.test/", false, "https://a.test/v2"),
            ("https://a.test/v2/", false, "https://a.test/v2"),
            ("https://a.test/hub?x#y", false, "https://a.test/hub/v2"),
            ("https://a.test/hub/", true, "https://a.test/hub"),
            ("https://a.test", true, "https://a.test/"),
        ] {
            let endpoint = Endpoint { override_path, ..Endpoint::new(url) };
            assert_eq!(endpoint.base().unwrap().as_str(), expected, "{url}");
        }
    }

    #[test]
    fn credentials_for_a_named_server_are_for_that_one() {
        let hub = default_endpoint("docker.io");
        let mirror = Endpoint::new("https://mirror.test:5000/hub");
        for server in ["docker.io", "https://index.docker.io/v1/", "registry-1.docker.io", "https://docker.io"] {
            assert!(hub.is_meant_by(server, "docker.io"), "{server}");
            assert!(!mirror.is_meant_by(server, "docker.io"), "{server}");
        }
        assert!(mirror.is_meant_by("https://mirror.test:5000", "docker.io"));
        assert!(!mirror.is_meant_by("mirror.test", "docker.io"));
        assert!(!hub.is_meant_by("mirror.test:5000", "docker.io"));
    }
}
