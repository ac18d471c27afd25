//! Which gRPC status an error becomes, and how much of it is told.

use nacelle_image::ErrorKind as ImageErrorKind;
use nacelle_sandbox::{Error, ErrorKind, Missed};
use tonic::{Code, Status};

/// Most bytes of a text that leaves in an answer. A status travels in a header, where clients take 16 KiB and each byte
/// may become three; what a container says of its end goes into the cluster's store.
const TEXT_LIMIT: usize = 4096;

/// The status for an error of the sandbox layer.
pub fn of_sandbox(error: &Error) -> Status {
    if let Error::Image(error) = error {
        return of_image(error);
    }
    let code = match error.kind() {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Exists => Code::AlreadyExists,
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::State => Code::FailedPrecondition,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Timeout => Code::DeadlineExceeded,
        ErrorKind::Unreachable => Code::Unavailable,
        ErrorKind::Lost => Code::DataLoss,
        ErrorKind::Failed => Code::Unknown,
        ErrorKind::Internal => Code::Internal,
    };
    status(code, error)
}

/// A status with as much of its message as is taken.
fn status(code: Code, message: impl std::fmt::Display) -> Status {
    Status::new(code, bounded(message.to_string()))
}

/// A text as it is, or its beginning and its end, where reasons tend to be.
pub fn bounded(text: String) -> String {
    if text.len() <= TEXT_LIMIT {
        return text;
    }
    // With room for what is said of the rest.
    let begin = text.floor_char_boundary(TEXT_LIMIT / 2);
    let end = text.ceil_char_boundary(text.len().saturating_sub(TEXT_LIMIT / 2 - 64));
    let (head, tail) = (text.get(..begin).unwrap_or_default(), text.get(end..).unwrap_or_default());
    format!("{head} […{} bytes left out…] {tail}", end.saturating_sub(begin))
}

/// The status for an error of the image layer.
pub fn of_image(error: &nacelle_image::Error) -> Status {
    let code = match error.kind() {
        ImageErrorKind::InvalidReference => Code::InvalidArgument,
        ImageErrorKind::NotFound => Code::NotFound,
        ImageErrorKind::Unauthorized => Code::PermissionDenied,
        ImageErrorKind::Unavailable => Code::Unavailable,
        ImageErrorKind::Corrupt => Code::DataLoss,
        ImageErrorKind::Refused | ImageErrorKind::Locked | ImageErrorKind::Configuration => Code::FailedPrecondition,
        ImageErrorKind::Exhausted => Code::ResourceExhausted,
        ImageErrorKind::Store => Code::Unknown,
    };
    status(code, error)
}

/// The status for a streaming request that cannot be left at the door.
pub fn of_token(error: &nacelle_streaming::TokenError) -> Status {
    let code = match error {
        nacelle_streaming::TokenError::TooMany => Code::ResourceExhausted,
        nacelle_streaming::TokenError::Random(_) => Code::Unavailable,
    };
    status(code, error)
}

/// The status for a listener that was too slow.
pub fn of_missed(missed: Missed) -> Status {
    let Missed(events) = missed;
    status(
        Code::ResourceExhausted,
        format_args!(
            "{events} events were not fetched in time and are lost: list the pods and containers, and ask again"
        ),
    )
}

/// A fault of our own.
pub fn internal(error: &impl std::fmt::Display) -> Status {
    status(Code::Internal, format_args!("internal error: {error}"))
}

/// Something that is not there.
pub fn not_found(problem: impl std::fmt::Display) -> Status {
    status(Code::NotFound, problem)
}

/// A request that does not fit the state.
pub fn wrong_state(problem: impl std::fmt::Display) -> Status {
    status(Code::FailedPrecondition, problem)
}

/// A field that is missing or wrong.
pub fn invalid(field: &str, problem: impl std::fmt::Display) -> Status {
    status(Code::InvalidArgument, format_args!("{field}: {problem}"))
}

/// A field that asks for what is not there (yet).
pub fn unsupported(field: &str, problem: impl std::fmt::Display) -> Status {
    status(Code::Unimplemented, format_args!("{field}: {problem}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nacelle_sandbox::AgentFailure;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_client_can_tell_what_to_try_again_from_what_to_give_up() {
        let agent = |kind| Error::Agent { action: "exec".into(), kind, message: "x".into() };
        let disk = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        for (error, code) in [
            (agent(AgentFailure::Unreachable), Code::Unavailable),
            (agent(AgentFailure::NotFound), Code::NotFound),
            (agent(AgentFailure::State), Code::FailedPrecondition),
            (agent(AgentFailure::Other), Code::Unknown),
            (Error::Io { action: "write", path: "/x".into(), source: disk() }, Code::ResourceExhausted),
            (Error::TimedOut(Duration::from_secs(1)), Code::DeadlineExceeded),
            (Error::Internal("x".into()), Code::Internal),
        ] {
            assert_eq!(of_sandbox(&error).code(), code, "{error:?}");
        }
    }

    #[test]
    fn the_reason_behind_a_long_command_is_told() {
        let error = Error::Command(format!("cannot execute {:?}: no such file", "x".repeat(16 << 10)));
        let status = of_sandbox(&error);
        assert!(status.message().starts_with("cannot execute \"xxx"), "{}", status.message());
        assert!(status.message().ends_with("xxx\": no such file"), "{}", status.message());
        assert!(status.message().contains("bytes left out"), "{}", status.message());
    }

    proptest! {
        #[test]
        fn every_message_is_bounded_and_short_ones_are_whole(piece in "[aü𝄞\n]{1,9}", times in 0_usize..3000) {
            let text = piece.repeat(times);
            let found = invalid("f", &text);
            prop_assert!(found.message().len() <= TEXT_LIMIT);
            if text.len() + 3 <= TEXT_LIMIT {
                prop_assert_eq!(found.message(), format!("f: {text}"));
            }
        }
    }
}
