//! What can go wrong with a pod.

use std::path::PathBuf;
use std::time::Duration;

/// An error of this crate. The message names the thing and, where there is one, the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No sandbox has this id.
    #[error("no sandbox {0:?}")]
    SandboxNotFound(String),
    /// No container has this id.
    #[error("no container {0:?}")]
    ContainerNotFound(String),
    /// A truncated id fits several.
    #[error("id {0:?} is ambiguous: give more of its digits")]
    AmbiguousId(String),
    /// The name is taken.
    #[error("the name {name:?} is reserved for {owner}: remove that first")]
    NameTaken {
        /// The name.
        name: String,
        /// Id of its owner.
        owner: String,
    },
    /// The request does not fit the state.
    #[error("{thing} is {state}: cannot {action}")]
    State {
        /// What was addressed.
        thing: String,
        /// Its state.
        state: String,
        /// What was asked.
        action: &'static str,
    },
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The command could not be executed.
    #[error("{0}")]
    Command(String),
    /// The host or guest has no more of something.
    #[error("{0}")]
    Exhausted(String),
    /// The guest did not come up.
    #[error("guest of sandbox {id} did not start: {reason}{console}")]
    Boot {
        /// Sandbox id.
        id: String,
        /// Why.
        reason: String,
        /// Its last console lines, each on a line of its own; may be empty.
        console: String,
    },
    /// The guest ended while it was needed.
    #[error("sandbox {id} has no running guest: {reason}")]
    GuestGone {
        /// Sandbox id.
        id: String,
        /// Why.
        reason: String,
    },
    /// Something took too long.
    #[error("{action} took longer than {limit:?}")]
    Deadline {
        /// What took so long.
        action: String,
        /// The limit.
        limit: Duration,
    },
    /// The agent refused or failed.
    #[error("{action}: {message}")]
    Agent {
        /// What was asked.
        action: String,
        /// The agent's words.
        message: String,
    },
    /// Output was asked for that the guest no longer has.
    #[error("{action}: the guest has it from byte {start} on only")]
    OutputGone {
        /// What was asked.
        action: String,
        /// First byte that is there.
        start: u64,
    },
    /// The VMM refused or failed.
    #[error("{action}: {source}")]
    Vmm {
        /// What was asked.
        action: String,
        /// Why not.
        source: nacelle_vmm::control::ClientError,
    },
    /// The pod cannot join its network, or not leave it.
    #[error("network of the pod: {0}")]
    Network(#[from] nacelle_network::Error),
    /// The image's files are not to be had.
    #[error(transparent)]
    Image(#[from] nacelle_image::Error),
    /// A file operation failed.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A record on disk cannot be read.
    #[error("record {path} cannot be read ({reason})", path = path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Another daemon owns the directory.
    #[error("{path} is in use by another nacelle daemon{holder}: stop it or configure another root", path = path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// " (process N)" where known.
        holder: String,
    },
    /// A program of the host failed.
    #[error("{program} failed: {message}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Its words.
        message: String,
    },
    /// A fault of our own.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// For `map_err` on file operations.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// As an error of a file operation, of the same kind and with its whole message.
    pub(crate) fn into_io(self) -> std::io::Error {
        let kind = match &self {
            Self::Io { source, .. } => source.kind(),
            _ => std::io::ErrorKind::Other,
        };
        std::io::Error::new(kind, self)
    }
}
