//! What can go wrong in a call, and the one place where that becomes a gRPC status.

use std::io;
use std::path::PathBuf;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense, whatever the state of the guest.
    #[error("{field}: {reason}")]
    Invalid { field: &'static str, reason: String },
    /// A command that the kernel does not execute.
    #[error("cannot execute {path:?}: {reason}")]
    Command { path: String, reason: String },
    #[error("container {0} does not exist")]
    NoContainer(String),
    #[error("container {container} has no exec process {exec}")]
    NoExec { container: String, exec: String },
    #[error("container {0} exists already")]
    ContainerExists(String),
    #[error("container {container} has an exec process {exec} already")]
    ExecExists { container: String, exec: String },
    /// The request makes sense, but not now.
    #[error("{0}")]
    State(String),
    /// A device that the host promised is not on the bus.
    #[error("no {kind} in PCI slot {slot}: {reason}")]
    Device { kind: &'static str, slot: u32, reason: String },
    /// The guest's kernel refuses what is to be configured on an interface.
    #[error(transparent)]
    Network(#[from] nacelle_netlink::Error),
    /// The helper that builds containers refused or died.
    #[error("cannot {action}: {reason}")]
    Helper { action: &'static str, reason: String },
    /// The system refused something the agent needs.
    #[error("cannot {action} {}: {source}", path.display())]
    Path { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot {action}: {source}")]
    System { action: &'static str, source: io::Error },
    /// Something took longer than it can be allowed to.
    #[error("{0}")]
    Timeout(String),
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error about `path`, from the error of a system call.
    pub fn path(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Path { action, path, source }
    }

    /// An error about no particular path.
    pub fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { action, source: source.into() }
    }

    /// A field of the request that cannot be.
    pub fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        use tonic::Code;
        let code = match &error {
            Error::Invalid { .. } | Error::Command { .. } => Code::InvalidArgument,
            Error::NoContainer(_) | Error::NoExec { .. } => Code::NotFound,
            Error::ContainerExists(_) | Error::ExecExists { .. } => Code::AlreadyExists,
            Error::State(_) => Code::FailedPrecondition,
            Error::Timeout(_) => Code::DeadlineExceeded,
            Error::Device { .. }
            | Error::Network(_)
            | Error::Helper { .. }
            | Error::Path { .. }
            | Error::System { .. } => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}
