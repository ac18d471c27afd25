//! Why a request failed, in the registry's own words where it said something, and what is attempted again.

use std::error::Error as _;
use std::time::{Duration, SystemTime};

use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use reqwest::{Response, StatusCode};

use super::pace::Slow;
use crate::error::Error;

/// Waits before the second and later attempts of a request that failed for a passing reason.
pub(super) const BACKOFF: [Duration; 3] = [Duration::from_millis(250), Duration::from_secs(1), Duration::from_secs(3)];
/// Longest wait that a registry may ask for. Who wants more is not asked again: its caller comes back by itself.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);
const MAX_ERROR_BYTES: u64 = 16 << 10;
/// Characters of a registry's words that are passed on.
const MAX_WORDS: usize = 400;

/// Why one attempt of a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another attempt may do better.
    Passing(Passing),
    /// It will not.
    Final(Error),
}

/// A failure that another attempt may not have.
#[derive(Debug)]
pub(super) struct Passing {
    reason: String,
    /// What the registry answered, if it answered.
    status: Option<StatusCode>,
    /// How long it wants to be left alone.
    wait: Duration,
    /// Whether it was too slow, so that what it gave is no reason to be patient.
    pub(super) slow: bool,
}

impl Passing {
    pub(super) fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), status: None, wait: Duration::ZERO, slow: false }
    }

    /// What it means for `what` when there is no further attempt.
    pub(super) fn last(self, what: &str, registry: &str) -> Error {
        let (what, registry, reason) = (what.to_owned(), registry.to_owned(), self.reason);
        match self.status {
            None => Error::Unavailable { what, registry, reason },
            Some(StatusCode::TOO_MANY_REQUESTS) => Error::TooManyRequests { what, registry, reason },
            Some(_) => Error::Failing { what, registry, reason },
        }
    }
}

impl std::fmt::Display for Passing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)
    }
}

impl Failure {
    pub(super) fn passing(reason: impl Into<String>) -> Self {
        Self::Passing(Passing::new(reason))
    }
}

impl From<reqwest::Error> for Failure {
    /// A request that got no answer, or half of one.
    fn from(error: reqwest::Error) -> Self {
        Self::passing(root_cause(&error))
    }
}

impl From<Slow> for Failure {
    fn from(slow: Slow) -> Self {
        Self::Passing(Passing { slow: true, ..Passing::new(slow.to_string()) })
    }
}

/// The attempts of one request.
pub(super) struct Attempts {
    waits: &'static [Duration],
    made: usize,
}

impl Attempts {
    /// As many as there are waits, and one.
    pub(super) fn new(waits: &'static [Duration]) -> Self {
        Self { waits, made: 0 }
    }

    /// How long to wait for the next one; none if that was the last.
    pub(super) fn next(&mut self, passing: &Passing) -> Option<Duration> {
        if passing.wait > MAX_RETRY_AFTER {
            return None;
        }
        let wait = self.waits.get(self.made)?;
        self.made += 1;
        Some(passing.wait.max(*wait))
    }

    /// It got somewhere: the next failure is a first one.
    pub(super) fn forget(&mut self) {
        self.made = 0;
    }
}

/// What an answer means that is not a success.
pub(super) async fn refusal(response: Response, what: &str, registry: &str) -> Failure {
    let status = response.status();
    let wait = retry_after(response.headers(), SystemTime::now());
    let plain = is_plain_text(response.headers());
    let text = body(response, MAX_ERROR_BYTES, "the error").await.unwrap_or_default();
    let mut reason = match words(&text, plain) {
        Some(words) => format!("it answered {status}: {words}"),
        None => format!("it answered {status}"),
    };
    if is_passing(status) {
        let wait = wait.unwrap_or_default();
        if wait > MAX_RETRY_AFTER {
            reason += &format!("; it wants to be asked again in {} s", wait.as_secs());
        }
        return Failure::Passing(Passing { reason, status: Some(status), wait, slow: false });
    }
    let (what, registry) = (what.to_owned(), registry.to_owned());
    Failure::Final(match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::Unauthorized { what, registry, reason },
        StatusCode::NOT_FOUND => Error::NotFound { what, registry, reason },
        StatusCode::RANGE_NOT_SATISFIABLE => Error::corrupt(what, "the registry has less of it than it should"),
        _ => Error::Failing { what, registry, reason },
    })
}

/// At most `limit` bytes of an answer.
pub(super) async fn body(mut response: Response, limit: u64, what: &str) -> Result<Vec<u8>, Failure> {
    let too_large = || Failure::Final(Error::limit(what, format!("the registry sent more than {limit} bytes")));
    if response.content_length().is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// The `Retry-After` of an answer, which is a number of seconds or a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match value.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or_default()),
    }
}

fn is_plain_text(headers: &HeaderMap) -> bool {
    let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    media_type.is_none_or(|media_type| media_type.starts_with("text/plain"))
}

/// What the registry says is wrong, in one line: the messages of the specification's error format, or of what others
/// send, or a plain text.
fn words(body: &[u8], plain: bool) -> Option<String> {
    let text = |value: &serde_json::Value, key: &str| {
        value.get(key).and_then(serde_json::Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
    };
    let said = match serde_json::from_slice::<serde_json::Value>(body) {
        Ok(value) => {
            let errors = value.get("errors").and_then(serde_json::Value::as_array);
            let messages: Vec<String> = errors
                .into_iter()
                .flatten()
                .filter_map(|error| text(error, "message").or_else(|| text(error, "code")))
                .collect();
            match messages.is_empty() {
                false => messages.join("; "),
                true => {
                    ["message", "details", "error_description", "error"].iter().find_map(|key| text(&value, key))?
                }
            }
        }
        Err(_) if plain => {
            std::str::from_utf8(body).ok().filter(|text| !text.trim_start().starts_with('<'))?.to_owned()
        }
        Err(_) => return None,
    };
    let line: String = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let line: String = line.chars().filter(|c| !c.is_control()).take(MAX_WORDS).collect();
    Some(line).filter(|line| !line.is_empty())
}

pub(super) fn is_passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// The innermost of a chain of errors, which is the one that says what happened.
pub(super) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Whether a connection was not made because the server, if it is one, does not speak TLS: it says something else,
/// hangs up, or says nothing. One that speaks it and has the wrong certificate is not such.
pub(super) fn speaks_no_tls(error: &reqwest::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, UnexpectedEof};
    let mut kinds = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return matches!(tls, rustls::Error::InvalidMessage(_));
        }
        let io = error.downcast_ref::<std::io::Error>();
        kinds.extend(io.map(std::io::Error::kind));
        // An io::Error gives the source of what it holds, and not that itself.
        let held = io.and_then(std::io::Error::get_ref);
        cause = held.map_or_else(|| error.source(), |held| Some(held as &(dyn std::error::Error + 'static)));
    }
    let hung_up = [BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, UnexpectedEof];
    error.is_connect() && (error.is_timeout() || kinds.iter().any(|kind| hung_up.contains(kind)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_registry_says_is_one_short_line() {
        let body = br#"{"errors":[{"code":"DENIED","message":"requested\naccess denied"},{"code":"X"},{}]}"#;
        assert_eq!(words(body, false).as_deref(), Some("requested access denied; X"));
        assert_eq!(words(br#"{"errors":[{"code":"DENIED"}]}"#, false).as_deref(), Some("DENIED"));
        assert_eq!(words(br#"{"details":"incorrect password"}"#, false).as_deref(), Some("incorrect password"));
        assert_eq!(words(b"not on the list\r\n", true).as_deref(), Some("not on the list"));
        assert_eq!(words(&[b'x'; 5000], true).map(|words| words.len()), Some(MAX_WORDS));
        for (bad, plain) in [
            (&b""[..], true),
            (b"{}", true),
            (b"<html>", true),
            (b"x", false),
            (b"{\"errors\":[]}", true),
            (b"[1]", true),
        ] {
            assert_eq!(words(bad, plain), None, "{bad:?}");
        }
    }

    #[test]
    fn a_wait_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        for (value, expected) in [
            ("7", Some(7)),
            ("Sun, 06 Nov 1994 08:50:00 GMT", Some(23)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(0)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ] {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, value.parse().unwrap())]);
            assert_eq!(retry_after(&headers, now), expected.map(Duration::from_secs), "{value}");
        }
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }

    #[test]
    fn a_registry_that_wants_a_long_wait_is_not_asked_again() {
        let mut attempts = Attempts::new(&BACKOFF);
        let wait = |seconds| Passing { wait: Duration::from_secs(seconds), ..Passing::new("") };
        assert_eq!(attempts.next(&wait(0)), Some(BACKOFF[0]));
        assert_eq!(attempts.next(&wait(30)), Some(MAX_RETRY_AFTER));
        assert_eq!(attempts.next(&wait(31)), None);
        assert_eq!(attempts.next(&wait(0)), Some(BACKOFF[2]));
        assert_eq!(attempts.next(&wait(0)), None);
        attempts.forget();
        assert_eq!(attempts.next(&wait(0)), Some(BACKOFF[0]));
    }

    proptest! {
        #[test]
        fn any_answer_is_words_or_none(body in proptest::collection::vec(any::<u8>(), 0..100), plain: bool) {
            if let Some(words) = words(&body, plain) {
                prop_assert!(!words.chars().any(char::is_control) && !words.is_empty());
            }
        }
    }
}
