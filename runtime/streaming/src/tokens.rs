//! One-time tokens: what a call of the CRI asked for, until the client comes for it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::time::Instant;

use crate::backend::Request;

/// How long a token may lie, as the field has it.
const LIFE: Duration = Duration::from_secs(60);
/// Most tokens outstanding.
const LIMIT: usize = 1000;
/// Random bytes of a token; they make eight characters.
const BYTES: usize = 6;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// See [`LIMIT`].
    #[error("{LIMIT} streaming requests wait for their clients already: try again in a minute")]
    TooMany,
    /// The system has none.
    #[error("no random numbers for a token: {0}")]
    Random(rustix::io::Errno),
}

/// The tokens outstanding.
#[derive(Debug, Default)]
pub struct Tokens {
    table: Mutex<HashMap<String, (Instant, Request)>>,
}

impl Tokens {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Instant, Request)>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A token for a request.
    ///
    /// # Errors
    /// Too many are outstanding.
    pub fn issue(&self, request: Request) -> Result<String, TokenError> {
        let mut table = self.lock();
        // A request that nobody came for has a whole command in it.
        table.retain(|_, (issued, _)| issued.elapsed() < LIFE);
        if table.len() >= LIMIT {
            return Err(TokenError::TooMany);
        }
        let mut token = random()?;
        while table.contains_key(&token) {
            token = random()?;
        }
        table.insert(token.clone(), (Instant::now(), request));
        Ok(token)
    }

    /// What a token stands for, once and in time.
    pub fn redeem(&self, token: &str) -> Option<Request> {
        let (issued, request) = self.lock().remove(token)?;
        (issued.elapsed() < LIFE).then_some(request)
    }
}

fn random() -> Result<String, TokenError> {
    let mut bytes = [0; BYTES];
    // So few bytes come at once or not at all.
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(TokenError::Random)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request::PortForward { sandbox: "s".into() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_is_good_once_and_for_a_minute() {
        let tokens = Tokens::default();
        let token = tokens.issue(request()).unwrap();
        assert_eq!(token.len(), 8);
        assert_eq!(tokens.redeem("other"), None);
        assert_eq!(tokens.redeem(&token), Some(request()));
        assert_eq!(tokens.redeem(&token), None);
        let late = tokens.issue(request()).unwrap();
        tokio::time::advance(LIFE).await;
        assert_eq!(tokens.redeem(&late), None);
    }

    #[tokio::test(start_paused = true)]
    async fn there_are_only_so_many_until_they_expire() {
        let tokens = Tokens::default();
        for _ in 0..LIMIT {
            tokens.issue(request()).unwrap();
        }
        assert!(matches!(tokens.issue(request()), Err(TokenError::TooMany)));
        tokio::time::advance(LIFE).await;
        tokens.issue(request()).unwrap();
        assert_eq!(tokens.lock().len(), 1, "what has expired is not kept");
    }
}
