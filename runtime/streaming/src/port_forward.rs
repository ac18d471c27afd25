//! Port forwarding over SPDY: for each connection the client opens an error stream and a
//! data stream, both with the headers `port` and `requestid`.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval};

use crate::activity::Activity;
use crate::backend::{Backend, Failure};
use crate::pipe::{Incoming, Outgoing};
use crate::server::Timeouts;
use crate::spdy::{Connection, Stream};

/// Streams on one connection, two for each connection forwarded.
const STREAMS: usize = 512;
/// Most data taken from a pod at once, in bytes.
const CHUNK_BYTES: usize = 32 * 1024;

/// Serves one upgraded connection to its end.
pub async fn serve<B, T>(backend: Arc<B>, sandbox: String, transport: T, timeouts: Timeouts)
where
    B: Backend,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let activity = Activity::default();
    let (mut connection, accepted) = Connection::new(transport, STREAMS, activity.clone());
    tokio::select! {
        () = forward_all(&backend, &sandbox, accepted, timeouts) => {}
        result = connection.run() => {
            tracing::debug!(?result, "port forwarding ended by its client");
            return;
        }
        () = activity.idle(timeouts.idle) => tracing::info!(limit = ?timeouts.idle, "port forwarding idle: ended"),
    }
    connection.close().await;
}

/// The streams of a connection of which one is still missing.
struct Half {
    since: Instant,
    error: Option<Outgoing>,
    data: Option<(Incoming, Outgoing)>,
}

async fn forward_all<B: Backend>(
    backend: &Arc<B>,
    sandbox: &str,
    mut accepted: mpsc::UnboundedReceiver<Stream>,
    timeouts: Timeouts,
) {
    let mut halves = HashMap::<String, Half>::new();
    let mut running = JoinSet::new();
    let mut cleaning = interval(timeouts.handshake);
    loop {
        let stream = tokio::select! {
            stream = accepted.recv() => stream,
            Some(_) = running.join_next() => continue,
            _ = cleaning.tick() => {
                halves.retain(|_, half| half.since.elapsed() < timeouts.handshake);
                continue;
            }
        };
        let Some(Stream { id, headers, incoming, mut outgoing }) = stream else { return };
        let kind = headers.get("streamtype").to_owned();
        let port = match headers.get("port").parse::<u16>() {
            Ok(port @ 1..) => port,
            _ => {
                if kind == "error" {
                    let text = format!("port {:?} is not 1 to 65535", headers.get("port"));
                    let _ = outgoing.send(text.into()).await;
                }
                continue;
            }
        };
        let half = halves.entry(request(&kind, id, headers.get("requestid"))).or_insert_with(|| Half {
            since: Instant::now(),
            error: None,
            data: None,
        });
        match kind.as_str() {
            "error" if half.error.is_none() => half.error = Some(outgoing),
            "data" if half.data.is_none() => half.data = Some((incoming, outgoing)),
            // Dropped, and thereby ended.
            _ => continue,
        }
        let request = request(&kind, id, headers.get("requestid"));
        if let Some(Half { error: Some(_), data: Some(_), .. }) = halves.get(&request)
            && let Some(Half { error: Some(error), data: Some(data), .. }) = halves.remove(&request)
        {
            running.spawn(forward(backend.clone(), sandbox.to_owned(), port, error, data));
        }
    }
}

/// What ties the two streams of a connection together. Old clients do not say, but open
/// the error stream right before the data stream.
fn request(kind: &str, id: u32, given: &str) -> String {
    match (given, kind) {
        ("", "data") => id.saturating_sub(2).to_string(),
        ("", _) => id.to_string(),
        (given, _) => given.to_owned(),
    }
}

/// Carries one connection to its end.
async fn forward<B: Backend>(
    backend: Arc<B>,
    sandbox: String,
    port: u16,
    mut error: Outgoing,
    (mut incoming, mut outgoing): (Incoming, Outgoing),
) {
    let connection = match backend.connect(&sandbox, port).await {
        Ok(connection) => connection,
        Err(Failure(text)) => {
            let _ = error.send(text.into()).await;
            return;
        }
    };
    let (mut read, mut write) = split(connection);
    let up = async {
        while let Some(data) = incoming.next().await.map_err(|_| ())? {
            // If the pod reads no more, what it still has to say counts all the same.
            if write.write_all(&data).await.is_err() {
                return Ok(());
            }
        }
        let _ = write.shutdown().await;
        Ok::<(), ()>(())
    };
    let down = async {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(count @ 1..) = read.read(&mut chunk).await {
            let data = Bytes::copy_from_slice(chunk.get(..count).unwrap_or_default());
            outgoing.send(data).await.map_err(|_| ())?;
        }
        drop(outgoing);
        Ok(())
    };
    // Ended by the client, or in both directions.
    let _ = tokio::try_join!(up, down);
}
