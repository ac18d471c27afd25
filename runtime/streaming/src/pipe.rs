//! The server's ends of a client's streams, whatever protocol carries them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::spdy::connection::{Credit, StreamWriter};
use crate::websocket::ChannelWriter;

/// What a stream holds of data that nobody has taken yet, in bytes. Twice a SPDY window,
/// so that a client that keeps its windows never holds up another stream.
const BACKLOG_BYTES: usize = 128 * 1024;
/// What a piece counts for besides its bytes.
const PIECE_COST: usize = 64;

/// The stream was broken off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client broke the stream off")]
pub struct Broken;

/// Where data from the client goes in.
#[derive(Debug)]
pub(crate) struct Feed {
    queue: mpsc::UnboundedSender<Bytes>,
    room: Arc<Semaphore>,
    broken: Arc<AtomicBool>,
}

/// What the client sends on a stream.
#[derive(Debug)]
pub struct Incoming {
    queue: mpsc::UnboundedReceiver<Bytes>,
    room: Arc<Semaphore>,
    broken: Arc<AtomicBool>,
    credit: Option<Credit>,
}

/// A stream's two ends. Taking data from it gives `credit`, if there is any, to the client.
pub(crate) fn pipe(credit: Option<Credit>) -> (Feed, Incoming) {
    let (sender, queue) = mpsc::unbounded_channel();
    let room = Arc::new(Semaphore::new(BACKLOG_BYTES));
    let broken = Arc::<AtomicBool>::default();
    (Feed { queue: sender, room: room.clone(), broken: broken.clone() }, Incoming { queue, room, broken, credit })
}

fn cost(data: &Bytes) -> u32 {
    u32::try_from(data.len().saturating_add(PIECE_COST).min(BACKLOG_BYTES)).unwrap_or(u32::MAX)
}

impl Feed {
    /// Hands data over; waits while there is no room. False if nobody takes it any more.
    pub async fn push(&self, data: Bytes) -> bool {
        match self.room.acquire_many(cost(&data)).await {
            Ok(permit) => {
                permit.forget();
                self.queue.send(data).is_ok()
            }
            Err(_) => false,
        }
    }

    /// The client broke the stream off. (Dropping it is the end of a stream in good order.)
    pub fn break_off(self) {
        self.broken.store(true, Ordering::Release);
    }
}

impl Incoming {
    /// The next piece of data; nothing once the client has sent everything.
    ///
    /// # Errors
    /// The client broke the stream off.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        match self.queue.recv().await {
            Some(data) => {
                self.room.add_permits(cost(&data) as usize);
                if let Some(credit) = &mut self.credit {
                    credit.give(data.len());
                }
                Ok(Some(data))
            }
            None if self.broken.load(Ordering::Acquire) => Err(Broken),
            None => Ok(None),
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.room.close();
    }
}

/// What the client gets on a stream. Dropping it is the end of the stream.
#[derive(Debug)]
pub struct Outgoing(Kind);

#[derive(Debug)]
enum Kind {
    Spdy(StreamWriter),
    WebSocket(ChannelWriter),
}

impl Outgoing {
    /// Sends data; waits while the client does not take it.
    ///
    /// # Errors
    /// The client broke the stream off.
    pub async fn send(&mut self, data: Bytes) -> Result<(), Broken> {
        match &mut self.0 {
            Kind::Spdy(stream) => stream.send(data).await,
            Kind::WebSocket(channel) => channel.send(data).await,
        }
    }
}

impl From<StreamWriter> for Outgoing {
    fn from(stream: StreamWriter) -> Self {
        Self(Kind::Spdy(stream))
    }
}

impl From<ChannelWriter> for Outgoing {
    fn from(channel: ChannelWriter) -> Self {
        Self(Kind::WebSocket(channel))
    }
}

/// What waits to be written to one client: bounded in bytes for what is sent to it,
/// unbounded for what is sent because of it, which the reader bounds by waiting here.
#[derive(Debug)]
pub(crate) struct Outbox<T> {
    queue: mpsc::UnboundedSender<(T, Option<OwnedSemaphorePermit>)>,
    room: Arc<Semaphore>,
}

impl<T> Clone for Outbox<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), room: self.room.clone() }
    }
}

/// The writer's end; an item's permit is let go when it is written.
pub(crate) type Letters<T> = mpsc::UnboundedReceiver<(T, Option<OwnedSemaphorePermit>)>;

/// Bytes that wait to be written to one client.
const OUTBOX_BYTES: usize = 256 * 1024;

impl<T> Outbox<T> {
    /// An outbox and the writer's end of it.
    pub fn new() -> (Self, Letters<T>) {
        let (queue, letters) = mpsc::unbounded_channel();
        (Self { queue, room: Arc::new(Semaphore::new(OUTBOX_BYTES)) }, letters)
    }

    /// Queues an item of `bytes` bytes; waits while there is no room.
    pub async fn send(&self, item: T, bytes: usize) -> Result<(), Broken> {
        let bytes = u32::try_from(bytes.saturating_add(PIECE_COST).min(OUTBOX_BYTES)).unwrap_or(u32::MAX);
        let permit = self.room.clone().acquire_many_owned(bytes).await.map_err(|_| Broken)?;
        self.queue.send((item, Some(permit))).map_err(|_| Broken)
    }

    /// Queues an item at once. For what there is a bounded number of.
    pub fn send_now(&self, item: T) {
        // A writer that has ended needs no more.
        let _ = self.queue.send((item, None));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_stream_that_nobody_reads_takes_no_more_than_its_backlog() {
        let (feed, mut incoming) = pipe(None);
        let piece = Bytes::from(vec![0; 1000]);
        let mut taken = 0;
        while timeout(Duration::from_millis(20), feed.push(piece.clone())).await == Ok(true) {
            taken += piece.len();
        }
        assert!((BACKLOG_BYTES / 2..=BACKLOG_BYTES).contains(&taken), "{taken}");
        incoming.next().await.unwrap().unwrap();
        assert!(feed.push(piece.clone()).await, "room again");
        let waiting = tokio::spawn(async move { feed.push(piece).await });
        drop(incoming);
        assert!(!waiting.await.unwrap(), "nobody will ever take it");
    }

    #[tokio::test]
    async fn the_end_of_a_stream_is_told_from_its_breaking_off() {
        let (feed, mut incoming) = pipe(None);
        feed.push(Bytes::from_static(b"x")).await;
        drop(feed);
        assert_eq!(incoming.next().await, Ok(Some(Bytes::from_static(b"x"))));
        assert_eq!(incoming.next().await, Ok(None));
        let (feed, mut incoming) = pipe(None);
        feed.break_off();
        assert_eq!(incoming.next().await, Err(Broken));
    }
}
