//! Carries one stream of a container from the guest into its log.

use std::sync::Arc;
use std::time::Duration;

use nacelle_proto::stdio::{Header, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::LogFile;
use super::format::Splitter;
use crate::agent::Agent;
use crate::clock;
use crate::vm::Vm;

/// Most bytes taken from the guest at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// Pause before a broken connection or a full disk is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// Where a stream goes: a log, or nowhere (then it is read and forgotten).
pub type Sink = Option<Arc<LogFile>>;

/// Runs until the stream has ended and all of it is in the log, or the guest is gone.
/// `offset` is the first byte that the log does not have yet.
pub async fn pump(agent: Agent, vm: Arc<Vm>, container_id: String, stream: Stream, sink: Sink, mut offset: u64) {
    let header = |offset| Header { container_id: container_id.clone(), exec_id: String::new(), stream, offset };
    loop {
        let end = match agent.stream(&header(offset)).await {
            Ok(connection) => transfer(connection, stream, &sink, &mut offset).await,
            Err(error) => Err(std::io::Error::other(error)),
        };
        match end {
            Ok(()) => return,
            Err(error) if vm.exit().borrow().is_some() => {
                tracing::debug!(container = container_id, %stream, %error, "stream ended with the guest");
                return;
            }
            Err(error) => {
                tracing::warn!(container = container_id, %stream, %error, "log stream broke: connecting again");
                tokio::select! {
                    _ = vm.wait_exit() => return,
                    () = tokio::time::sleep(RETRY) => {}
                }
            }
        }
    }
}

/// Moves bytes until the end of the stream (`Ok`) or of the connection.
async fn transfer(mut connection: UnixStream, stream: Stream, sink: &Sink, durable: &mut u64) -> std::io::Result<()> {
    let mut splitter = Splitter::new(stream);
    let mut received = *durable;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let got = connection.read(&mut chunk).await?;
        let mut lines = Vec::new();
        match chunk.get(..got) {
            Some(data) if got > 0 => splitter.push(data, clock::now(), &mut lines),
            _ => splitter.finish(clock::now(), &mut lines),
        }
        received += got as u64;
        if let (Some(log), false) = (sink, lines.is_empty()) {
            append(log, lines).await;
        }
        *durable = received - splitter.held() as u64;
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
async fn append(log: &Arc<LogFile>, lines: Vec<u8>) {
    let lines = Arc::new(lines);
    let mut complained = false;
    loop {
        let (log, lines) = (log.clone(), lines.clone());
        let path = log.path().to_owned();
        match tokio::task::spawn_blocking(move || log.append(&lines)).await {
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
