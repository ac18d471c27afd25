//! Exec and attach over WebSocket: every message is a byte for the channel and its data.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Message};

use crate::activity::Activity;
use crate::backend::{Backend, Streams};
use crate::outcome::{Wording, message};
use crate::pipe::{Broken, Feed, Letters, Outbox, Outgoing, pipe};
use crate::protocol::Channels;
use crate::remote_command::Command;
use crate::server::Timeouts;

/// Longest message accepted, in bytes.
const MESSAGE_LIMIT: usize = 1 << 20;
/// Most data sent in one message, in bytes.
const DATA_BYTES: usize = 32 * 1024;
/// How long a client may take to fetch the rest and hang up, once everything is sent.
const FAREWELL: Duration = Duration::from_secs(30);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// Its data is a channel that the client has ended.
const CLOSE: u8 = 255;

/// The server's side of an upgraded connection.
pub async fn accept<T: AsyncRead + AsyncWrite + Unpin>(transport: T) -> WebSocketStream<T> {
    let config = WebSocketConfig::default()
        .read_buffer_size(16 * 1024)
        .write_buffer_size(0)
        .max_message_size(Some(MESSAGE_LIMIT))
        .max_frame_size(Some(MESSAGE_LIMIT));
    WebSocketStream::from_raw_socket(transport, Role::Server, Some(config)).await
}

/// The end of a connection in good order.
pub fn goodbye() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
}

/// Serves one upgraded connection to its end.
pub async fn serve<B, T>(backend: Arc<B>, command: Command, protocol: Channels, transport: T, timeouts: Timeouts)
where
    B: Backend,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let activity = Activity::default();
    let (sink, mut source) = accept(transport).await.split();
    let (outbox, letters) = Outbox::new();
    let mut writer = JoinSet::new();
    writer.spawn(write_all(sink, letters, activity.clone()));

    let wanted = command.wanted();
    let channel = |number| ChannelWriter { channel: number, base64: protocol.base64, outbox: outbox.clone() };
    let out = |number, wanted: bool| wanted.then(|| Outgoing::from(channel(number)));
    let input = |wanted: bool| wanted.then(|| pipe(None)).unzip();
    let (stdin_feed, stdin) = input(wanted.stdin);
    let (resize_feed, resizes) = input(wanted.tty);
    let streams = Streams {
        stdin,
        stdout: out(STDOUT, wanted.stdout),
        stderr: out(STDERR, wanted.stderr),
        resizes: resizes.map(Into::into),
    };
    let session = async {
        let mut error = channel(ERROR);
        // Tells the client that it is through, on the lowest channel it can hear.
        let first = if wanted.stdout {
            STDOUT
        } else if wanted.stderr {
            STDERR
        } else {
            ERROR
        };
        channel(first).say(&[]).await?;
        let result = command.run(&*backend, streams).await;
        let said = message(&result, protocol.wording);
        match (said.is_empty(), protocol.wording) {
            (true, Wording::Text) => Ok(()),
            _ => error.send(said).await,
        }
    };
    let feeds = Feeds { stdin: stdin_feed, resize: resize_feed };
    tokio::select! {
        _ = session => {}
        result = read_all(&mut source, feeds, protocol, activity.clone()) => {
            tracing::debug!(?result, "streaming client left before the end");
            return;
        }
        () = activity.idle(timeouts.idle) => tracing::info!(limit = ?timeouts.idle, "streaming client idle: ended"),
    }
    outbox.send_now(goodbye());
    let unread = async { while let Some(Ok(_)) = source.next().await {} };
    let _ = timeout(FAREWELL, unread).await;
}

/// Where the client's data goes.
struct Feeds {
    stdin: Option<Feed>,
    resize: Option<Feed>,
}

impl Feeds {
    fn of(&mut self, channel: u8) -> Option<&mut Option<Feed>> {
        match channel {
            STDIN => Some(&mut self.stdin),
            RESIZE => Some(&mut self.resize),
            _ => None,
        }
    }
}

async fn read_all<T: AsyncRead + AsyncWrite + Unpin>(
    source: &mut SplitStream<WebSocketStream<T>>,
    mut feeds: Feeds,
    protocol: Channels,
    activity: Activity,
) -> tungstenite::Result<()> {
    while let Some(received) = source.next().await {
        activity.touch();
        let Some((channel, data)) = parse(received?, protocol.base64) else { continue };
        if channel == CLOSE && protocol.half_close {
            if let Some(feed) = data.first().and_then(|channel| feeds.of(*channel)) {
                *feed = None;
            }
        } else if let Some(feed) = feeds.of(channel)
            && let Some(open) = feed
            && !open.push(data).await
        {
            *feed = None;
        }
    }
    Ok(())
}

/// The channel of a message, and its data.
fn parse(message: Message, base64: bool) -> Option<(u8, Bytes)> {
    let data = match message {
        Message::Binary(data) => data,
        Message::Text(text) => text.into(),
        _ => return None,
    };
    let first = *data.first()?;
    let rest = data.slice(1..);
    match base64 {
        false => Some((first, rest)),
        true => Some((first.checked_sub(b'0')?, STANDARD.decode(rest).ok()?.into())),
    }
}

async fn write_all<T: AsyncRead + AsyncWrite + Unpin>(
    mut sink: SplitSink<WebSocketStream<T>, Message>,
    mut letters: Letters<Message>,
    activity: Activity,
) {
    while let Some((message, _permit)) = letters.recv().await {
        if sink.send(message).await.is_err() {
            return;
        }
        activity.touch();
    }
}

/// Where data to the client goes on one channel.
#[derive(Debug)]
pub struct ChannelWriter {
    channel: u8,
    base64: bool,
    outbox: Outbox<Message>,
}

impl ChannelWriter {
    pub(crate) async fn send(&mut self, mut data: Bytes) -> Result<(), Broken> {
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(DATA_BYTES));
            self.say(&piece).await?;
        }
        Ok(())
    }

    async fn say(&self, data: &[u8]) -> Result<(), Broken> {
        let message = if self.base64 {
            Message::text(format!("{}{}", self.channel, STANDARD.encode(data)))
        } else {
            let mut bytes = BytesMut::with_capacity(data.len() + 1);
            bytes.put_u8(self.channel);
            bytes.put_slice(data);
            Message::Binary(bytes.freeze())
        };
        self.outbox.send(message, data.len()).await
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_is_a_channel_and_data() {
        let binary = |bytes: &'static [u8]| parse(Message::Binary(Bytes::from_static(bytes)), false);
        assert_eq!(binary(b"\0hello"), Some((STDIN, Bytes::from_static(b"hello"))));
        assert_eq!(binary(&[CLOSE, 0]), Some((CLOSE, Bytes::from_static(&[0]))));
        assert_eq!(binary(b""), None);
        assert_eq!(parse(Message::text("0aGk="), true), Some((STDIN, Bytes::from_static(b"hi"))));
        assert_eq!(parse(Message::text("0!"), true), None);
    }

    proptest! {
        #[test]
        fn no_message_can_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..100), base64: bool) {
            parse(Message::Binary(bytes.into()), base64);
        }
    }
}
