//! Requests to one repository of one registry.

use std::time::Duration;

use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use tokio::sync::Mutex;

use super::auth::{Credentials, Login};
use super::challenge::{Challenge, challenge};
use super::endpoint::{Endpoint, authority, url_is_loopback};
use super::token;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::ACCEPTED;
use crate::reference::{Reference, Target};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence within an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: usize = 5;
const MAX_ERROR_BYTES: u64 = 16 << 10;
/// Waits before the second and later attempts of a request that failed for a passing reason.
pub(super) const BACKOFF: [Duration; 3] = [Duration::from_millis(250), Duration::from_secs(1), Duration::from_secs(3)];
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);

/// What goes with each request once the registry has asked for it.
#[derive(Clone)]
enum Authorization {
    Basic { username: String, password: String },
    Bearer(String),
}

/// Why one attempt of a request failed.
pub(super) enum Failure {
    /// Another attempt may do better, after at least this long if the registry said so.
    Passing { reason: String, wait: Option<Duration> },
    /// It will not.
    Final(Error),
}

/// A manifest or index as it came, with its digest.
pub(crate) struct Manifest {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
    pub(crate) media_type: Option<String>,
}

/// One repository at one endpoint. Remembers how to authenticate.
pub(crate) struct Repository {
    client: Client,
    base: Url,
    /// Host and path, as in the reference.
    name: String,
    path: String,
    /// What the endpoint is called in errors: the registry's host, or the mirror's.
    label: String,
    /// The registry that a mirror is asked for.
    namespace: Option<String>,
    headers: HeaderMap,
    plain_http: bool,
    credentials: Option<Credentials>,
    authorization: Mutex<Option<Authorization>>,
    /// Waits between the attempts of a request.
    pub(super) backoff: &'static [Duration],
}

impl Repository {
    /// Prepares to talk; nothing is sent yet. `others` tells that another endpoint is asked if this one fails, so that
    /// it need not be asked again and again.
    pub(crate) fn new(endpoint: &Endpoint, reference: &Reference, login: Option<&Login>, others: bool) -> Result<Self> {
        let base = endpoint.base()?;
        let mirror = endpoint.is_mirror_of(reference.host());
        let label = if mirror { authority(&endpoint.url) } else { reference.host() }.to_owned();
        let unusable = |error: &dyn std::error::Error| Error::Unavailable {
            what: reference.to_string(),
            registry: label.clone(),
            reason: format!("cannot set up the connection: {}", root_cause(error)),
        };
        // An error means that a provider is installed already, which will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = Client::builder()
            .user_agent(concat!("nacelle/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(endpoint.connect_timeout.unwrap_or(CONNECT_TIMEOUT))
            .read_timeout(READ_TIMEOUT)
            .redirect(redirect::Policy::none());
        if url_is_loopback(&base) {
            builder = builder.no_proxy();
        }
        let mut authorities = Vec::new();
        for pem in &endpoint.authorities {
            authorities.extend(reqwest::Certificate::from_pem_bundle(pem).map_err(|error| unusable(&error))?);
        }
        // Without a TLS peer, the system's certificates need not even exist.
        builder =
            if base.scheme() == "http" { builder.tls_certs_only([]) } else { builder.tls_certs_merge(authorities) };
        if let Some(pem) = &endpoint.identity {
            builder = builder.identity(reqwest::Identity::from_pem(pem).map_err(|error| unusable(&error))?);
        }
        let client =
            builder.tls_danger_accept_invalid_certs(endpoint.skip_verify).build().map_err(|error| unusable(&error))?;
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
            base,
            name: reference.repository(),
            path: reference.path().to_owned(),
            label,
            namespace: mirror.then(|| reference.host().to_owned()),
            headers,
            plain_http: endpoint.plain_http,
            credentials: login.filter(meant).map(|login| login.credentials.clone()),
            authorization: Mutex::new(None),
            backoff: if others { BACKOFF.get(..1).unwrap_or_default() } else { &BACKOFF },
        })
    }

    /// Fetches a manifest of at most `limit` bytes. With a digest, it is the one asked for.
    pub(crate) async fn manifest(&self, target: &Target, limit: u64) -> Result<Manifest> {
        let (name, separator) = match target {
            Target::Tag(tag) => (tag.clone(), ':'),
            Target::Digest(digest) => (digest.to_string(), '@'),
        };
        let what = format!("{}{separator}{name}", self.name);
        let (bytes, media_type) = self.small(&format!("manifests/{name}"), Some(ACCEPTED), limit, &what).await?;
        let digest = Digest::of(&bytes);
        match target {
            Target::Digest(expected) if *expected != digest => Err(Error::wrong_digest(what, expected, &digest)),
            _ => Ok(Manifest { bytes, digest, media_type }),
        }
    }

    /// Fetches a whole blob of `size` bytes into memory; the caller bounds `size`.
    pub(crate) async fn small_blob(&self, digest: &Digest, size: u64, what: &str) -> Result<Vec<u8>> {
        let (bytes, _) = self.small(&format!("blobs/{digest}"), None, size, what).await?;
        let found = Digest::of(&bytes);
        if found == *digest { Ok(bytes) } else { Err(Error::wrong_digest(what, digest, &found)) }
    }

    /// One attempt to open a blob from byte `offset` on.
    pub(super) async fn open_blob(&self, digest: &Digest, offset: u64, what: &str) -> Result<Response, Failure> {
        self.get(&format!("blobs/{digest}"), None, offset, what).await
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
        let mut attempt = 0;
        loop {
            let result = async {
                let response = self.get(path, accept, 0, what).await?;
                let media_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
                let media_type = media_type.map(|value| value.split(';').next().unwrap_or(value).trim().to_owned());
                Ok((body(response, limit, what).await?, media_type))
            };
            match result.await {
                Ok(found) => return Ok(found),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing { reason, wait }) => {
                    tracing::debug!(what, reason, attempt, "request failed");
                    let Some(backoff) = self.backoff.get(attempt) else { return Err(self.unavailable(what, reason)) };
                    tokio::time::sleep(wait.unwrap_or_default().max(*backoff)).await;
                    attempt += 1;
                }
            }
        }
    }

    /// One attempt, authenticating if the registry asks for it.
    async fn get(&self, path: &str, accept: Option<&str>, offset: u64, what: &str) -> Result<Response, Failure> {
        let mut url = self.base.clone();
        url.set_path(&format!("{}/{}/{path}", self.base.path().trim_end_matches('/'), self.path));
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        let mut challenged = false;
        loop {
            let response = self.follow(url.clone(), accept, offset, what).await?;
            let status = response.status();
            if status == StatusCode::UNAUTHORIZED && !challenged {
                challenged = true;
                self.authenticate(&response, what).await?;
                continue;
            }
            return if status.is_success() { Ok(response) } else { Err(self.refusal(response, what).await) };
        }
    }

    /// Sends a request and follows where it leads. What is for this endpoint alone goes nowhere else.
    async fn follow(&self, mut url: Url, accept: Option<&str>, offset: u64, what: &str) -> Result<Response, Failure> {
        let refused = |reason: &str| Failure::Final(self.unavailable(what, reason.to_owned()));
        for _ in 0..=MAX_REDIRECTS {
            let mut headers = HeaderMap::new();
            let mut authorization = None;
            if url.origin() == self.base.origin() {
                headers = self.headers.clone();
                authorization = self.authorization.lock().await.clone();
            }
            if authorization.is_some() {
                headers.remove(AUTHORIZATION);
            }
            let mut request = self.client.get(url.clone()).headers(headers);
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if offset > 0 {
                request = request.header(RANGE, format!("bytes={offset}-"));
            }
            request = match authorization {
                Some(Authorization::Basic { username, password }) => request.basic_auth(username, Some(password)),
                Some(Authorization::Bearer(token)) => request.bearer_auth(token),
                None => request,
            };
            let response = request.send().await.map_err(|error| passing(&error))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let target = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            url = target.and_then(|target| url.join(target).ok()).ok_or_else(|| refused("it redirects to no URL"))?;
            if !self.is_safe(&url) {
                return Err(refused("it redirects to plain HTTP"));
            }
        }
        Err(refused("too many redirects"))
    }

    /// Whether requests may go to `url`: over HTTPS, on this host, or as openly as the endpoint itself is configured.
    fn is_safe(&self, url: &Url) -> bool {
        match url.scheme() {
            "https" => true,
            "http" => url_is_loopback(url) || (self.plain_http && self.base.scheme() == "http"),
            _ => false,
        }
    }

    /// Meets the challenge of a 401 answer.
    async fn authenticate(&self, response: &Response, what: &str) -> Result<(), Failure> {
        let denied = |reason: &str| {
            Failure::Final(Error::Unauthorized {
                what: what.to_owned(),
                registry: self.label.clone(),
                reason: reason.to_owned(),
            })
        };
        // A redirect's target must not talk us into giving away what the registry is to get.
        let same = response.url().origin() == self.base.origin();
        if !same {
            return Err(denied("the challenge came from another host"));
        }
        let scope = format!("repository:{}:pull", self.path);
        let challenge = challenge(response.headers(), &scope);
        let authorization = match (challenge, &self.credentials) {
            (Some(Challenge::Bearer { .. }), Some(Credentials::Bearer { token })) => {
                Authorization::Bearer(token.clone())
            }
            (Some(Challenge::Bearer { token_url }), _) => Authorization::Bearer(self.token(token_url, what).await?),
            (Some(Challenge::Basic), Some(Credentials::Basic { username, password })) => {
                Authorization::Basic { username: username.clone(), password: password.clone() }
            }
            (Some(Challenge::Basic), None) => return Err(denied("it wants a name and a password")),
            (Some(Challenge::Basic), Some(Credentials::Bearer { .. } | Credentials::Refresh { .. })) => {
                return Err(denied("it wants a name and a password, not a token"));
            }
            (None, _) => return Err(denied("it wants an authentication that is not supported")),
        };
        *self.authorization.lock().await = Some(authorization);
        Ok(())
    }

    /// Gets a token from the server that the registry named.
    async fn token(&self, url: Url, what: &str) -> Result<String, Failure> {
        let denied = |reason: String| {
            Failure::Final(Error::Unauthorized { what: what.to_owned(), registry: self.label.clone(), reason })
        };
        let server = url.host_str().unwrap_or_default().to_owned();
        if !self.is_safe(&url) {
            return Err(denied(format!("its token server {server} does not use HTTPS")));
        }
        let headers = if url.origin() == self.base.origin() { self.headers.clone() } else { HeaderMap::new() };
        let request = token::request(&self.client, url, headers, self.credentials.as_ref());
        let response = request.send().await.map_err(|error| passing(&error))?;
        match response.status() {
            status if status.is_success() => {}
            status if is_passing(status) => {
                return Err(Failure::Passing {
                    reason: format!("its token server {server} answered {status}"),
                    wait: None,
                });
            }
            status => return Err(denied(format!("its token server {server} answered {status}"))),
        }
        let answer = body(response, token::MAX_BYTES, "the token").await?;
        token::parse(&answer).map_err(|problem| denied(format!("its token server {server} {problem}")))
    }

    /// What an answer means that is not a success.
    async fn refusal(&self, response: Response, what: &str) -> Failure {
        let status = response.status();
        let wait = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let wait = wait.map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
        let (what, registry) = (what.to_owned(), self.label.clone());
        if is_passing(status) {
            return Failure::Passing { reason: format!("it answered {status}"), wait };
        }
        let text = body(response, MAX_ERROR_BYTES, "the error").await.unwrap_or_default();
        let reason = match message(&text) {
            Some(message) => format!("it answered {status}: {message}"),
            None => format!("it answered {status}"),
        };
        Failure::Final(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::Unauthorized { what, registry, reason },
            StatusCode::NOT_FOUND => Error::NotFound { what, registry },
            StatusCode::RANGE_NOT_SATISFIABLE => Error::corrupt(what, "the registry has less of it than it should"),
            _ => Error::Unavailable { what, registry, reason },
        })
    }
}

/// At most `limit` bytes of an answer.
async fn body(mut response: Response, limit: u64, what: &str) -> Result<Vec<u8>, Failure> {
    let too_large = || Failure::Final(Error::limit(what, format!("the registry sent more than {limit} bytes")));
    if response.content_length().is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| passing(&error))? {
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// The first message of the specification's error format, in one line.
fn message(body: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    let error = value.get("errors")?.get(0)?;
    let text = |key: &str| error.get(key).and_then(serde_json::Value::as_str).filter(|text| !text.is_empty());
    let text = text("message").or_else(|| text("code"))?;
    Some(text.chars().filter(|c| !c.is_control()).take(200).collect())
}

fn is_passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// A request that got no answer, or half of one.
pub(super) fn passing(error: &reqwest::Error) -> Failure {
    Failure::Passing { reason: root_cause(error), wait: None }
}

/// The innermost of a chain of errors, which is the one that says what happened.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registry_messages_are_one_short_line() {
        let body = br#"{"errors":[{"code":"DENIED","message":"requested\naccess denied"}]}"#;
        assert_eq!(message(body).as_deref(), Some("requestedaccess denied"));
        assert_eq!(message(br#"{"errors":[{"code":"DENIED"}]}"#).as_deref(), Some("DENIED"));
        for bad in [&b""[..], b"{}", b"<html>", b"{\"errors\":[]}", b"[1]"] {
            assert_eq!(message(bad), None);
        }
    }
}
