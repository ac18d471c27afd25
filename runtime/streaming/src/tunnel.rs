//! A byte stream in the binary messages of a WebSocket.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use crate::websocket::{accept, goodbye};

/// Bytes on the way in each direction.
const BUFFER_BYTES: usize = 64 * 1024;
/// How long a client may take to hang up, once everything is sent.
const FAREWELL: Duration = Duration::from_secs(30);

/// The stream in an upgraded connection, and the future that carries it: it ends after
/// the stream has been dropped, or the client has hung up.
pub fn tunnel<T>(transport: T) -> (DuplexStream, impl Future<Output = ()>)
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (near, far) = duplex(BUFFER_BYTES);
    let carry = async move {
        let (mut sink, mut source) = accept(transport).await.split();
        let (mut from, mut to) = split(far);
        let up = async {
            while let Some(Ok(message)) = source.next().await {
                if let Message::Binary(data) = message
                    && to.write_all(&data).await.is_err()
                {
                    // Nobody wants it; the client will hang up when it is told.
                    break;
                }
            }
            let _ = to.shutdown().await;
            while let Some(Ok(_)) = source.next().await {}
        };
        let down = async {
            let mut chunk = vec![0; BUFFER_BYTES];
            while let Ok(count @ 1..) = from.read(&mut chunk).await {
                let data = Bytes::copy_from_slice(chunk.get(..count).unwrap_or_default());
                if sink.send(Message::Binary(data)).await.is_err() {
                    return;
                }
            }
            let _ = sink.send(goodbye()).await;
        };
        tokio::pin!(up);
        tokio::select! {
            () = &mut up => {}
            () = down => { let _ = timeout(FAREWELL, up).await; }
        }
    };
    (near, carry)
}
