//! A layer on its way from the registry's bytes to an EROFS image and a tree.
//!
//! Everything happens in one pass on one blocking thread: the compressed stream is hashed and decompressed, the
//! archive hashed and read, file content written to the image as it comes. No name of the archive ever becomes a name
//! on the host, and memory is bounded by [`Limits`](crate::Limits), whatever the layer's size.

mod build;
mod compression;
mod intake;
mod name;
mod xattr;

#[cfg(test)]
mod tests;

pub(crate) use build::{BuiltLayer, Expected, build};

use crate::error::Error;
use crate::tar::TarError;

/// A layer cannot be taken in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    /// The archive, or its compression, is damaged.
    #[error("{0}")]
    Corrupt(String),
    /// An entry is intact, and refused.
    #[error("entry {entry:?}: {reason}")]
    Refused { entry: String, reason: String },
    /// Compressed in a way that layers may not be, by its name.
    #[error("it is compressed by {0}; layers may be compressed by gzip or zstd")]
    Compression(&'static str),
    /// More than [`Limits`](crate::Limits) allows.
    #[error("{0}")]
    Limit(String),
    /// The compressed stream ended early or failed; who feeds it knows why.
    #[error("cannot read the layer")]
    Input(#[source] std::io::Error),
    /// The store failed.
    #[error(transparent)]
    Store(Error),
}

impl LayerError {
    fn refused(entry: &[u8], reason: impl Into<String>) -> Self {
        let entry = String::from_utf8_lossy(entry).chars().take(512).collect();
        Self::Refused { entry, reason: reason.into() }
    }

    /// As the error of the whole crate, about `what`.
    pub(crate) fn about(self, what: &str) -> Error {
        match self {
            Self::Corrupt(reason) => Error::corrupt(what, reason),
            Self::Refused { entry, reason } => Error::refused(format!("entry {entry:?} of {what}"), reason),
            Self::Compression(_) => Error::refused(what, self.to_string()),
            Self::Limit(reason) => Error::limit(what, reason),
            Self::Input(error) => Error::corrupt(what, error.to_string()),
            Self::Store(error) => error,
        }
    }
}

impl From<TarError> for LayerError {
    fn from(error: TarError) -> Self {
        match error {
            TarError::Read(error) => Self::Input(error),
            TarError::TooLarge { .. } => Self::Limit(error.to_string()),
            TarError::Malformed { .. } => Self::Corrupt(error.to_string()),
        }
    }
}
