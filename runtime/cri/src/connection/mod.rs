//! A client's connection, as a strict HTTP/2 server takes it.
//!
//! A client of a unix socket has no host to name. What it sends as `:authority` is `localhost`, nothing, the socket's path, or
//! the path with `%2F` for its slashes (grpc-go with a dialer of its own, grpc-c, grpc-java). The last ones are no authorities
//! of a URI, and hyper resets such a request before anybody else sees it (hyperium/h2#442). Nothing depends on the authority
//! here, so it is replaced on the way, whatever it is.

mod authority;
mod frames;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::Connected;

use frames::Frames;

/// Bytes read at once.
const CHUNK: usize = 16 << 10;

/// A connection that a client has made to the socket.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    frames: Frames,
    /// What has been made of what the client sent, and how much of that the server has had.
    ready: Vec<u8>,
    taken: usize,
}

impl Connection {
    /// Adapts what comes from a client.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, frames: Frames::default(), ready: Vec::new(), taken: 0 }
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let left = this.ready.get(this.taken..).unwrap_or_default();
            if !left.is_empty() || buffer.remaining() == 0 {
                let (now, _) = left.split_at(left.len().min(buffer.remaining()));
                buffer.put_slice(now);
                this.taken += now.len();
                return Poll::Ready(Ok(()));
            }
            this.taken = 0;
            this.ready.clear();
            let mut chunk = [0; CHUNK];
            let mut chunk = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut this.stream).poll_read(context, &mut chunk))?;
            if chunk.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.frames.pass(chunk.filled(), &mut this.ready);
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests;
