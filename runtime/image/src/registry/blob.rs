//! Large blobs: fetched by a task, read by a blocking thread, resumed where the connection broke.

use std::io::{self, Read};

use reqwest::StatusCode;
use reqwest::header::CONTENT_RANGE;
use tokio::sync::mpsc;

use super::client::Repository;
use super::failure::{Attempts, Failure};
use super::pace::Meter;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::processors::Turn;
use crate::store::Partial;

/// Chunks in flight between task and thread; a chunk is what one read from the connection gave.
const IN_FLIGHT: usize = 16;
/// Bytes after which a broken connection is no failed attempt.
const PROGRESS: u64 = 1 << 20;

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
    /// Whether the task stopped before that.
    stopped: bool,
    /// What is here already and comes first, and takes what comes.
    partial: Option<Partial>,
    /// Its thread's, which works on what it has read.
    turn: Turn,
}

/// A bounded pipe from a task to a blocking thread, which has its turn on a processor while it has something to do.
/// Before that, the thread reads what `partial` has; the task goes on from there.
pub(crate) fn channel(turn: Turn, partial: Option<Partial>) -> (BlobSender, BlobReader) {
    let (sender, receiver) = mpsc::channel(IN_FLIGHT);
    let reader = BlobReader { receiver, chunk: Vec::new(), used: 0, ended: false, stopped: false, partial, turn };
    (BlobSender(sender), reader)
}

impl BlobReader {
    /// What comes next; none if the task stopped.
    fn receive(&mut self) -> Option<Message> {
        let message = match self.receiver.try_recv() {
            Ok(message) => message,
            Err(_) => {
                self.turn.leave();
                self.receiver.blocking_recv()?
            }
        };
        self.turn.pass();
        if let (Message::Chunk(chunk), Some(partial)) = (&message, &mut self.partial) {
            partial.append(chunk);
        }
        Some(message)
    }

    /// Ends the reading. What is here of the blob is kept for another attempt if the task stopped, and if `keep`.
    pub(crate) fn close(&mut self, keep: bool) {
        let Some(mut partial) = self.partial.take() else { return };
        if !(self.stopped || keep) {
            partial.discard();
            return;
        }
        while let Ok(Message::Chunk(chunk)) = self.receiver.try_recv() {
            partial.append(&chunk);
        }
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(partial) = &mut self.partial
            && let count @ 1.. = partial.read(buffer)?
        {
            self.turn.pass();
            return Ok(count);
        }
        while self.used == self.chunk.len() && !self.ended {
            match self.receive() {
                Some(Message::Chunk(chunk)) => {
                    self.chunk = chunk;
                    self.used = 0;
                }
                Some(Message::End) => self.ended = true,
                None => {
                    self.stopped = true;
                    return Err(io::Error::other("the download stopped"));
                }
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
    /// Sends the bytes of a layer of `size` from byte `offset` on to `sender`, reporting how many are here. The reader
    /// checks the digest.
    ///
    /// Returns early without an error when nobody reads any more: the reader knows why.
    pub(crate) async fn download(
        &self,
        digest: &Digest,
        size: u64,
        offset: u64,
        sender: BlobSender,
        report: impl Fn(u64),
    ) -> Result<()> {
        let what = format!("layer {digest}");
        let mut download = Download { digest, size, offset, sender: &sender, what: &what, report: &report };
        let (mut attempts, mut meter) = (Attempts::new(self.backoff), Meter::new(self.pace));
        let mut counted = offset;
        loop {
            if download.offset == size && size > 0 {
                break;
            }
            match self.download_from(&mut download, &mut meter).await {
                Ok(()) => break,
                Err(_) if sender.0.is_closed() => return Ok(()),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(passing)) => {
                    tracing::debug!(what, reason = %passing, download.offset, "download interrupted");
                    let gained = download.offset.saturating_sub(counted);
                    if !passing.slow && is_progress(gained, size.saturating_sub(counted)) {
                        counted = download.offset;
                        attempts.forget();
                    }
                    let next = if meter.is_over() { None } else { attempts.next(&passing) };
                    let Some(wait) = next else { return Err(passing.last(&what, &self.label)) };
                    let _ = meter.wait(tokio::time::sleep(wait)).await;
                }
            }
        }
        let _ = sender.0.send(Message::End).await;
        Ok(())
    }

    /// One connection's worth.
    async fn download_from(&self, download: &mut Download<'_, impl Fn(u64)>, meter: &mut Meter) -> Result<(), Failure> {
        let Download { digest, size, offset, what, .. } = *download;
        let mut response = meter.wait(self.open_blob(digest, offset, what)).await??;
        let resumed = response.status() == StatusCode::PARTIAL_CONTENT;
        if resumed {
            let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
            if !range.is_some_and(|range| range.starts_with(&format!("bytes {offset}-"))) {
                return Err(Failure::passing("it answered with another range"));
            }
        }
        // A server that cannot resume sends all again.
        let mut skip = if resumed { 0 } else { offset };
        if let Some(length) = response.content_length() {
            let total = length.saturating_add(if resumed { offset } else { 0 });
            if total != size {
                let reason = format!("the registry has {total} bytes of it, its manifest says {size}");
                return Err(Failure::Final(Error::corrupt(what, reason)));
            }
        }
        while let Some(chunk) = meter.wait(response.chunk()).await?? {
            meter.received(chunk.len());
            let skipped = usize::try_from(skip).map_or(chunk.len(), |skip| skip.min(chunk.len()));
            skip -= skipped as u64;
            download.take(chunk.get(skipped..).unwrap_or_default()).await?;
        }
        if download.offset < size {
            return Err(Failure::passing(format!("it ended after {} of {size} bytes", download.offset)));
        }
        Ok(())
    }
}

/// A layer on its way.
struct Download<'a, R> {
    digest: &'a Digest,
    size: u64,
    /// Bytes that are here.
    offset: u64,
    sender: &'a BlobSender,
    what: &'a str,
    report: &'a R,
}

impl<R: Fn(u64)> Download<'_, R> {
    /// Passes on bytes that came.
    async fn take(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let end = self.offset.saturating_add(bytes.len() as u64);
        if end > self.size {
            let reason = format!("the registry sent more than the {} bytes its manifest says", self.size);
            return Err(Failure::Final(Error::corrupt(self.what, reason)));
        }
        let sent = self.sender.0.send(Message::Chunk(bytes.to_vec())).await;
        sent.map_err(|_| Failure::passing("nobody reads it"))?;
        self.offset = end;
        (self.report)(end);
        Ok(())
    }
}

/// Whether `gained` bytes of the `left` are reason enough to be as patient as at first. A server that gives a byte for
/// each connection would otherwise never be given up.
fn is_progress(gained: u64, left: u64) -> bool {
    gained > 0 && (gained >= PROGRESS || gained >= left / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_as_progress_ends() {
        assert!(!is_progress(0, 0) && !is_progress(1, 1 << 20) && !is_progress(PROGRESS - 1, 1 << 40));
        assert!(is_progress(PROGRESS, 1 << 40) && is_progress(1, 4));
        let (mut left, mut connections) = (PROGRESS, 0);
        while left > 0 {
            left -= (left / 4).max(1);
            connections += 1;
        }
        assert!(connections < 60, "{connections}");
    }
}
