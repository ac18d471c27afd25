//! Carries one stream of a container from the guest into its log.

use std::sync::Arc;
use std::time::Duration;

use nacelle_proto::stdio::{Header, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::LogFile;
use super::format::Splitter;
use crate::agent::Agent;
use crate::live::Live;
use crate::vm::Vm;
use crate::{Error, clock};

/// Most bytes taken from the guest at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// Pause before a broken connection or a full disk is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// Where a stream goes.
#[derive(Debug, Clone)]
pub struct Sink {
    /// The log; without one, output is read and forgotten.
    pub log: Option<Arc<LogFile>>,
    /// Attached clients.
    pub live: Arc<Live>,
}

/// Runs until the stream has ended and all of it is in the log, or the guest is gone.
pub async fn pump(agent: Agent, vm: Arc<Vm>, container_id: String, stream: Stream, sink: Sink) {
    let mut place = Progress { durable: sink.log.as_ref().map_or(0, |log| log.offset(stream)), shown: 0 };
    place.shown = place.durable;
    let header = |offset| Header { container_id: container_id.clone(), exec_id: String::new(), stream, offset };
    loop {
        let end = match agent.stream(&header(place.durable)).await {
            Ok(connection) => transfer(connection, stream, &sink, &mut place).await,
            Err(Error::OutputGone { start, .. }) if start > place.durable => {
                // Without a log nothing tells where the last daemon stopped, and nobody minds.
                if let Some(log) = &sink.log {
                    let bytes = start - place.durable;
                    tracing::error!(container = container_id, %stream, bytes, "output is in no log and no longer in the guest");
                    log.skip(stream, bytes);
                }
                place = Progress { durable: start, shown: start.max(place.shown) };
                continue;
            }
            Err(error) => Err(std::io::Error::other(error)),
        };
        match end {
            Ok(()) => break,
            Err(error) if vm.exit().borrow().is_some() => {
                tracing::debug!(container = container_id, %stream, %error, "stream ended with the guest");
                break;
            }
            Err(error) => {
                tracing::warn!(container = container_id, %stream, %error, "log stream broke: connecting again");
                tokio::select! {
                    _ = vm.wait_exit() => break,
                    () = tokio::time::sleep(RETRY) => {}
                }
            }
        }
    }
    sink.live.end();
}

/// How far a stream has come.
#[derive(Debug)]
struct Progress {
    /// First byte that the log does not have yet.
    durable: u64,
    /// First byte that attached clients were not shown yet.
    shown: u64,
}

/// Moves bytes until the end of the stream (`Ok`) or of the connection.
async fn transfer(
    mut connection: UnixStream,
    stream: Stream,
    sink: &Sink,
    place: &mut Progress,
) -> std::io::Result<()> {
    let mut splitter = Splitter::new(stream);
    let mut received = place.durable;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let got = connection.read(&mut chunk).await?;
        let mut lines = Vec::new();
        let data = chunk.get(..got).unwrap_or_default();
        if data.is_empty() {
            splitter.finish(clock::now(), &mut lines);
        } else {
            splitter.push(data, clock::now(), &mut lines);
            // After a broken connection some of it comes again.
            let seen = usize::try_from(place.shown.saturating_sub(received)).unwrap_or(usize::MAX);
            sink.live.send(data.get(seen..).unwrap_or_default());
        }
        received += got as u64;
        place.shown = place.shown.max(received);
        let durable = received - splitter.held() as u64;
        if let (Some(log), false) = (&sink.log, lines.is_empty()) {
            append(log, stream, durable - place.durable, lines).await;
        }
        place.durable = durable;
        if got == 0 {
            // The agent may forget the stream now; it is no harm if it no longer listens.
            let _ = connection.write_all(&durable.to_le_bytes()).await;
            return Ok(());
        }
        connection.write_all(&durable.to_le_bytes()).await?;
    }
}

/// Appends until the disk takes it: what the guest sent is not dropped because a disk is
/// full, the container waits instead.
async fn append(log: &Arc<LogFile>, stream: Stream, bytes: u64, lines: Vec<u8>) {
    let lines = Arc::new(lines);
    let mut complained = false;
    loop {
        let (log, lines) = (log.clone(), lines.clone());
        let path = log.path().to_owned();
        match tokio::task::spawn_blocking(move || log.append(stream, bytes, &lines)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) if !complained => {
                tracing::error!(log = %path.display(), %error, "log cannot be written: its container waits until it can");
                complained = true;
            }
            Ok(Err(_)) => {}
            Err(error) => {
                tracing::error!(log = %path.display(), %error, "log writer ended abnormally");
                return;
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}
