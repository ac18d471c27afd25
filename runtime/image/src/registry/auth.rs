//! Who is asking.

use std::fmt;

/// What a registry may be told to let the caller pull.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A name and a password, for the registry or for the token server it names.
    Basic {
        /// The name.
        username: String,
        /// The password.
        password: String,
    },
    /// A token that the registry itself takes.
    Bearer {
        /// The token.
        token: String,
    },
    /// A token for which the token server gives others (OAuth2).
    Refresh {
        /// The token.
        token: String,
    },
}

/// Credentials, and for whom they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// What is told.
    pub credentials: Credentials,
    /// The one server that they are for, as host and port or URL; None for whichever server has the image, mirrors
    /// included.
    pub server: Option<String>,
}

impl From<Credentials> for Login {
    fn from(credentials: Credentials) -> Self {
        Self { credentials, server: None }
    }
}

impl Credentials {
    /// Takes apart the `auth` field of a Docker configuration: base64 of `NAME:PASSWORD`.
    ///
    /// # Errors
    /// Says what is wrong with it, without its content.
    pub fn from_basic(encoded: &str) -> Result<Self, &'static str> {
        let bytes = decode_base64(encoded.trim()).ok_or("is not base64")?;
        let text = String::from_utf8(bytes).map_err(|_| "does not hold text")?;
        let (username, password) = text.split_once(':').ok_or("does not hold NAME:PASSWORD")?;
        // Some tools pad the password with NULs.
        let password = password.trim_end_matches('\0');
        Ok(Self::Basic { username: username.to_owned(), password: password.to_owned() })
    }
}

/// Without the secrets.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Basic { username, .. } => f.debug_struct("Basic").field("username", username).finish_non_exhaustive(),
            Self::Bearer { .. } => f.debug_struct("Bearer").finish_non_exhaustive(),
            Self::Refresh { .. } => f.debug_struct("Refresh").finish_non_exhaustive(),
        }
    }
}

fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    let mut decoded = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for group in text.as_bytes().chunks(4) {
        let mut bits = 0u32;
        for byte in group {
            let value = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' | b'-' => 62,
                b'/' | b'_' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        let [_, a, b, c] = (bits << (6 * (4 - group.len()))).to_be_bytes();
        match group.len() {
            4 => decoded.extend([a, b, c]),
            3 => decoded.extend([a, b]),
            2 => decoded.push(a),
            _ => return None,
        }
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_auth_is_taken_apart() {
        let basic = |username: &str, password: &str| Credentials::Basic {
            username: username.into(),
            password: password.into(),
        };
        assert_eq!(Credentials::from_basic("dXNlcjpwYXNz"), Ok(basic("user", "pass")));
        assert_eq!(Credentials::from_basic("dTpwOg=="), Ok(basic("u", "p:")));
        assert_eq!(Credentials::from_basic("dTo="), Ok(basic("u", "")));
        for bad in ["", "dXNlcg==", "d", "dX!l", "/w=="] {
            assert!(Credentials::from_basic(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let basic = Credentials::Basic { username: "user".into(), password: "secret".into() };
        let bearer = Credentials::Bearer { token: "secret".into() };
        let refresh = Credentials::Refresh { token: "secret".into() };
        assert!(!format!("{basic:?}{bearer:?}{refresh:?}").contains("secret"));
    }
}
