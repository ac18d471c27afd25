//! Standard streams between host and guest.
//!
//! Each stream of each process is one vsock connection, opened by the host to
//! [`STDIO_PORT`]. The host sends one [`Header`] as a line of JSON ended by `\n`; the
//! agent answers with one [`Reply`] line. After an `ok` reply:
//!
//! * `stdin`: the host sends raw bytes; shutting down its sending side closes the
//!   process's standard input (for a terminal it sends the end-of-file character), and the
//!   agent says so by one byte, [`CLOSED`]. A host that is not there to receive it, because
//!   it closed the connection or ended, leaves the input open for another connection.
//! * `stdout`, `stderr`: the agent sends raw bytes beginning at the requested offset of
//!   the stream; the end of the connection's receiving side is the end of the stream.
//!   A stream ends when the last process that holds it lets go, and all of it is sent: an
//!   exec process may be over (`Wait` has answered) while a child of it still writes.
//!   The host acknowledges with 8-byte little-endian cumulative offsets, sent whenever it
//!   has made the bytes below that offset durable; the agent keeps every byte until it is
//!   acknowledged, up to [`BUFFER_BYTES`] a stream, and reads no more from the process
//!   when the buffer is full. A connection that breaks loses nothing: the host opens
//!   another with the last durable offset. Only one connection a stream is live: a newer
//!   one displaces the older.

use std::fmt;

/// Guest port of the agent's gRPC service.
pub const AGENT_PORT: u32 = 1024;
/// Guest port of the standard streams.
pub const STDIO_PORT: u32 = 1025;
/// Host port the agent connects to once, as soon as both guest ports listen. It sends
/// one line: `ready <agent version>`.
pub const READY_PORT: u32 = 1024;
/// Unacknowledged output the agent keeps for each stream, in bytes.
pub const BUFFER_BYTES: usize = 1 << 20;
/// Longest header or reply line, in bytes, the newline included.
pub const LINE_LIMIT: usize = 4096;

/// What the agent answers once it has closed a process's standard input.
pub const CLOSED: u8 = 0;

/// Which of a process's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard input.
    Stdin,
    /// Standard output, or the terminal's output.
    Stdout,
    /// Standard error; a process with a terminal has none.
    Stderr,
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        })
    }
}

/// First line of a connection, host to agent.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The container.
    pub container_id: String,
    /// The exec process in it, or empty for the container's own process.
    #[serde(default)]
    pub exec_id: String,
    /// The stream asked for.
    pub stream: Stream,
    /// First byte wanted, counted from the start of the stream. 0 for stdin.
    #[serde(default)]
    pub offset: u64,
}

/// The agent's answer to a [`Header`].
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// Empty if the stream follows, otherwise why it does not; the connection then ends.
    #[serde(default)]
    pub error: String,
    /// First byte that is there, if the stream does not follow because the one asked for
    /// was acknowledged before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_one_line_that_reads_back() {
        let longest_names = Header {
            container_id: "c".repeat(64),
            exec_id: "e\n\"\\".to_owned(),
            stream: Stream::Stderr,
            offset: u64::MAX,
        };
        let line = serde_json::to_string(&longest_names).unwrap();
        assert!(!line.contains('\n'), "a newline would end the header early: {line}");
        assert!(line.len() < LINE_LIMIT);
        assert_eq!(serde_json::from_str::<Header>(&line).unwrap(), longest_names);
    }

    #[test]
    fn a_header_names_its_stream_in_lower_case() {
        for (stream, name) in [(Stream::Stdin, "stdin"), (Stream::Stdout, "stdout"), (Stream::Stderr, "stderr")] {
            assert_eq!(stream.to_string(), name);
            let line = format!(r#"{{"container_id":"c","stream":"{name}"}}"#);
            let header: Header = serde_json::from_str(&line).unwrap();
            let expected = Header { container_id: "c".to_owned(), exec_id: String::new(), stream, offset: 0 };
            assert_eq!(header, expected, "exec_id and offset may be left out");
        }
    }

    #[test]
    fn a_wrong_header_is_refused() {
        for line in [
            "",
            "null",
            r#"{"stream":"stdout"}"#,
            r#"{"container_id":"c"}"#,
            r#"{"container_id":"c","stream":"stdout","ofset":1}"#,
            r#"{"container_id":"c","stream":"Stdout"}"#,
            r#"{"container_id":"c","stream":"stdout","offset":-1}"#,
            r#"{"container_id":"c","stream":"stdout","offset":18446744073709551616}"#,
            r#"{"container_id":"c","stream":"stdout"} x"#,
        ] {
            assert!(serde_json::from_str::<Header>(line).is_err(), "accepted {line}");
        }
    }

    #[test]
    fn a_reply_reads_back_and_is_ok_when_empty() {
        let refusal = Reply { error: "no container \"c\"\nhere".to_owned(), start: Some(5) };
        let line = serde_json::to_string(&refusal).unwrap();
        assert!(!line.contains('\n'), "a newline would end the reply early: {line}");
        assert_eq!(serde_json::from_str::<Reply>(&line).unwrap(), refusal);
        assert_eq!(serde_json::from_str::<Reply>("{}").unwrap(), Reply { error: String::new(), start: None });
        assert!(serde_json::from_str::<Reply>(r#"{"eror":"x"}"#).is_err(), "accepted an unknown field");
    }
}
