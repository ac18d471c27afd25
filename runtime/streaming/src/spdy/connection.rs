//! One connection: streams that the client opens, and the two loops that carry them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::flow::{DEFAULT_WINDOW, Flow};
use super::frame::{Frame, FrameError, FrameReader, reset};
use super::headers::{Deflater, Headers};
use crate::activity::Activity;
use crate::pipe::{Broken, Feed, Incoming, Letters, Outbox, Outgoing, pipe};

/// Largest data frame that is sent, in bytes.
const DATA_BYTES: usize = 32 * 1024;
/// How long a client may take to fetch the rest and hang up, once everything is sent.
const FAREWELL: Duration = Duration::from_secs(30);

/// A stream that the client has opened and we have accepted.
#[derive(Debug)]
pub struct Stream {
    /// Its id, odd.
    pub id: u32,
    /// What it is for.
    pub headers: Headers,
    /// Data from the client.
    pub incoming: Incoming,
    /// Data to the client.
    pub outgoing: Outgoing,
}

/// A connection. Nothing moves on it but in [`Connection::run`] and [`Connection::close`].
#[derive(Debug)]
pub struct Connection<T> {
    reader: FrameReader<ReadHalf<T>>,
    outbox: Outbox<Letter>,
    writer: JoinSet<()>,
    accepted: mpsc::UnboundedSender<Stream>,
    streams: HashMap<u32, Open>,
    last: u32,
    limit: usize,
    flow: Arc<Flow>,
    activity: Activity,
}

#[derive(Debug)]
enum Letter {
    Frame(Frame),
    /// Everything is said.
    End,
}

/// What the reader knows of a stream.
#[derive(Debug)]
struct Open {
    /// Nothing once the client has sent everything, or nobody takes it.
    feed: Option<Feed>,
    /// The client sends nothing more.
    finished: bool,
    /// We send nothing more.
    sent: Arc<AtomicBool>,
}

impl Open {
    fn over(&self) -> bool {
        self.finished && self.sent.load(Ordering::Acquire)
    }
}

impl<T> Connection<T>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    /// Takes an upgraded connection over; the streams that the client opens, at most
    /// `limit` at a time, come out of the other end.
    pub fn new(transport: T, limit: usize, activity: Activity) -> (Self, mpsc::UnboundedReceiver<Stream>) {
        let (read, write) = split(transport);
        let (outbox, letters) = Outbox::new();
        let mut writer = JoinSet::new();
        writer.spawn(write_all(write, letters, activity.clone()));
        let (accepted, streams) = mpsc::unbounded_channel();
        let connection = Self {
            reader: FrameReader::new(read),
            outbox,
            writer,
            accepted,
            streams: HashMap::new(),
            last: 0,
            limit,
            flow: Arc::default(),
            activity,
        };
        (connection, streams)
    }

    /// Carries the streams until the client hangs up.
    ///
    /// # Errors
    /// The client breaks the protocol, or the connection breaks.
    pub async fn run(&mut self) -> Result<(), FrameError> {
        while let Some(frame) = self.reader.next().await? {
            self.activity.touch();
            match frame {
                Frame::SynStream { id, fin, headers } => self.open(id, fin, headers).await,
                Frame::Data { id, fin, data } => self.data(id, fin, data).await,
                Frame::Headers { id, fin } => self.data(id, fin, Bytes::new()).await,
                Frame::Reset { id, .. } => self.reset(id),
                Frame::Ping(id) if !id.is_multiple_of(2) => self.answer(Frame::Ping(id)).await,
                Frame::Settings { initial_window: Some(window) } => self.flow.set_initial(window),
                Frame::WindowUpdate { id, delta } => self.flow.grant(id, delta),
                // It opens no more streams, but what is open goes on.
                Frame::GoAway { .. } | Frame::Settings { .. } | Frame::Ping(_) | Frame::SynReply { .. } => {}
            }
        }
        Ok(())
    }

    async fn open(&mut self, id: u32, fin: bool, headers: Headers) {
        if self.streams.len() >= self.limit {
            self.streams.retain(|_, stream| !stream.over());
        }
        let status = match () {
            () if id.is_multiple_of(2) || id <= self.last => reset::PROTOCOL_ERROR,
            () if self.streams.len() >= self.limit => reset::REFUSED_STREAM,
            () => {
                self.last = id;
                return self.accept(id, fin, headers).await;
            }
        };
        self.answer(Frame::Reset { id, status }).await;
    }

    async fn accept(&mut self, id: u32, fin: bool, headers: Headers) {
        let sent = Arc::<AtomicBool>::default();
        let credit = Credit { id, outbox: self.outbox.clone(), owed: 0 };
        let (feed, incoming) = pipe(Some(credit));
        self.flow.open(id);
        let writer = StreamWriter { id, outbox: self.outbox.clone(), flow: self.flow.clone(), sent: sent.clone() };
        let feed = (!fin).then_some(feed);
        self.streams.insert(id, Open { feed, finished: fin, sent });
        self.answer(Frame::SynReply { id, fin: false, headers: Headers::default() }).await;
        // If nobody takes it, it is dropped, and thereby ended.
        let _ = self.accepted.send(Stream { id, headers, incoming, outgoing: writer.into() });
    }

    async fn data(&mut self, id: u32, fin: bool, data: Bytes) {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| !stream.finished) else {
            // Data may be under way to a stream that was reset; to others it is an error,
            // but none that would matter to anybody else.
            if id > self.last || id.is_multiple_of(2) {
                self.answer(Frame::Reset { id, status: reset::INVALID_STREAM }).await;
            }
            return;
        };
        if !data.is_empty()
            && let Some(feed) = &stream.feed
            && !feed.push(data).await
        {
            stream.feed = None;
        }
        if fin {
            stream.feed = None;
            stream.finished = true;
            if stream.over() {
                self.streams.remove(&id);
            }
        }
    }

    fn reset(&mut self, id: u32) {
        if let Some(stream) = self.streams.remove(&id)
            && let Some(feed) = stream.feed
        {
            feed.break_off();
        }
        self.flow.close(id);
    }

    /// Says something because the client did; waits if it does not listen.
    async fn answer(&mut self, frame: Frame) {
        let _ = self.outbox.send(Letter::Frame(frame), 0).await;
    }

    /// Sends what is left to send, says goodbye, and waits for the client to hang up, for a
    /// while. A connection that is closed with data unread would be reset, and the client
    /// could lose what it has not read yet.
    pub async fn close(mut self) {
        self.outbox.send_now(Letter::Frame(Frame::GoAway { last: self.last, status: 0 }));
        self.outbox.send_now(Letter::End);
        let mut source = self.reader.into_inner();
        let unread = async { tokio::io::copy(&mut source, &mut tokio::io::sink()).await };
        let written = async { while self.writer.join_next().await.is_some() {} };
        let _ = timeout(FAREWELL, async { tokio::join!(unread, written) }).await;
    }
}

/// Writes frames until everything is said or the client is gone.
async fn write_all<T: AsyncWrite>(mut sink: WriteHalf<T>, mut letters: Letters<Letter>, activity: Activity) {
    let mut deflater = Deflater::default();
    let mut bytes = Vec::new();
    while let Some((letter, _permit)) = letters.recv().await {
        let written = match letter {
            Letter::Frame(frame) => {
                bytes.clear();
                frame.encode(&mut deflater, &mut bytes);
                async { sink.write_all(&bytes).await.and(if letters.is_empty() { sink.flush().await } else { Ok(()) }) }
                    .await
            }
            Letter::End => {
                let _ = sink.shutdown().await;
                return;
            }
        };
        if written.is_err() {
            // The reader sees it, too; whoever waits for room is dropped with it.
            return;
        }
        activity.touch();
    }
}

/// Where data to the client goes on one stream.
#[derive(Debug)]
pub struct StreamWriter {
    id: u32,
    outbox: Outbox<Letter>,
    flow: Arc<Flow>,
    sent: Arc<AtomicBool>,
}

impl StreamWriter {
    pub(crate) async fn send(&mut self, mut data: Bytes) -> Result<(), Broken> {
        while !data.is_empty() {
            let count = self.flow.take(self.id, data.len().min(DATA_BYTES)).await.ok_or(Broken)?;
            let frame = Frame::Data { id: self.id, fin: false, data: data.split_to(count) };
            self.outbox.send(Letter::Frame(frame), count).await?;
        }
        Ok(())
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        self.outbox.send_now(Letter::Frame(Frame::Data { id: self.id, fin: true, data: Bytes::new() }));
        self.flow.close(self.id);
        self.sent.store(true, Ordering::Release);
    }
}

/// Lets the client send as much again as was taken from a stream.
#[derive(Debug)]
pub struct Credit {
    id: u32,
    outbox: Outbox<Letter>,
    owed: u32,
}

impl Credit {
    pub(crate) fn give(&mut self, bytes: usize) {
        self.owed = self.owed.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.owed >= DEFAULT_WINDOW / 2 {
            for id in [self.id, 0] {
                self.outbox.send_now(Letter::Frame(Frame::WindowUpdate { id, delta: self.owed }));
            }
            self.owed = 0;
        }
    }
}
