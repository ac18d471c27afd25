//! Where the registry of a host name is served.

use std::fmt;
use std::net::IpAddr;

use crate::error::{Error, Result};

/// One server that has a registry's images.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// `http://` or `https://`, host and port. Plain HTTP is accepted for loopback addresses only.
    pub url: String,
    /// Certificates (PEM) of authorities to trust beside the system's.
    pub authorities: Vec<Vec<u8>>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("url", &self.url).field("authorities", &self.authorities.len()).finish()
    }
}

/// The server that a host name means by itself: HTTPS, except on loopback, and Docker Hub's own exception.
#[must_use]
pub fn default_endpoints(host: &str) -> Vec<Endpoint> {
    let url = match host {
        "docker.io" => "https://registry-1.docker.io".to_owned(),
        _ if is_loopback(without_port(host)) && !host.ends_with(":443") => format!("http://{host}"),
        _ => format!("https://{host}"),
    };
    vec![Endpoint { url, authorities: Vec::new() }]
}

impl Endpoint {
    /// The parsed address, if it is one that may be used.
    pub(super) fn base(&self) -> Result<reqwest::Url> {
        let invalid = |reason: &str| Error::InvalidReference { reference: self.url.clone(), reason: reason.to_owned() };
        let url = reqwest::Url::parse(&self.url).map_err(|_| invalid("the registry's address is not a URL"))?;
        match url.scheme() {
            "https" => Ok(url),
            "http" if url_is_loopback(&url) => Ok(url),
            "http" => Err(invalid("plain HTTP is for loopback addresses only; serve the registry over HTTPS")),
            _ => Err(invalid("the registry's address is neither http:// nor https://")),
        }
    }
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
    fn plain_http_is_for_loopback_only() {
        for (host, expected) in [
            ("docker.io", "https://registry-1.docker.io"),
            ("quay.io", "https://quay.io"),
            ("10.0.0.1:5000", "https://10.0.0.1:5000"),
            ("localhost.example.com", "https://localhost.example.com"),
            ("127.0.0.1.example.com", "https://127.0.0.1.example.com"),
            ("localhost:5000", "http://localhost:5000"),
            ("localhost:443", "https://localhost:443"),
            ("127.3.2.1:80", "http://127.3.2.1:80"),
            ("[::1]:5000", "http://[::1]:5000"),
            ("[::2]:5000", "https://[::2]:5000"),
        ] {
            let endpoints = default_endpoints(host);
            assert_eq!(endpoints.iter().map(|e| e.url.as_str()).collect::<Vec<_>>(), [expected]);
            assert!(endpoints[0].base().is_ok());
        }
        let plain = |url: &str| Endpoint { url: url.to_owned(), authorities: Vec::new() }.base();
        assert!(plain("http://10.0.0.1:5000").is_err());
        assert!(plain("ftp://127.0.0.1").is_err());
        assert!(plain("nonsense").is_err());
        assert!(plain("http://[::1]:5000").is_ok());
    }
}
