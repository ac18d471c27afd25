//! How a command ended, as the client's error stream wants to hear it.

use bytes::Bytes;
use serde_json::json;

use crate::backend::Failure;

/// What is said of an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wording {
    /// Words, and only if it failed: protocols before version 4.
    Text,
    /// A Status object of the Kubernetes API.
    Status,
}

/// The message for the error stream; empty for none.
pub fn message(result: &Result<i32, Failure>, wording: Wording) -> Bytes {
    let (text, status) = match result {
        Ok(0) => (String::new(), json!({ "metadata": {}, "status": "Success" })),
        Ok(code) => {
            let text = format!("command terminated with non-zero exit code {code}");
            let causes = json!([{ "reason": "ExitCode", "message": code.to_string() }]);
            let status = json!({
                "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode", "message": text,
                "details": { "causes": causes },
            });
            (text, status)
        }
        Err(Failure(text)) => {
            let status = json!({
                "metadata": {}, "status": "Failure", "reason": "InternalError", "message": text, "code": 500,
            });
            (text.clone(), status)
        }
    };
    match wording {
        Wording::Text => text.into(),
        Wording::Status => status.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_is_the_cause_that_clients_look_for() {
        let message = message(&Ok(42), Wording::Status);
        let status: serde_json::Value = serde_json::from_slice(&message).unwrap();
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0], json!({ "reason": "ExitCode", "message": "42" }));
    }

    #[test]
    fn success_is_silent_in_words_and_said_in_a_status() {
        assert!(message(&Ok(0), Wording::Text).is_empty());
        assert!(String::from_utf8_lossy(&message(&Ok(0), Wording::Status)).contains("\"Success\""));
        let failure = Err(Failure("no such thing".into()));
        assert_eq!(message(&failure, Wording::Text), "no such thing");
    }
}
