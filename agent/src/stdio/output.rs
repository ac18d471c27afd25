//! One output stream of a process.
//!
//! A pump task moves bytes from the pipe (or terminal) into the buffer and stops reading
//! when the buffer is full, so that the process blocks as it would on any full pipe. A
//! connection sends what is in the buffer and frees what the host acknowledges.

use std::cell::RefCell;
use std::fs::File;
use std::future::poll_fn;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;

use nacelle_proto::stdio::BUFFER_BYTES;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::sync::{Notify, oneshot, watch};

use super::buffer::{Buffer, OutOfRange};
use crate::fd;

/// Largest piece read at once, in bytes: what a pipe holds.
const CHUNK_BYTES: usize = 64 << 10;

thread_local! {
    /// Where all pumps read to; none keeps anything in it across a wait.
    static CHUNK: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK_BYTES]);
}

/// An output stream, shared by its pump and its connections.
#[derive(Debug)]
pub struct Output {
    state: Mutex<State>,
    /// There is room in the buffer again. Only the pump waits for it.
    room: Arc<Notify>,
    /// Tells the pump, by being dropped, that nobody can read any more what it pumps.
    _alive: oneshot::Sender<()>,
    /// Offset of the end, and whether it is final.
    progress: watch::Sender<(u64, bool)>,
    /// Number of the newest connection; all older ones give way.
    connection: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    buffer: Buffer,
    ended: bool,
}

impl Output {
    /// Starts reading `source`, which must be non-blocking.
    pub fn start(source: OwnedFd) -> io::Result<Arc<Self>> {
        Self::with_capacity(source, BUFFER_BYTES)
    }

    fn with_capacity(source: OwnedFd, capacity: usize) -> io::Result<Arc<Self>> {
        let source = fd::watch(File::from(source), Interest::READABLE)?;
        let (alive, forgotten) = oneshot::channel();
        let output = Arc::new(Self {
            state: Mutex::new(State { buffer: Buffer::new(capacity), ended: false }),
            room: Arc::default(),
            _alive: alive,
            progress: watch::Sender::new((0, false)),
            connection: watch::Sender::new(0),
        });
        // The pump holds no stream that has been forgotten.
        let pump = pump(source, Arc::downgrade(&output));
        tokio::spawn(async {
            tokio::select! {
                _ = forgotten => {}
                () = pump => {}
            }
        });
        Ok(output)
    }

    /// Makes the caller's connection the live one and checks that it can begin at
    /// `offset`. What lies before is thereby acknowledged.
    pub fn attach(&self, offset: u64) -> Result<Attachment, OutOfRange> {
        let mut state = self.lock();
        state.buffer.bytes_from(offset)?;
        state.buffer.acknowledge(offset)?;
        drop(state);
        self.room.notify_one();
        let mut number = 0;
        self.connection.send_modify(|newest| {
            *newest += 1;
            number = *newest;
        });
        Ok(Attachment { offset, number, newest: self.connection.subscribe() })
    }

    /// Sends the stream from where `attachment` begins, until it has ended and all of it
    /// is sent and the host hangs up, or a newer connection takes over.
    pub async fn serve<R, W>(&self, mut attachment: Attachment, acks: R, sink: W)
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let number = attachment.number;
        tokio::select! {
            _ = attachment.newest.wait_for(|newest| *newest != number) => {}
            _ = self.acknowledge(acks) => {}
            // After the end the acknowledgements still count, so wait for the hang-up.
            () = async { let _ = self.send(attachment.offset, sink).await; std::future::pending().await } => {}
        }
    }

    async fn send<W: AsyncWrite + Unpin>(&self, mut offset: u64, mut sink: W) -> io::Result<()> {
        let mut progress = self.progress.subscribe();
        loop {
            // Straight from the buffer: a connection at rest costs no memory of its own.
            let sent = poll_fn(|context| {
                let state = self.lock();
                match state.buffer.bytes_from(offset) {
                    Ok([]) if state.ended => Poll::Ready(Ok(None)),
                    Ok([]) => Poll::Ready(Ok(Some(0))),
                    Ok(bytes) => match Pin::new(&mut sink).poll_write(context, bytes) {
                        Poll::Ready(Ok(0)) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                        polled => polled.map_ok(Some),
                    },
                    Err(error) => Poll::Ready(Err(io::Error::other(error))),
                }
            });
            match sent.await? {
                Some(0) => {
                    let _ = progress.wait_for(|(end, ended)| *end > offset || *ended).await;
                }
                Some(count) => offset += count as u64,
                None => return sink.shutdown().await,
            }
        }
    }

    async fn acknowledge<R: AsyncRead + Unpin>(&self, mut acks: R) -> io::Result<()> {
        loop {
            let offset = acks.read_u64_le().await?;
            self.lock().buffer.acknowledge(offset).map_err(io::Error::other)?;
            self.room.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends what was read; nothing means the end.
    fn append(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.buffer.push(bytes);
        state.ended |= bytes.is_empty();
        let progress = (state.buffer.end(), state.ended);
        drop(state);
        self.progress.send_replace(progress);
    }
}

/// A connection's place in a stream.
#[derive(Debug)]
pub struct Attachment {
    offset: u64,
    number: u64,
    newest: watch::Receiver<u64>,
}

async fn pump(source: AsyncFd<File>, output: Weak<Output>) {
    loop {
        let Some((free, room)) = output.upgrade().map(|output| (output.lock().buffer.free(), output.room.clone()))
        else {
            return;
        };
        if free == 0 {
            room.notified().await;
            continue;
        }
        let moved = source.async_io(Interest::READABLE, |mut file| {
            CHUNK.with_borrow_mut(|chunk| {
                // Nobody else fills the buffer, so there is still as much room.
                let length = chunk.len().min(free);
                let part = chunk.get_mut(..length).unwrap_or_default();
                let count = file.read(part)?;
                if let Some(output) = output.upgrade() {
                    output.append(&part[..count]);
                }
                Ok(count)
            })
        });
        match moved.await {
            Ok(count) if count > 0 => {}
            // The end, which has been noted.
            Ok(_) => return,
            // A terminal whose last user is gone reports an I/O error: that is its end.
            Err(_) => return output.upgrade().map_or((), |output| output.append(&[])),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::pipe::{PipeFlags, pipe_with};
    use tokio::io::{DuplexStream, duplex, split};
    use tokio::time::timeout;

    use super::*;

    fn stream(capacity: usize) -> (File, Arc<Output>) {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        (write.into(), Output::with_capacity(read, capacity).unwrap())
    }

    fn connect(output: &Arc<Output>, offset: u64) -> DuplexStream {
        let (host, agent) = duplex(16);
        let attachment = output.attach(offset).unwrap();
        let output = output.clone();
        tokio::spawn(async move {
            let (acks, sink) = split(agent);
            output.serve(attachment, acks, sink).await;
        });
        host
    }

    async fn read(host: &mut DuplexStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        timeout(Duration::from_secs(5), host.read_exact(&mut bytes)).await.unwrap().unwrap();
        bytes
    }

    async fn ends(host: &mut DuplexStream) -> bool {
        timeout(Duration::from_secs(5), host.read(&mut [0])).await.unwrap().unwrap() == 0
    }

    #[tokio::test]
    async fn a_broken_connection_loses_and_repeats_nothing() {
        use std::io::Write;
        let (mut process, output) = stream(1000);
        process.write_all(b"0123456789").unwrap();
        let mut host = connect(&output, 0);
        assert_eq!(read(&mut host, 10).await, b"0123456789");
        host.write_u64_le(4).await.unwrap();
        drop(host);
        process.write_all(b"abc").unwrap();
        drop(process);
        let mut host = connect(&output, 6);
        assert_eq!(read(&mut host, 7).await, b"6789abc");
        assert!(ends(&mut host).await);
        host.write_u64_le(13).await.unwrap();
        let mut host = connect(&output, 13);
        assert!(ends(&mut host).await);
        assert!(output.attach(5).is_err(), "acknowledged by attaching at 6");
        assert!(output.attach(14).is_err());
    }

    #[tokio::test]
    async fn a_full_buffer_stops_the_process_until_the_host_acknowledges() {
        use std::io::Write;
        let (mut process, output) = stream(100);
        let mut written = 0u64;
        // Fill both the buffer and the pipe behind it.
        let stalled = async {
            let mut idle = 0;
            while idle < 20 {
                match process.write(&[7; 4096]) {
                    Ok(count) => written += count as u64,
                    Err(_) => idle += 1,
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        stalled.await;
        assert_eq!(output.lock().buffer.free(), 0);
        let mut host = connect(&output, 0);
        drop(process);
        let mut seen = 0u64;
        while seen < written {
            seen += read(&mut host, (written - seen).min(100) as usize).await.len() as u64;
            host.write_u64_le(seen).await.unwrap();
        }
        assert!(ends(&mut host).await);
    }

    #[tokio::test]
    async fn a_newer_connection_displaces_the_older() {
        use std::io::Write;
        let (mut process, output) = stream(100);
        let mut old = connect(&output, 0);
        let mut new = connect(&output, 0);
        assert!(ends(&mut old).await);
        process.write_all(b"x").unwrap();
        assert_eq!(read(&mut new, 1).await, b"x");
    }

    #[tokio::test]
    async fn an_impossible_acknowledgement_ends_the_connection_only() {
        use std::io::Write;
        let (mut process, output) = stream(100);
        let mut host = connect(&output, 0);
        host.write_u64_le(1).await.unwrap();
        assert!(ends(&mut host).await);
        process.write_all(b"y").unwrap();
        assert_eq!(read(&mut connect(&output, 0), 1).await, b"y");
    }

    #[tokio::test]
    async fn a_forgotten_stream_lets_go_of_its_pipe() {
        use std::io::Write;
        let (mut process, output) = stream(100);
        tokio::task::yield_now().await;
        drop(output);
        let broken = timeout(Duration::from_secs(5), async {
            while process.write_all(b"z").is_ok() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        broken.await.unwrap();
    }
}
