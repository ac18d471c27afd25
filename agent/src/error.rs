//! What can go wrong in a call, and the one place where that becomes a gRPC status.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

use crate::log::{self, Level};

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
    /// The task of the call ended without a result.
    #[error("the call was lost: {0}")]
    Lost(#[from] tokio::task::JoinError),
}

/// Most bytes of a status message. It is a header of HTTP/2, in which any byte may become three, and the other side takes
/// 16 KiB of headers: above that it gives up the call and never sees the reason, above 64 KiB the connection with all
/// calls on it. Errors quote commands and specifications, which may be of any length.
const MESSAGE_LIMIT: usize = 4096;
/// What is kept of the end of a message that is cut: the reason stands behind what it is about.
const MESSAGE_END: usize = 1024;

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
            | Error::System { .. }
            | Error::Lost(_) => Code::Internal,
        };
        let level = if matches!(code, Code::Internal | Code::DeadlineExceeded) { Level::Error } else { Level::Info };
        log::line(level, &format!("refused a call: {error}"));
        Self::new(code, shorten(&error.to_string(), MESSAGE_LIMIT, MESSAGE_END))
    }
}

/// A text of at most `limit` bytes and a remark: of a longer one the middle is left out, and `end` bytes of its end are
/// kept.
pub fn shorten(text: &str, limit: usize, end: usize) -> Cow<'_, str> {
    if text.len() <= limit {
        return Cow::Borrowed(text);
    }
    let (head, tail) = (limit.saturating_sub(end), text.len().saturating_sub(end));
    let (head, tail) = (text.floor_char_boundary(head), text.ceil_char_boundary(tail));
    let left_out = tail.saturating_sub(head);
    let part = |range: std::ops::Range<usize>| text.get(range).unwrap_or_default();
    Cow::Owned(format!("{}[... {left_out} bytes ...]{}", part(0..head), part(tail..text.len())))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_long_message_keeps_what_it_is_about_and_the_reason() {
        let path = format!("/no/{}", "x".repeat(100_000));
        let error = Error::Command { path, reason: "no such file or directory".into() };
        let status = tonic::Status::from(error);
        assert!(status.message().starts_with("cannot execute \"/no/xxx"), "{status}");
        assert!(status.message().ends_with("xxx\": no such file or directory"), "{status}");
        assert!(status.message().len() < MESSAGE_LIMIT + 100);
        let short = Error::State("not now".into());
        assert_eq!(tonic::Status::from(short).message(), "not now");
    }

    proptest! {
        #[test]
        fn any_text_is_cut_between_its_characters(text in "\\PC{0,300}", limit in 0_usize..200, end in 0_usize..250) {
            let cut = shorten(&text, limit, end);
            if text.len() <= limit {
                prop_assert_eq!(&*cut, text.as_str());
            } else {
                let (head, rest) = cut.split_once("[... ").unwrap();
                prop_assert!(text.starts_with(head) || head.contains("[... "));
                prop_assert!(rest.contains(" bytes ...]"));
                prop_assert!(cut.len() <= limit.max(end) + 40);
            }
        }
    }
}
