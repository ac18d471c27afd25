//! What can go wrong with an image, in the terms a caller can act on.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::digest::Digest;

/// What a failure means to the caller; gRPC status codes are chosen from this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The reference is not one.
    InvalidReference,
    /// The registry, or the store, has no such image.
    NotFound,
    /// The registry wants other credentials.
    Unauthorized,
    /// The registry cannot be reached, or fails; later may be better.
    Unavailable,
    /// What arrived, or what lies in the store, is not what its digest promises.
    Corrupt,
    /// The image is well-formed, and not one that is run here.
    Refused,
    /// A limit or the disk is exhausted.
    Exhausted,
    /// What is configured for a registry cannot be used.
    Configuration,
    /// Another process has the store.
    Locked,
    /// The store's files cannot be read or written.
    Store,
}

/// A failure of the image store or of a pull. Cheap to clone: several callers may wait for one pull.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `reference` does not name an image.
    #[error("invalid image reference {reference:?}: {reason}")]
    InvalidReference {
        /// As given.
        reference: String,
        /// Which rule it breaks.
        reason: String,
    },
    /// Neither a tag nor a digest nor an id of an image in the store.
    #[error("no image {name:?} in the store; pull it first")]
    UnknownImage {
        /// As given.
        name: String,
    },
    /// The registry answered that it has no such thing.
    #[error("{what} does not exist on {registry} ({reason}); check the name and the tag")]
    NotFound {
        /// The image or blob.
        what: String,
        /// Host of the registry.
        registry: String,
        /// How it said so.
        reason: String,
    },
    /// The registry refused the credentials, or wants some.
    #[error("{registry} denies access to {what} ({reason}); check the name, or give credentials that may pull it")]
    Unauthorized {
        /// The image or blob.
        what: String,
        /// Host of the registry.
        registry: String,
        /// How it said so.
        reason: String,
    },
    /// No answer, or half of one, after all retries.
    #[error("cannot fetch {what} from {registry}: {reason}; check the registry's name, its state and the network")]
    Unavailable {
        /// The image or blob.
        what: String,
        /// Host of the registry.
        registry: String,
        /// The last failure.
        reason: String,
    },
    /// The registry has had more requests than it allows.
    #[error(
        "{registry} does not give {what} now ({reason}); try again later, or give credentials with a larger allowance"
    )]
    TooManyRequests {
        /// The image or blob.
        what: String,
        /// Host of the registry.
        registry: String,
        /// How it said so.
        reason: String,
    },
    /// The registry answered that it fails, or with what is no answer to that request.
    #[error("{registry} fails to give {what}: {reason}")]
    Failing {
        /// The image or blob.
        what: String,
        /// Host of the registry.
        registry: String,
        /// How it said so.
        reason: String,
    },
    /// What is configured for a registry is not understood.
    #[error("{what}: {reason}")]
    Configuration {
        /// File or address.
        what: String,
        /// Why not.
        reason: String,
    },
    /// Several servers were asked, and none gave the image.
    #[error("cannot pull {what}; {}", list(attempts))]
    AllEndpoints {
        /// The image.
        what: String,
        /// The servers in the order in which they were asked, and what became of it; never empty.
        attempts: Vec<(String, Error)>,
    },
    /// Bytes that are not what they should be.
    #[error("{what} is corrupt: {reason}")]
    Corrupt {
        /// Which manifest, config, layer or file of the store.
        what: String,
        /// How that shows.
        reason: String,
    },
    /// Content that is refused although it is intact.
    #[error("{what} is refused: {reason}")]
    Refused {
        /// Which image, or entry of a layer.
        what: String,
        /// Why.
        reason: String,
    },
    /// More than a limit allows.
    #[error("{what} exceeds a limit: {reason}")]
    Limit {
        /// Which image or layer.
        what: String,
        /// The limit.
        reason: String,
    },
    /// The store belongs to another process.
    #[error("image store {} is in use by {holder}; stop that one or choose another directory", root.display())]
    Locked {
        /// Root of the store.
        root: PathBuf,
        /// Process id and name of the holder.
        holder: String,
    },
    /// A file operation of the store failed.
    #[error("cannot {action} {}", path.display())]
    Store {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: Arc<io::Error>,
    },
    /// The pull was given up before its end.
    #[error("pull of {what} was cancelled")]
    Cancelled {
        /// The image or layer.
        what: String,
    },
}

fn list(attempts: &[(String, Error)]) -> String {
    attempts.iter().map(|(server, error)| format!("{server}: {error}")).collect::<Vec<_>>().join("; ")
}

/// Shorthand for this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// What this failure means to the caller.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidReference { .. } => ErrorKind::InvalidReference,
            Self::UnknownImage { .. } | Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Unauthorized { .. } => ErrorKind::Unauthorized,
            Self::Unavailable { .. } | Self::TooManyRequests { .. } | Self::Failing { .. } | Self::Cancelled { .. } => {
                ErrorKind::Unavailable
            }
            Self::Configuration { .. } => ErrorKind::Configuration,
            // The last is the registry itself: what it says counts.
            Self::AllEndpoints { attempts, .. } => {
                attempts.last().map_or(ErrorKind::Unavailable, |(_, error)| error.kind())
            }
            Self::Corrupt { .. } => ErrorKind::Corrupt,
            Self::Refused { .. } => ErrorKind::Refused,
            Self::Limit { .. } => ErrorKind::Exhausted,
            Self::Locked { .. } => ErrorKind::Locked,
            Self::Store { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::Exhausted,
                _ => ErrorKind::Store,
            },
        }
    }

    /// Whether the disk has no room.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self, Self::Store { .. }) && self.kind() == ErrorKind::Exhausted
    }

    /// An adapter for `map_err`: `action` on `path` failed.
    pub(crate) fn store(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Store { action, path, source: Arc::new(source) }
    }

    pub(crate) fn corrupt(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn refused(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Refused { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn limit(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Limit { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn wrong_digest(what: impl Into<String>, expected: &Digest, found: &Digest) -> Self {
        Self::corrupt(what, format!("expected digest {expected}, found {found}"))
    }
}
