//! Exec and attach over SPDY: the client opens an error stream and one for each of the
//! streams that it said it wants, named by the header `streamtype`.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::activity::Activity;
use crate::backend::{Attach, Backend, Exec, Failure, Streams, Wanted};
use crate::outcome::message;
use crate::pipe::Outgoing;
use crate::protocol::Remote;
use crate::server::Timeouts;
use crate::spdy::{Connection, Stream};

/// Streams on one connection: one more than there are kinds, for one that is refused.
const STREAMS: usize = 6;

/// What is asked of a container.
#[derive(Debug, Clone)]
pub enum Command {
    /// Run a command in it.
    Exec(Exec),
    /// Attach to it.
    Attach(Attach),
}

impl Command {
    /// Which streams the client wants.
    pub fn wanted(&self) -> Wanted {
        match self {
            Self::Exec(exec) => exec.wanted,
            Self::Attach(attach) => attach.wanted,
        }
    }

    /// Does it, to its end.
    pub async fn run<B: Backend>(self, backend: &B, streams: Streams) -> Result<i32, Failure> {
        match self {
            Self::Exec(exec) => backend.exec(exec, streams).await,
            Self::Attach(attach) => backend.attach(attach, streams).await.map(|()| 0),
        }
    }
}

/// Serves one upgraded connection to its end.
pub async fn serve<B, T>(backend: Arc<B>, command: Command, protocol: Remote, transport: T, timeouts: Timeouts)
where
    B: Backend,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let activity = Activity::default();
    let (mut connection, accepted) = Connection::new(transport, STREAMS, activity.clone());
    tokio::select! {
        () = session(&*backend, command, protocol, accepted, timeouts) => {}
        result = connection.run() => {
            tracing::debug!(?result, "streaming client left before the end");
            return;
        }
        () = activity.idle(timeouts.idle) => tracing::info!(limit = ?timeouts.idle, "streaming client idle: ended"),
    }
    connection.close().await;
}

async fn session<B: Backend>(
    backend: &B,
    command: Command,
    protocol: Remote,
    mut accepted: mpsc::UnboundedReceiver<Stream>,
    timeouts: Timeouts,
) {
    let opened = collect(&mut accepted, command.wanted(), protocol);
    let Ok(Some((streams, mut error, _kept))) = timeout(timeouts.handshake, opened).await else {
        tracing::debug!("streaming client did not open its streams in time");
        return;
    };
    let result = command.run(backend, streams).await;
    let _ = error.send(message(&result, protocol.wording)).await;
}

/// Waits until the client has opened what it wants, and the error stream. The last of what
/// is returned are the sending halves of streams on which nothing is sent, but whose end
/// the client takes for the end of all.
async fn collect(
    accepted: &mut mpsc::UnboundedReceiver<Stream>,
    wanted: Wanted,
    protocol: Remote,
) -> Option<(Streams, Outgoing, Vec<Outgoing>)> {
    let (mut streams, mut error, mut kept) = (Streams::default(), None, Vec::new());
    let resizes = wanted.tty && protocol.resizes;
    while error.is_none()
        || streams.stdin.is_some() != wanted.stdin
        || streams.stdout.is_some() != wanted.stdout
        || streams.stderr.is_some() != wanted.stderr
        || streams.resizes.is_some() != resizes
    {
        let Stream { headers, incoming, outgoing, .. } = accepted.recv().await?;
        match headers.get("streamtype") {
            "error" if error.is_none() => error = Some(outgoing),
            "stdout" if wanted.stdout && streams.stdout.is_none() => streams.stdout = Some(outgoing),
            "stderr" if wanted.stderr && streams.stderr.is_none() => streams.stderr = Some(outgoing),
            "stdin" if wanted.stdin && streams.stdin.is_none() => {
                streams.stdin = Some(incoming);
                kept.push(outgoing);
            }
            "resize" if resizes && streams.resizes.is_none() => {
                streams.resizes = Some(incoming.into());
                kept.push(outgoing);
            }
            // Dropped, and thereby ended.
            other => tracing::debug!(kind = other, "streaming client opened a stream that it did not ask for"),
        }
    }
    error.map(|error| (streams, error, kept))
}
