//! Which gRPC status an error becomes.

use nacelle_image::ErrorKind;
use nacelle_sandbox::Error;
use tonic::{Code, Status};

/// The status for an error of the sandbox layer.
pub fn of_sandbox(error: &Error) -> Status {
    let code = match error {
        Error::Image(error) => return of_image(error),
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
        ErrorKind::Refused | ErrorKind::Locked => Code::FailedPrecondition,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Store => Code::Unknown,
    };
    Status::new(code, error.to_string())
}

/// A field that is missing or wrong.
pub fn invalid(field: &str, problem: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {problem}"))
}

/// A field that asks for what is not there (yet).
pub fn unsupported(field: &str, problem: impl std::fmt::Display) -> Status {
    Status::unimplemented(format!("{field}: {problem}"))
}
