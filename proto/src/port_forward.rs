//! Port forwarding between host and guest.
//!
//! Each connection to a port of the pod is one vsock connection, opened by the host to
//! [`PORT`]. The host sends one [`Header`] as a line of JSON ended by `\n`. The agent
//! connects to that port of the pod's loopback, 127.0.0.1 first and then \[::1\], and answers
//! with one [`Reply`] line. After an `ok` reply, raw bytes follow in both directions,
//! and shutting down one direction is passed on. A host that closes the connection whole
//! ends the other.

pub use crate::stdio::{LINE_LIMIT, Reply};

/// Guest port of port forwarding.
pub const PORT: u32 = 1026;

/// First line of a connection, host to agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The TCP port, 1 to 65535.
    pub port: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_and_only_a_port_is_one() {
        let line = serde_json::to_string(&Header { port: 65535 }).unwrap();
        assert_eq!(serde_json::from_str::<Header>(&line).unwrap(), Header { port: 65535 });
        for line in ["{}", r#"{"port":65536}"#, r#"{"port":-1}"#, r#"{"port":1,"host":"x"}"#] {
            assert!(serde_json::from_str::<Header>(line).is_err(), "accepted {line}");
        }
    }
}
