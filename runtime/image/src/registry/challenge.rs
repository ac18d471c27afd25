//! What a registry wants before it answers: the `WWW-Authenticate` header of a 401.

use reqwest::Url;
use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// A challenge that can be met.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// Name and password with each request.
    Basic,
    /// A token from this address.
    Bearer { token_url: Url },
}

/// The best challenge of an answer; `scope` is asked for when the registry names none.
pub(super) fn challenge(headers: &HeaderMap, scope: &str) -> Option<Challenge> {
    let mut best = None;
    for value in headers.get_all(WWW_AUTHENTICATE) {
        let Ok(value) = value.to_str() else { continue };
        let Ok(challenges) = http_auth::parse_challenges(value) else { continue };
        for challenge in challenges {
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                best.get_or_insert(Challenge::Basic);
            } else if challenge.scheme.eq_ignore_ascii_case("bearer") {
                let parameter = |name: &str| {
                    let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                    found.map(|(_, value)| value.to_unescaped())
                };
                let Some(mut token_url) = parameter("realm").and_then(|realm| Url::parse(&realm).ok()) else {
                    continue;
                };
                let scope = parameter("scope").unwrap_or_else(|| scope.to_owned());
                if let Some(service) = parameter("service") {
                    token_url.query_pairs_mut().append_pair("service", &service);
                }
                for scope in scope.split(' ').filter(|scope| !scope.is_empty()) {
                    token_url.query_pairs_mut().append_pair("scope", scope);
                }
                return Some(Challenge::Bearer { token_url });
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
        }
        challenge(&headers, "repository:a/b:pull")
    }

    #[test]
    fn a_token_is_preferred() {
        let url = |url: &str| Some(Challenge::Bearer { token_url: Url::parse(url).unwrap() });
        assert_eq!(
            of(&[
                "Basic realm=\"x\"",
                "Bearer realm=\"https://auth.test/token\",service=\"reg\",scope=\"repository:c:pull\""
            ]),
            url("https://auth.test/token?service=reg&scope=repository%3Ac%3Apull")
        );
        assert_eq!(
            of(&["bearer realm=\"https://auth.test/t?x=1\""]),
            url("https://auth.test/t?x=1&scope=repository%3Aa%2Fb%3Apull")
        );
        assert_eq!(of(&["Basic realm=\"x\""]), Some(Challenge::Basic));
        for bad in ["Digest realm=\"x\"", "Bearer", "Bearer realm=\"nonsense\"", "=,=", ""] {
            assert_eq!(of(&[bad]), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_survived(value in "[ -~]{0,80}") {
            let _ = of(&[&value]);
        }
    }
}
