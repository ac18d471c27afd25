//! Carries one stream of a container from the guest into its log.

use std::sync::Arc;
use std::time::Duration;

use nacelle_proto::stdio::{Header, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::LogFile;
use super::format::Splitter;
use crate::agent::Agent;
use crate::live::Live;
use crate::vm::Vm;
use crate::{Error, clock};

/// Most bytes taken from the guest at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// Pause before a broken connection or a full disk is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// The longest pause, before a connection that breaks again and again without bringing anything.
const LONGEST_RETRY: Duration = Duration::from_secs(10);

/// Where a stream goes.
#[derive(Debug, Clone)]
pub struct Sink {
    /// The log; without one, output is read and forgotten.
    pub log: Option<Arc<LogFile>>,
    /// Attached clients.
    pub live: Arc<Live>,
}

/// Runs until the stream has ended and all of it is in the log, or the guest is gone.
pub async fn pump(agent: Agent, vm: Arc<Vm>, container_id: String, stream: Stream, sink: Sink) {
    let mut place = Progress { durable: sink.log.as_ref().map_or(0, |log| log.offset(stream)), shown: 0 };
    place.shown = place.durable;
    let header = |offset| Header { container_id: container_id.clone(), exec_id: String::new(), stream, offset };
    let mut breaks = Breaks::default();
    loop {
        let before = place.durable;
        let end = match agent.stream(&header(place.durable)).await {
            Ok(connection) => transfer(connection, stream, &sink, &mut place).await,
            Err(Error::OutputGone { start, .. }) if breaks.may_skip(place.durable, start) => {
                // Without a log nothing tells where the last daemon stopped, and nobody minds.
                if let Some(log) = &sink.log {
                    let bytes = start - place.durable;
                    if breaks.skips.is_power_of_two() {
                        let times = breaks.skips;
                        tracing::error!(container = container_id, %stream, bytes, times, "output is in no log and no longer in the guest");
                    }
                    log.skip(stream, bytes);
                }
                place = Progress { durable: start, shown: start.max(place.shown) };
                continue;
            }
            Err(error) => Err(std::io::Error::other(error)),
        };
        match end {
            Ok(()) => break,
            Err(error) if vm.exit().borrow().is_some() => {
                tracing::debug!(container = container_id, %stream, %error, "stream ended with the guest");
                break;
            }
            Err(error) => {
                let (pause, worth_telling) = breaks.next(place.durable > before);
                if worth_telling {
                    let times = breaks.count;
                    tracing::warn!(container = container_id, %stream, %error, times, "log stream broke: connecting again");
                }
                tokio::select! {
                    _ = vm.wait_exit() => break,
                    () = tokio::time::sleep(pause) => {}
                }
            }
        }
    }
    sink.live.end();
}

/// How often a stream's connection broke: a guest may have it break as often as it likes, and say what it likes of what it
/// still has.
#[derive(Debug, Default)]
struct Breaks {
    count: u64,
    /// Those in a row that brought nothing.
    in_vain: u32,
    /// How often output was given up, and whether it was since the last that brought something.
    skips: u64,
    skipped: bool,
}

impl Breaks {
    /// How long to wait before the next connection, and whether this break is to be told: the first, and then ever fewer.
    fn next(&mut self, brought_something: bool) -> (Duration, bool) {
        self.count = self.count.saturating_add(1);
        if brought_something {
            (self.in_vain, self.skipped) = (0, false);
        } else {
            self.in_vain = self.in_vain.saturating_add(1);
        }
        let pause = RETRY.saturating_mul(1 << self.in_vain.saturating_sub(1).min(16)).min(LONGEST_RETRY);
        (pause, self.count.is_power_of_two())
    }

    /// Whether a guest is believed that has output from `start` on only. An agent keeps what was not acknowledged, so that
    /// happens once to a daemon that starts again, and never ahead of all that can have been written.
    fn may_skip(&mut self, durable: u64, start: u64) -> bool {
        let believed = !self.skipped && start > durable && start <= i64::MAX.unsigned_abs();
        if believed {
            self.skipped = true;
            self.skips = self.skips.saturating_add(1);
        }
        believed
    }
}

/// How far a stream has come.
#[derive(Debug)]
struct Progress {
    /// First byte that the log does not have yet.
    durable: u64,
    /// First byte that attached clients were not shown yet.
    shown: u64,
}

/// Moves bytes until the end of the stream (`Ok`) or of the connection.
async fn transfer(
    mut connection: UnixStream,
    stream: Stream,
    sink: &Sink,
    place: &mut Progress,
) -> std::io::Result<()> {
    let mut splitter = Splitter::new(stream);
    let mut received = place.durable;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let got = connection.read(&mut chunk).await?;
        let mut lines = Vec::new();
        let data = chunk.get(..got).unwrap_or_default();
        if data.is_empty() {
            splitter.finish(clock::now(), &mut lines);
        } else {
            splitter.push(data, clock::now(), &mut lines);
            // After a broken connection some of it comes again.
            let seen = usize::try_from(place.shown.saturating_sub(received)).unwrap_or(usize::MAX);
            sink.live.send(data.get(seen..).unwrap_or_default());
        }
        received = received.saturating_add(got as u64);
        place.shown = place.shown.max(received);
        let durable = received.saturating_sub(splitter.held() as u64);
        if let (Some(log), false) = (&sink.log, lines.is_empty()) {
            append(log, stream, durable.saturating_sub(place.durable), lines).await;
        }
        place.durable = durable;
        if got == 0 {
            // The agent may forget the stream now; it is no harm if it no longer listens.
            let _ = connection.write_all(&durable.to_le_bytes()).await;
            return Ok(());
        }
        connection.write_all(&durable.to_le_bytes()).await?;
    }
}

/// Appends until the disk takes it: what the guest sent is not dropped because a disk is
/// full, the container waits instead.
async fn append(log: &Arc<LogFile>, stream: Stream, bytes: u64, lines: Vec<u8>) {
    let lines = Arc::new(lines);
    let mut complained = false;
    loop {
        let (log, lines) = (log.clone(), lines.clone());
        let path = log.path().to_owned();
        match tokio::task::spawn_blocking(move || log.append(stream, bytes, &lines)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) if !complained => {
                tracing::error!(log = %path.display(), %error, "log cannot be written: its container waits until it can");
                complained = true;
            }
            Ok(Err(_)) => {}
            Err(error) => {
                tracing::error!(log = %path.display(), %error, "log writer ended abnormally");
                return;
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_breaks_in_vain_is_tried_ever_more_rarely_and_told_of_ever_less() {
        let mut breaks = Breaks::default();
        let (mut waited, mut told) = (Duration::ZERO, 0);
        for _ in 0..1000 {
            let (pause, worth_telling) = breaks.next(false);
            assert!((RETRY..=LONGEST_RETRY).contains(&pause));
            waited += pause;
            told += u32::from(worth_telling);
        }
        assert!(waited > Duration::from_secs(9900), "{waited:?}");
        assert_eq!(told, 10);
        // One that brings something is worth the shortest pause, but no more lines.
        assert_eq!(breaks.next(true), (RETRY, false));
        assert_eq!(breaks.next(false), (RETRY, false));
        assert_eq!(breaks.next(false), (RETRY * 2, false));
    }

    #[test]
    fn a_guest_that_moves_the_beginning_of_its_output_is_believed_once() {
        let mut breaks = Breaks::default();
        assert!(!breaks.may_skip(10, 10) && !breaks.may_skip(10, 9), "nothing is missing");
        assert!(!breaks.may_skip(10, u64::MAX), "nobody can have written so much");
        assert!(breaks.may_skip(10, 15));
        for start in 16..1000 {
            assert!(!breaks.may_skip(start - 1, start), "{start}");
            breaks.next(false);
        }
        // Not before something has come.
        breaks.next(true);
        assert!(breaks.may_skip(1000, 1001));
    }
}
