//! What the server needs of the pods behind it.

use std::future::Future;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::pipe::{Incoming, Outgoing};
use crate::resize::Resizes;

/// A command to be run in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exec {
    /// The container.
    pub container: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Which streams the client has for it.
    pub wanted: Wanted,
}

/// A container to attach to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attach {
    /// The container.
    pub container: String,
    /// Which streams the client has for it.
    pub wanted: Wanted,
}

/// Which streams a client wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// It has input.
    pub stdin: bool,
    /// It takes output.
    pub stdout: bool,
    /// It takes error output. Not with a terminal.
    pub stderr: bool,
    /// It is a terminal.
    pub tty: bool,
}

/// What a token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Run a command.
    Exec(Exec),
    /// Attach to a container.
    Attach(Attach),
    /// Reach ports of a sandbox, whichever the client asks for.
    PortForward {
        /// The sandbox.
        sandbox: String,
    },
}

impl Request {
    /// Its part of the URL.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

/// The client's streams, those that it wants.
#[derive(Debug, Default)]
pub struct Streams {
    /// Its input.
    pub stdin: Option<Incoming>,
    /// Takes output.
    pub stdout: Option<Outgoing>,
    /// Takes error output.
    pub stderr: Option<Outgoing>,
    /// The sizes that its terminal takes.
    pub resizes: Option<Resizes>,
}

/// Why something failed, in words for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Failure(pub String);

/// The pods. A future that is dropped means that the client has gone; whatever was begun
/// for it alone ends then.
pub trait Backend: Send + Sync + 'static {
    /// A connection to a port of a pod. Shutting it down is a half-close.
    type Connection: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Runs a command to its end and returns its exit code, 0 to 255, when all its output
    /// is sent.
    fn exec(&self, request: Exec, streams: Streams) -> impl Future<Output = Result<i32, Failure>> + Send;

    /// Connects the streams with those of a container, until it ends or the client has
    /// nothing more to do with it.
    fn attach(&self, request: Attach, streams: Streams) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Connects to a port on the pod's loopback.
    fn connect(&self, sandbox: &str, port: u16) -> impl Future<Output = Result<Self::Connection, Failure>> + Send;
}
