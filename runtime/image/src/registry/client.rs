//! One repository of one registry: its manifests, and its small blobs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, ClientBuilder, Method, Response, Url, redirect};
use tokio::sync::Mutex;

use super::auth::{Credentials, Login};
use super::endpoint::{Endpoint, authority, url_is_loopback};
use super::exchange::{Authorization, Request};
use super::failure::{Attempts, BACKOFF, Failure, body, root_cause};
use super::pace::Pace;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::ACCEPTED;
use crate::reference::{Reference, Target};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence within an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// How long one attempt of a request for a manifest or a configuration may take in all.
const SMALL_TIMEOUT: Duration = Duration::from_secs(120);

const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A manifest or index as it came, with its digest.
pub(crate) struct Manifest {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
    pub(crate) media_type: Option<String>,
}

/// One repository at one endpoint. Remembers how to authenticate.
pub(crate) struct Repository {
    pub(super) client: Client,
    base: Url,
    /// Whether it may turn out that HTTPS is not spoken there, and whether it has.
    fallback: bool,
    plain: AtomicBool,
    /// Host and path, as in the reference.
    name: String,
    pub(super) path: String,
    /// What the endpoint is called in errors: the registry's host, or the mirror's.
    pub(super) label: String,
    /// The registry that a mirror is asked for.
    pub(super) namespace: Option<String>,
    pub(super) headers: HeaderMap,
    pub(super) plain_http: bool,
    pub(super) credentials: Option<Credentials>,
    /// By server, since redirects lead to others.
    pub(super) authorizations: Mutex<HashMap<url::Origin, Authorization>>,
    /// Waits between the attempts of a request.
    pub(super) backoff: &'static [Duration],
    pub(super) pace: Pace,
}

impl Repository {
    /// Prepares to talk; nothing is sent yet. `others` tells that another endpoint is asked if this one fails, so that
    /// it need not be asked again and again.
    pub(crate) fn new(
        endpoint: &Endpoint,
        reference: &Reference,
        login: Option<&Login>,
        others: bool,
        pace: Pace,
    ) -> Result<Self> {
        let base = endpoint.base()?;
        let mirror = endpoint.is_mirror_of(reference.host());
        let label = if mirror { authority(&endpoint.url) } else { reference.host() }.to_owned();
        let unusable = |error: &reqwest::Error| Error::Unavailable {
            what: reference.to_string(),
            registry: label.clone(),
            reason: format!("cannot set up the connection: {}", root_cause(error)),
        };
        let client = client(endpoint, &base).map_err(|error| unusable(&error))?;
        let mut headers = HeaderMap::new();
        for (name, value) in &endpoint.headers {
            let parsed = (name.parse::<HeaderName>(), value.parse::<HeaderValue>());
            let (Ok(name), Ok(value)) = parsed else {
                let reason = format!("header {name:?} or its value is not one that HTTP allows");
                return Err(Error::Configuration { what: endpoint.url.clone(), reason });
            };
            headers.append(name, value);
        }
        let meant = |login: &&Login| match &login.server {
            Some(server) => endpoint.is_meant_by(server, reference.host()),
            None => true,
        };
        Ok(Self {
            client,
            fallback: endpoint.plain_fallback && base.scheme() == "https",
            plain: AtomicBool::new(false),
            base,
            name: reference.repository(),
            path: reference.path().to_owned(),
            label,
            namespace: mirror.then(|| reference.host().to_owned()),
            headers,
            plain_http: endpoint.plain_http,
            credentials: login.filter(meant).map(|login| login.credentials.clone()),
            authorizations: Mutex::default(),
            backoff: if others { BACKOFF.get(..1).unwrap_or_default() } else { &BACKOFF },
            pace,
        })
    }

    /// The address of the API.
    pub(super) fn base(&self) -> Url {
        let mut base = self.base.clone();
        if self.plain.load(Ordering::Relaxed) {
            // From one of these two to the other it cannot fail.
            let _ = base.set_scheme("http");
        }
        base
    }

    /// Which server it is, whatever of it is asked for.
    pub(crate) fn source(&self) -> String {
        self.base.to_string()
    }

    /// Whether a request to `url` may be tried without TLS.
    pub(super) fn may_be_plain(&self, url: &Url) -> bool {
        self.fallback && url.scheme() == "https" && url.origin() == self.base().origin()
    }

    pub(super) fn be_plain(&self) {
        self.plain.store(true, Ordering::Relaxed);
    }

    pub(super) fn be_encrypted(&self) {
        self.plain.store(false, Ordering::Relaxed);
    }

    /// Fetches a manifest of at most `limit` bytes. With a digest, it is the one asked for.
    pub(crate) async fn manifest(&self, target: &Target, limit: u64) -> Result<Manifest> {
        let (path, what) = self.names(target);
        let (bytes, media_type) = self.small(&path, Some(ACCEPTED), limit, &what).await?;
        let digest = Digest::of(&bytes);
        match target {
            Target::Digest(expected) if *expected != digest => Err(Error::wrong_digest(what, expected, &digest)),
            _ => Ok(Manifest { bytes, digest, media_type }),
        }
    }

    /// What a tag or a digest means now, asked without fetching it; none if the registry does not say so that way,
    /// and a fetch has to tell what is the matter.
    pub(crate) async fn head(&self, target: &Target) -> Option<Digest> {
        let (path, what) = self.names(target);
        let request = Request { method: Method::HEAD, path: &path, accept: Some(ACCEPTED), offset: 0, what: &what };
        let response = tokio::time::timeout(SMALL_TIMEOUT, self.send(&request)).await.ok()?.ok()?;
        let said = response.headers().get(DOCKER_CONTENT_DIGEST).and_then(|value| value.to_str().ok()?.parse().ok());
        match (target, said) {
            (Target::Digest(asked), None) => Some(*asked),
            (Target::Digest(asked), Some(said)) => (*asked == said).then_some(said),
            (Target::Tag(_), said) => said,
        }
    }

    /// The path of a manifest, and its name for messages.
    fn names(&self, target: &Target) -> (String, String) {
        let (name, separator) = match target {
            Target::Tag(tag) => (tag.clone(), ':'),
            Target::Digest(digest) => (digest.to_string(), '@'),
        };
        (format!("manifests/{name}"), format!("{}{separator}{name}", self.name))
    }

    /// Fetches a whole blob of `size` bytes into memory; the caller bounds `size`.
    pub(crate) async fn small_blob(&self, digest: &Digest, size: u64, what: &str) -> Result<Vec<u8>> {
        let (bytes, _) = self.small(&format!("blobs/{digest}"), None, size, what).await?;
        let found = Digest::of(&bytes);
        if found == *digest { Ok(bytes) } else { Err(Error::wrong_digest(what, digest, &found)) }
    }

    /// One attempt to open a blob from byte `offset` on.
    pub(super) async fn open_blob(&self, digest: &Digest, offset: u64, what: &str) -> Result<Response, Failure> {
        let path = format!("blobs/{digest}");
        self.send(&Request { method: Method::GET, path: &path, accept: None, offset, what }).await
    }

    /// The error for a request that failed to the end.
    pub(super) fn unavailable(&self, what: &str, reason: String) -> Error {
        Error::Unavailable { what: what.to_owned(), registry: self.label.clone(), reason }
    }

    async fn small(
        &self,
        path: &str,
        accept: Option<&str>,
        limit: u64,
        what: &str,
    ) -> Result<(Vec<u8>, Option<String>)> {
        let mut attempts = Attempts::new(self.backoff);
        // A document that trickles would otherwise never end.
        let time = self.pace.progress_timeout.unwrap_or(SMALL_TIMEOUT).min(SMALL_TIMEOUT);
        loop {
            let work = async {
                let response = self.send(&Request { method: Method::GET, path, accept, offset: 0, what }).await?;
                let media_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
                let media_type = media_type.map(|value| value.split(';').next().unwrap_or(value).trim().to_owned());
                Ok((body(response, limit, what).await?, media_type))
            };
            let result = tokio::time::timeout(time, work).await;
            match result.unwrap_or_else(|_| Err(Failure::passing(format!("it took longer than {time:?}")))) {
                Ok(found) => return Ok(found),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(passing)) => {
                    tracing::debug!(what, reason = %passing, "request failed");
                    let Some(wait) = attempts.next(&passing) else { return Err(passing.last(what, &self.label)) };
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }
}

/// A client for an endpoint whose address is `base`.
fn client(endpoint: &Endpoint, base: &Url) -> reqwest::Result<Client> {
    // An error means that a provider is installed already, which will do.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut authorities = Vec::new();
    for pem in &endpoint.authorities {
        authorities.extend(reqwest::Certificate::from_pem_bundle(pem)?);
    }
    let builder = || {
        let mut builder = Client::builder()
            .user_agent(concat!("nacelle/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(endpoint.connect_timeout.unwrap_or(CONNECT_TIMEOUT))
            .read_timeout(READ_TIMEOUT)
            .redirect(redirect::Policy::none())
            .tls_danger_accept_invalid_certs(endpoint.skip_verify);
        if url_is_loopback(base) {
            builder = builder.no_proxy();
        }
        Ok::<ClientBuilder, reqwest::Error>(match &endpoint.identity {
            Some(pem) => builder.identity(reqwest::Identity::from_pem(pem)?),
            None => builder,
        })
    };
    // Without a TLS peer, the system's certificates need not even exist.
    if base.scheme() == "http" {
        return builder()?.tls_certs_only([]).build();
    }
    match builder()?.tls_certs_merge(authorities).build() {
        Err(_) if endpoint.plain_fallback => builder()?.tls_certs_only([]).build(),
        built => built,
    }
}
