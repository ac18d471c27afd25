//! Which gRPC status an error becomes.

use nacelle_image::ErrorKind;
use nacelle_sandbox::{Error, Missed, NetworkError};
use tonic::{Code, Status};

/// The status for an error of the sandbox layer.
pub fn of_sandbox(error: &Error) -> Status {
    let code = match error {
        Error::Image(error) => return of_image(error),
        Error::Network(NetworkError::Invalid(_)) => Code::InvalidArgument,
        Error::Network(NetworkError::NotConfigured(_)) => Code::FailedPrecondition,
        Error::SandboxNotFound(_) | Error::ContainerNotFound(_) => Code::NotFound,
        Error::AmbiguousId(_) | Error::Invalid(_) | Error::Command(_) => Code::InvalidArgument,
        Error::NameTaken { .. } => Code::AlreadyExists,
        Error::State { .. } | Error::GuestGone { .. } | Error::Locked { .. } => Code::FailedPrecondition,
        Error::Exhausted(_) => Code::ResourceExhausted,
        Error::Deadline { .. } => Code::DeadlineExceeded,
        _ => Code::Unknown,
    };
    Status::new(code, error.to_string())
}

/// The status for an error of the image layer.
pub fn of_image(error: &nacelle_image::Error) -> Status {
    let code = match error.kind() {
        ErrorKind::InvalidReference => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Unauthorized => Code::PermissionDenied,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::Refused | ErrorKind::Locked | ErrorKind::Configuration => Code::FailedPrecondition,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Store => Code::Unknown,
    };
    Status::new(code, error.to_string())
}

/// The status for a streaming request that cannot be left at the door.
pub fn of_token(error: &nacelle_streaming::TokenError) -> Status {
    let code = match error {
        nacelle_streaming::TokenError::TooMany => Code::ResourceExhausted,
        nacelle_streaming::TokenError::Random(_) => Code::Unavailable,
    };
    Status::new(code, error.to_string())
}

/// The status for a listener that was too slow.
pub fn of_missed(missed: Missed) -> Status {
    let Missed(events) = missed;
    Status::resource_exhausted(format!(
        "{events} events were not fetched in time and are lost: list the pods and containers, and ask for events again"
    ))
}

/// A fault of our own.
pub fn internal(error: &impl std::fmt::Display) -> Status {
    Status::internal(format!("internal error: {error}"))
}

/// A request that does not fit the state.
pub fn wrong_state(problem: String) -> Status {
    Status::failed_precondition(problem)
}

/// A field that is missing or wrong.
pub fn invalid(field: &str, problem: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {problem}"))
}

/// A field that asks for what is not there (yet).
pub fn unsupported(field: &str, problem: impl std::fmt::Display) -> Status {
    Status::unimplemented(format!("{field}: {problem}"))
}
