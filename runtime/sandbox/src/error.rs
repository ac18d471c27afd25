//! What can go wrong with a pod.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use nacelle_vmm::control::ClientError;

/// What a failure means to the caller; gRPC status codes are chosen from this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// There is no such thing.
    NotFound,
    /// There is such a thing already.
    Exists,
    /// The request is wrong, whatever the state.
    Invalid,
    /// The request does not fit the state.
    State,
    /// A limit, the disk or the memory is exhausted.
    Exhausted,
    /// It took too long.
    Timeout,
    /// Guest or VMM were not reached: later may be better.
    Unreachable,
    /// What was to be kept is lost.
    Lost,
    /// Something failed that is to work.
    Failed,
    /// A fault of our own.
    Internal,
}

/// What a failure of an agent's means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentFailure {
    /// It has no such container or process.
    NotFound,
    /// It has such a container or process already.
    Exists,
    /// The request does not fit the state.
    State,
    /// Something took too long in the guest.
    Timeout,
    /// It was not reached, or the connection ended.
    Unreachable,
    /// Something failed in the guest.
    Other,
}

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
    /// The pod is listed as its record says, and not taken over yet.
    #[error("sandbox {id} is not taken over yet, which is tried again: {reason}")]
    NotAdopted {
        /// Sandbox id.
        id: String,
        /// Why not.
        reason: String,
    },
    /// The pod's or container's record cannot be used by this version: it is kept as it is.
    #[error("{thing} is kept as it is: {reason}")]
    Kept {
        /// What was addressed.
        thing: String,
        /// Why.
        reason: String,
    },
    /// The operation was given up because the pod was asked to end.
    #[error("the pod is being stopped")]
    Overtaken,
    /// Something took too long.
    #[error("{action} took longer than {limit:?}")]
    Deadline {
        /// What took so long.
        action: String,
        /// The limit.
        limit: Duration,
    },
    /// A command ran into its caller's limit.
    #[error("command timed out: it ran for longer than {0:?} and was killed")]
    TimedOut(Duration),
    /// The agent refused or failed.
    #[error("{action}: {message}")]
    Agent {
        /// What was asked.
        action: String,
        /// What it means.
        kind: AgentFailure,
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
        source: ClientError,
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
        source: io::Error,
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
    /// What this failure means to the caller. What comes from the image store has a kind of its
    /// own, see [`nacelle_image::Error::kind`].
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::SandboxNotFound(_) | Self::ContainerNotFound(_) => ErrorKind::NotFound,
            Self::NameTaken { .. } => ErrorKind::Exists,
            Self::AmbiguousId(_) | Self::Invalid(_) | Self::Command(_) => ErrorKind::Invalid,
            Self::State { .. } | Self::GuestGone { .. } | Self::Locked { .. } | Self::Kept { .. } | Self::Overtaken => {
                ErrorKind::State
            }
            Self::NotAdopted { .. } => ErrorKind::Unreachable,
            Self::Exhausted(_) => ErrorKind::Exhausted,
            Self::Deadline { .. } | Self::TimedOut(_) => ErrorKind::Timeout,
            Self::Agent { kind, .. } => match kind {
                AgentFailure::NotFound => ErrorKind::NotFound,
                AgentFailure::Exists => ErrorKind::Exists,
                AgentFailure::State => ErrorKind::State,
                AgentFailure::Timeout => ErrorKind::Timeout,
                AgentFailure::Unreachable => ErrorKind::Unreachable,
                AgentFailure::Other => ErrorKind::Failed,
            },
            Self::Vmm { source, .. } => match source {
                ClientError::Connect { .. } | ClientError::Send(_) | ClientError::Receive(_) | ClientError::Closed => {
                    ErrorKind::Unreachable
                }
                _ => ErrorKind::Failed,
            },
            Self::Network(error) => of_network(error),
            Self::Io { source, .. } => of_io(source),
            Self::OutputGone { .. } => ErrorKind::Lost,
            Self::Image(_) | Self::Boot { .. } | Self::Record { .. } | Self::Program { .. } => ErrorKind::Failed,
            Self::Internal(_) => ErrorKind::Internal,
        }
    }

    /// For `map_err` on file operations.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// As an error of a file operation, of the same kind and with its whole message.
    pub(crate) fn into_io(self) -> io::Error {
        let kind = match &self {
            Self::Io { source, .. } => source.kind(),
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, self)
    }
}

fn of_network(error: &nacelle_network::Error) -> ErrorKind {
    use nacelle_network::Error as Network;
    match error {
        Network::Invalid(_) => ErrorKind::Invalid,
        Network::NotConfigured(_) | Network::Configuration { .. } | Network::PluginMissing { .. } => ErrorKind::State,
        Network::Timeout { .. } => ErrorKind::Timeout,
        Network::Left { .. } | Network::NotUndone { .. } | Network::Locked { .. } | Network::Busy { .. } => {
            ErrorKind::Unreachable
        }
        Network::System { source, .. } | Network::Path { source, .. } => of_io(source),
        _ => ErrorKind::Failed,
    }
}

fn of_io(error: &io::Error) -> ErrorKind {
    let descriptors = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE].map(rustix::io::Errno::raw_os_error);
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::OutOfMemory => ErrorKind::Exhausted,
        _ if error.raw_os_error().is_some_and(|code| descriptors.contains(&code)) => ErrorKind::Exhausted,
        _ => ErrorKind::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_exhausted_or_out_of_reach_is_told_from_what_failed() {
        use rustix::io::Errno;
        let on_disk = |errno: Errno| Error::io("write", "/x")(errno.into()).kind();
        for errno in [Errno::NOSPC, Errno::DQUOT, Errno::MFILE, Errno::NFILE, Errno::NOMEM] {
            assert_eq!(on_disk(errno), ErrorKind::Exhausted, "{errno}");
        }
        assert_eq!(on_disk(Errno::IO), ErrorKind::Failed);
        let system =
            |source: io::Error| Error::Network(nacelle_network::Error::System { action: "make a tap", source });
        assert_eq!(system(Errno::NFILE.into()).kind(), ErrorKind::Exhausted);
        let vmm = |source| Error::Vmm { action: "add a disk".into(), source }.kind();
        assert_eq!(vmm(ClientError::Closed), ErrorKind::Unreachable);
        assert_eq!(vmm(ClientError::Refused("no".into())), ErrorKind::Failed);
    }

    #[test]
    fn what_the_agent_says_is_told_from_what_never_reached_it() {
        use tonic::{Code, Status};
        let kind = |status: &Status| crate::agent::error("ask", status).kind();
        for (code, expected) in [
            (Code::NotFound, ErrorKind::NotFound),
            (Code::AlreadyExists, ErrorKind::Exists),
            (Code::FailedPrecondition, ErrorKind::State),
            (Code::InvalidArgument, ErrorKind::Invalid),
            (Code::ResourceExhausted, ErrorKind::Exhausted),
            (Code::DeadlineExceeded, ErrorKind::Timeout),
            (Code::Unavailable, ErrorKind::Unreachable),
            (Code::Internal, ErrorKind::Failed),
            (Code::Unknown, ErrorKind::Failed),
        ] {
            assert_eq!(kind(&Status::new(code, "x")), expected, "{code:?}");
        }
        let lost = Status::from_error(Box::new(io::Error::from(io::ErrorKind::BrokenPipe)));
        assert_eq!(kind(&lost), ErrorKind::Unreachable, "{lost:?}");
    }
}
