//! One request and its answer: redirects followed, challenges met.
//!
//! The registry's credentials go to the registry alone, and to the token server that it names itself. A server that it
//! redirects to may want a token, too: it gets one that is had without credentials.

use std::collections::HashSet;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, LOCATION, RANGE};
use reqwest::{Method, Response, StatusCode, Url};

use super::auth::Credentials;
use super::challenge::{Challenge, challenge};
use super::client::Repository;
use super::endpoint::url_is_loopback;
use super::failure::{Failure, body, is_passing, refusal, speaks_no_tls};
use super::token;
use crate::error::Error;

const MAX_REDIRECTS: usize = 5;

/// What goes with each request to a server once it has asked for it.
#[derive(Clone)]
pub(super) enum Authorization {
    Basic { username: String, password: String },
    Bearer(String),
}

/// What is asked for.
pub(super) struct Request<'a> {
    pub(super) method: Method,
    /// Below the repository.
    pub(super) path: &'a str,
    pub(super) accept: Option<&'a str>,
    /// From which byte on.
    pub(super) offset: u64,
    /// Its name for messages.
    pub(super) what: &'a str,
}

impl Repository {
    /// One attempt, authenticating with whoever asks for it.
    pub(super) async fn send(&self, request: &Request<'_>) -> Result<Response, Failure> {
        let mut challenged = HashSet::new();
        loop {
            let response = self.follow(request).await?;
            let status = response.status();
            // Each server may ask once; more would be a game.
            if status == StatusCode::UNAUTHORIZED
                && challenged.len() <= MAX_REDIRECTS
                && challenged.insert(response.url().origin())
                && let Some(authorization) = self.authenticate(&response, request.what).await?
            {
                self.authorizations.lock().await.insert(response.url().origin(), authorization);
                continue;
            }
            return match status.is_success() {
                true => Ok(response),
                false => Err(refusal(response, request.what, &self.label).await),
            };
        }
    }

    /// The address of something in the repository.
    fn url(&self, path: &str) -> Url {
        let mut url = self.base();
        url.set_path(&format!("{}/{}/{path}", url.path().trim_end_matches('/'), self.path));
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }

    /// Sends a request and follows where it leads. What is for one server goes to no other.
    async fn follow(&self, request: &Request<'_>) -> Result<Response, Failure> {
        let refused = |reason: &str| Failure::Final(self.unavailable(request.what, reason.to_owned()));
        let mut url = self.url(request.path);
        for _ in 0..=MAX_REDIRECTS {
            let response = match self.send_to(&url, request).await {
                // Nothing was said yet, so nothing was given away.
                Err(error) if self.may_be_plain(&url) && speaks_no_tls(&error) => {
                    self.be_plain();
                    url = self.url(request.path);
                    self.send_to(&url, request).await.inspect_err(|_| self.be_encrypted())?
                }
                sent => sent?,
            };
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

    async fn send_to(&self, url: &Url, request: &Request<'_>) -> reqwest::Result<Response> {
        let own = url.origin() == self.base().origin();
        let mut headers = if own { self.headers.clone() } else { HeaderMap::new() };
        let authorization = self.authorizations.lock().await.get(&url.origin()).cloned();
        if authorization.is_some() {
            headers.remove(AUTHORIZATION);
        }
        let mut builder = self.client.request(request.method.clone(), url.clone()).headers(headers);
        if let Some(accept) = request.accept {
            builder = builder.header(ACCEPT, accept);
        }
        if request.offset > 0 {
            builder = builder.header(RANGE, format!("bytes={}-", request.offset));
        }
        builder = match authorization {
            Some(Authorization::Basic { username, password }) => builder.basic_auth(username, Some(password)),
            Some(Authorization::Bearer(token)) => builder.bearer_auth(token),
            None => builder,
        };
        builder.send().await
    }

    /// Whether requests may go to `url`: over HTTPS, on this host, or as openly as the endpoint itself is configured.
    fn is_safe(&self, url: &Url) -> bool {
        match url.scheme() {
            "https" => true,
            "http" => url_is_loopback(url) || (self.plain_http && self.base().scheme() == "http"),
            _ => false,
        }
    }

    /// Meets the challenge of a 401 answer; none if it came from elsewhere and wants what only the registry gets.
    async fn authenticate(&self, response: &Response, what: &str) -> Result<Option<Authorization>, Failure> {
        let scope = format!("repository:{}:pull", self.path);
        let challenge = challenge(response.headers(), &scope);
        // A redirect's target must not talk us into giving away what the registry is to get.
        if response.url().origin() != self.base().origin() {
            return match challenge {
                Some(Challenge::Bearer { token_url }) => {
                    Ok(Some(Authorization::Bearer(self.token(token_url, None, what).await?)))
                }
                Some(Challenge::Basic) | None => Ok(None),
            };
        }
        let credentials = self.credentials.as_ref();
        Ok(Some(match (challenge, credentials) {
            (Some(Challenge::Bearer { .. }), Some(Credentials::Bearer { token })) => {
                Authorization::Bearer(token.clone())
            }
            (Some(Challenge::Bearer { token_url }), _) => {
                Authorization::Bearer(self.token(token_url, credentials, what).await?)
            }
            (Some(Challenge::Basic), Some(Credentials::Basic { username, password })) => {
                Authorization::Basic { username: username.clone(), password: password.clone() }
            }
            (Some(Challenge::Basic), None) => return Err(self.denied(what, "it wants a name and a password")),
            (Some(Challenge::Basic), Some(Credentials::Bearer { .. } | Credentials::Refresh { .. })) => {
                return Err(self.denied(what, "it wants a name and a password, not a token"));
            }
            (None, _) => return Err(self.denied(what, "it wants an authentication that is not supported")),
        }))
    }

    fn denied(&self, what: &str, reason: impl Into<String>) -> Failure {
        let (what, registry) = (what.to_owned(), self.label.clone());
        Failure::Final(Error::Unauthorized { what, registry, reason: reason.into() })
    }

    /// Gets a token from the server that a challenge named.
    async fn token(&self, url: Url, credentials: Option<&Credentials>, what: &str) -> Result<String, Failure> {
        let server = url.host_str().unwrap_or_default().to_owned();
        if !self.is_safe(&url) {
            return Err(self.denied(what, format!("its token server {server} does not use HTTPS")));
        }
        let headers = if url.origin() == self.base().origin() { self.headers.clone() } else { HeaderMap::new() };
        let response = token::request(&self.client, url, headers, credentials).send().await?;
        let status = response.status();
        if !status.is_success() {
            return Err(match refusal(response, what, &format!("token server {server}")).await {
                Failure::Passing(passing) if is_passing(status) => Failure::Passing(passing),
                // Whatever it is, there is no token.
                Failure::Passing(passing) => self.denied(what, format!("its token server {server}: {passing}")),
                Failure::Final(
                    Error::Unauthorized { reason, .. } | Error::NotFound { reason, .. } | Error::Failing { reason, .. },
                ) => self.denied(what, format!("its token server {server}: {reason}")),
                Failure::Final(_) => self.denied(what, format!("its token server {server} answered {status}")),
            });
        }
        let answer = body(response, token::MAX_BYTES, "the token").await?;
        token::parse(&answer).map_err(|problem| self.denied(what, format!("its token server {server} {problem}")))
    }
}
