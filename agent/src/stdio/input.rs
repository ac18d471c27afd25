//! One standard input of a process.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use nacelle_proto::stdio::CLOSED;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::sync::watch;

use crate::fd;

/// Largest piece moved at once, in bytes.
const CHUNK: usize = 16 << 10;
/// What a terminal takes as the end of its input, unless a program changed it.
const END_OF_FILE_CHARACTER: &[u8] = &[4];

/// A standard input, shared by its connections, of which the newest is live.
#[derive(Debug)]
pub struct Input {
    /// Nothing once the host has closed it.
    sink: Mutex<Option<Arc<AsyncFd<File>>>>,
    terminal: bool,
    connection: watch::Sender<u64>,
}

impl Input {
    /// Writes to `sink`, which must be non-blocking: a pipe or, if `terminal`, the master
    /// side of one.
    pub fn new(sink: OwnedFd, terminal: bool) -> io::Result<Arc<Self>> {
        // A terminal's master is watched for reading by its output already.
        let sink = fd::watch(File::from(sink), Interest::WRITABLE)?;
        Ok(Arc::new(Self { sink: Mutex::new(Some(Arc::new(sink))), terminal, connection: watch::Sender::new(0) }))
    }

    /// Makes the caller's connection the live one. Nothing if the input is closed.
    pub fn attach(&self) -> Option<Attachment> {
        let sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let mut number = 0;
        self.connection.send_modify(|newest| {
            *newest += 1;
            number = *newest;
        });
        Some(Attachment { sink, number, newest: self.connection.subscribe() })
    }

    /// Moves bytes from the host to the process until either ends or a newer connection
    /// takes over. The end of `source` is the end of the process's input, if the host is
    /// there to hear by `answer` that it is closed; otherwise the connection is broken, and
    /// another may carry on.
    pub async fn serve<R, W>(&self, attachment: Attachment, mut source: R, mut answer: W)
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let Attachment { sink, number, mut newest } = attachment;
        let copy = async {
            let mut chunk = vec![0; CHUNK];
            loop {
                match source.read(&mut chunk).await {
                    Ok(0) => {
                        if answer.write_all(&[CLOSED]).await.is_ok() && answer.flush().await.is_ok() {
                            self.close(&sink).await;
                        }
                        return;
                    }
                    Ok(count) => {
                        if write_all(&sink, &chunk[..count]).await.is_err() {
                            // The process closed its end.
                            return;
                        }
                    }
                    Err(_) => return,
                }
            }
        };
        tokio::select! {
            () = copy => {}
            _ = newest.wait_for(|newest| *newest != number) => {}
        }
    }

    async fn close(&self, sink: &AsyncFd<File>) {
        if self.terminal {
            let _ = write_all(sink, END_OF_FILE_CHARACTER).await;
        } else {
            // The connection's own reference goes when it returns.
            self.sink.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }
}

/// A connection's hold on an input.
#[derive(Debug)]
pub struct Attachment {
    sink: Arc<AsyncFd<File>>,
    number: u64,
    newest: watch::Receiver<u64>,
}

async fn write_all(sink: &AsyncFd<File>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = sink.async_io(Interest::WRITABLE, |mut file| file.write(bytes)).await?;
        bytes = bytes.get(count..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Duration;

    use rustix::pipe::{PipeFlags, pipe_with};
    use tokio::io::{AsyncWriteExt, duplex};
    use tokio::time::timeout;

    use super::*;

    fn stdin() -> (File, Arc<Input>) {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        (read.into(), Input::new(write, false).unwrap())
    }

    async fn serve(input: &Input, attachment: Attachment, agent: tokio::io::DuplexStream) {
        let (source, answer) = tokio::io::split(agent);
        input.serve(attachment, source, answer).await;
    }

    #[tokio::test]
    async fn a_host_that_is_gone_leaves_the_input_open_for_another() {
        let (mut process, input) = stdin();
        let (mut host, agent) = duplex(1000);
        let attachment = input.attach().unwrap();
        host.write_all(b"half a ").await.unwrap();
        drop(host);
        timeout(Duration::from_secs(5), serve(&input, attachment, agent)).await.unwrap();
        let (mut host, agent) = duplex(1000);
        let attachment = input.attach().expect("still open");
        host.write_all(b"line").await.unwrap();
        host.shutdown().await.unwrap();
        timeout(Duration::from_secs(5), serve(&input, attachment, agent)).await.unwrap();
        assert_eq!(host.read_u8().await.unwrap(), CLOSED);
        assert!(input.attach().is_none(), "closed for good");
        drop(input);
        let mut seen = String::new();
        process.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "half a line");
    }

    #[tokio::test]
    async fn more_than_a_pipe_holds_arrives_whole_and_closes() {
        let (mut process, input) = stdin();
        let (mut host, agent) = duplex(1000);
        let attachment = input.attach().unwrap();
        let server = {
            let input = input.clone();
            tokio::spawn(async move { serve(&input, attachment, agent).await })
        };
        let sent: Vec<u8> = (0..300_000u32).map(|number| number as u8).collect();
        let writer = {
            let sent = sent.clone();
            tokio::spawn(async move {
                host.write_all(&sent).await.unwrap();
                host.shutdown().await.unwrap();
                assert_eq!(host.read_u8().await.unwrap(), CLOSED);
            })
        };
        let mut seen = Vec::new();
        let whole = timeout(Duration::from_secs(60), async {
            loop {
                match process.read_to_end(&mut seen) {
                    Ok(_) => return,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        });
        whole.await.unwrap();
        assert!(seen == sent);
        writer.await.unwrap();
        server.await.unwrap();
        assert!(input.attach().is_none(), "closed for good");
    }

    #[tokio::test]
    async fn a_newer_connection_displaces_the_older_without_closing_the_input() {
        let (mut process, input) = stdin();
        let (_old_host, agent) = duplex(10);
        let old = input.attach().unwrap();
        let server = {
            let input = input.clone();
            tokio::spawn(async move { serve(&input, old, agent).await })
        };
        let new = input.attach().unwrap();
        timeout(Duration::from_secs(5), server).await.unwrap().unwrap();
        input.serve(new, &b"hello"[..], tokio::io::sink()).await;
        drop(input);
        let mut seen = String::new();
        process.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "hello");
    }

    #[tokio::test]
    async fn a_process_that_closed_its_input_ends_the_connection() {
        let (process, input) = stdin();
        drop(process);
        let attachment = input.attach().unwrap();
        timeout(Duration::from_secs(5), input.serve(attachment, tokio::io::repeat(1), tokio::io::sink()))
            .await
            .unwrap();
    }
}
