//! Large blobs: fetched by a task, read by a blocking thread, resumed where the connection broke.

use std::io::{self, Read};

use reqwest::StatusCode;
use reqwest::header::CONTENT_RANGE;
use tokio::sync::mpsc;

use super::client::{Failure, Repository, passing};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Chunks in flight between task and thread; a chunk is what one read from the connection gave.
const IN_FLIGHT: usize = 16;

enum Message {
    Chunk(Vec<u8>),
    End,
}

/// The task's end.
pub(crate) struct BlobSender(mpsc::Sender<Message>);

/// The thread's end: the blob's bytes, then their end. An error when the task stopped before that.
pub(crate) struct BlobReader {
    receiver: mpsc::Receiver<Message>,
    chunk: Vec<u8>,
    used: usize,
    ended: bool,
}

/// A bounded pipe from a task to a blocking thread.
pub(crate) fn channel() -> (BlobSender, BlobReader) {
    let (sender, receiver) = mpsc::channel(IN_FLIGHT);
    (BlobSender(sender), BlobReader { receiver, chunk: Vec::new(), used: 0, ended: false })
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.used == self.chunk.len() && !self.ended {
            match self.receiver.blocking_recv() {
                Some(Message::Chunk(chunk)) => {
                    self.chunk = chunk;
                    self.used = 0;
                }
                Some(Message::End) => self.ended = true,
                None => return Err(io::Error::other("the download stopped")),
            }
        }
        let rest = self.chunk.get(self.used..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..count), rest.get(..count)) {
            to.copy_from_slice(from);
        }
        self.used += count;
        Ok(count)
    }
}

impl Repository {
    /// Sends the `size` bytes of a layer to `sender`, reporting how many so far. The reader checks the digest.
    ///
    /// Returns early without an error when nobody reads any more: the reader knows why.
    pub(crate) async fn download(
        &self,
        digest: &Digest,
        size: u64,
        sender: BlobSender,
        report: impl Fn(u64),
    ) -> Result<()> {
        let what = format!("layer {digest}");
        let (mut offset, mut attempt) = (0, 0);
        loop {
            let begin = offset;
            match self.download_from(digest, size, &mut offset, &sender, &report, &what).await {
                Ok(()) => {
                    let _ = sender.0.send(Message::End).await;
                    return Ok(());
                }
                Err(_) if sender.0.is_closed() => return Ok(()),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing { reason, wait }) => {
                    tracing::debug!(what, reason, offset, attempt, "download interrupted");
                    if offset > begin {
                        attempt = 0;
                    }
                    let Some(backoff) = self.backoff.get(attempt) else { return Err(self.unavailable(&what, reason)) };
                    tokio::time::sleep(wait.unwrap_or_default().max(*backoff)).await;
                    attempt += 1;
                }
            }
        }
    }

    /// One connection's worth, from `offset` on.
    async fn download_from(
        &self,
        digest: &Digest,
        size: u64,
        offset: &mut u64,
        sender: &BlobSender,
        report: &impl Fn(u64),
        what: &str,
    ) -> Result<(), Failure> {
        let mut response = self.open_blob(digest, *offset, what).await?;
        let resumed = response.status() == StatusCode::PARTIAL_CONTENT;
        if resumed {
            let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
            if !range.is_some_and(|range| range.starts_with(&format!("bytes {offset}-"))) {
                return Err(Failure::Passing { reason: "it answered with another range".to_owned(), wait: None });
            }
        }
        // A server that cannot resume sends all again.
        let mut skip = if resumed { 0 } else { *offset };
        if let Some(length) = response.content_length() {
            let total = length.saturating_add(if resumed { *offset } else { 0 });
            if total != size {
                let reason = format!("the registry has {total} bytes of it, its manifest says {size}");
                return Err(Failure::Final(Error::corrupt(what, reason)));
            }
        }
        while let Some(chunk) = response.chunk().await.map_err(|error| passing(&error))? {
            let skipped = usize::try_from(skip).map_or(chunk.len(), |skip| skip.min(chunk.len()));
            skip -= skipped as u64;
            let chunk = chunk.get(skipped..).unwrap_or_default();
            let end = offset.saturating_add(chunk.len() as u64);
            if end > size {
                let reason = format!("the registry sent more than the {size} bytes its manifest says");
                return Err(Failure::Final(Error::corrupt(what, reason)));
            }
            let closed = || Failure::Passing { reason: "nobody reads it".to_owned(), wait: None };
            sender.0.send(Message::Chunk(chunk.to_vec())).await.map_err(|_| closed())?;
            *offset = end;
            report(end);
        }
        if *offset < size {
            return Err(Failure::Passing { reason: format!("it ended after {offset} of {size} bytes"), wait: None });
        }
        Ok(())
    }
}
