//! Tokens: what a registry's token server is asked, and what it answers.
//!
//! With a name and a password, or with nothing, it is asked by GET; with a refresh token by an OAuth2 request, as the
//! distribution project's token specifications have it.

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap};
use reqwest::{Client, RequestBuilder, Url};

use super::auth::Credentials;

/// Longest answer, in bytes.
pub(super) const MAX_BYTES: u64 = 1 << 20;
/// Who asks, in an OAuth2 request.
const CLIENT_ID: &str = "nacelle";

#[derive(serde::Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
}

/// The request for a token from `url`, which has the service and the scopes as its query.
pub(super) fn request(
    client: &Client,
    url: Url,
    mut headers: HeaderMap,
    credentials: Option<&Credentials>,
) -> RequestBuilder {
    match credentials {
        Some(Credentials::Basic { username, password }) => {
            headers.remove(AUTHORIZATION);
            client.get(url).headers(headers).basic_auth(username, Some(password))
        }
        Some(Credentials::Refresh { token }) => {
            let form = form(&url, token);
            let mut target = url;
            target.set_query(None);
            client.post(target).headers(headers).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
        }
        Some(Credentials::Bearer { .. }) | None => client.get(url).headers(headers),
    }
}

/// The fields of an OAuth2 request, in which all scopes are one.
fn form(url: &Url, refresh_token: &str) -> String {
    let mut fields = url.clone();
    let (scopes, others): (Vec<_>, Vec<_>) = url.query_pairs().partition(|(name, _)| name == "scope");
    let scopes: Vec<_> = scopes.into_iter().map(|(_, scope)| scope).collect();
    fields
        .query_pairs_mut()
        .clear()
        .append_pair("grant_type", "refresh_token")
        .append_pair("refresh_token", refresh_token)
        .append_pair("client_id", CLIENT_ID)
        .append_pair("scope", &scopes.join(" "))
        .extend_pairs(others);
    fields.query().unwrap_or_default().to_owned()
}

/// The token of an answer.
pub(super) fn parse(answer: &[u8]) -> Result<String, &'static str> {
    let answer: Answer = serde_json::from_slice(answer).map_err(|_| "answered something else than a token")?;
    answer.token.or(answer.access_token).filter(|token| !token.is_empty()).ok_or("gave no token")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refresh_token_is_exchanged_with_all_scopes_in_one() {
        let url = Url::parse("https://auth.test/t?service=reg&scope=a:pull&scope=b:pull").unwrap();
        assert_eq!(
            form(&url, "x&y"),
            "grant_type=refresh_token&refresh_token=x%26y&client_id=nacelle&scope=a%3Apull+b%3Apull&service=reg"
        );
    }

    #[test]
    fn either_name_of_the_token_will_do() {
        assert_eq!(parse(br#"{"token":"a"}"#).as_deref(), Ok("a"));
        assert_eq!(parse(br#"{"access_token":"b","expires_in":60}"#).as_deref(), Ok("b"));
        for bad in [&b"{}"[..], b"", b"{\"token\":\"\"}", b"[]"] {
            assert!(parse(bad).is_err());
        }
    }
}
