//! Further processes in a container, and ExecSync: one whose output is collected.

use std::sync::OnceLock;
use std::time::Duration;

use nacelle_proto::agent::v1 as api;
use nacelle_proto::stdio::{Header, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::agent::{self, Agent, Reach};
use crate::id::random_hex;
use crate::{AgentFailure, Error, ErrorKind, Result};

/// Most output that is kept of both streams together, in bytes; the rest is read and dropped.
/// With what is around it, it fits into the 16 MiB that the kubelet takes in one message.
pub const EXEC_OUTPUT_LIMIT: usize = (16 << 20) - (64 << 10);
/// Pause before a guest is asked again to forget a process.
const AGAIN: Duration = Duration::from_millis(500);

/// What a process said and how it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// How many bytes of the two were dropped.
    pub dropped: u64,
    /// Exit code, 0 to 255.
    pub exit_code: i32,
}

/// A process that is started in a container, and that the guest forgets, and kills, when this is
/// dropped, whatever became of the call that started it.
#[derive(Debug)]
pub struct Exec {
    agent: Agent,
    container_id: String,
    exec_id: String,
    /// The call that starts it. It is a task of its own: given up half-way, nobody would know
    /// whether there is a process.
    start: Option<JoinHandle<Result<()>>>,
    /// Whether the guest has said that there is none.
    refused: bool,
}

impl Exec {
    /// Starts a process; see [`started`](Self::started).
    pub fn start(agent: &Agent, request: api::ExecRequest) -> Self {
        let (container_id, exec_id) = (request.container_id.clone(), request.exec_id.clone());
        let call = agent.clone();
        let start = tokio::spawn(async move { call.call("exec", call.client().exec(request)).await.map(drop) });
        Self { agent: agent.clone(), container_id, exec_id, start: Some(start), refused: false }
    }

    /// Waits until it has been started.
    pub async fn started(&mut self) -> Result<()> {
        let Some(start) = &mut self.start else { return Ok(()) };
        let result = start.await.unwrap_or_else(|e| Err(Error::Internal(e.to_string())));
        self.start = None;
        self.refused = result.as_ref().is_err_and(|error| !in_doubt(error));
        result
    }

    /// Opens one of its streams.
    pub async fn stream(&self, stream: Stream) -> Result<UnixStream> {
        let (container_id, exec_id) = (self.container_id.clone(), self.exec_id.clone());
        self.agent.stream(&Header { container_id, exec_id, stream, offset: 0 }).await
    }

    /// Waits for its end; its exit code.
    pub async fn wait(&self) -> Result<i32> {
        let request = api::WaitRequest { container_id: self.container_id.clone(), exec_id: self.exec_id.clone() };
        let answer = self.agent.client().wait(request).await;
        Ok(answer.map_err(|status| agent::error("wait for an exec", &status))?.into_inner().exit_code)
    }

    /// Sets the size of its terminal.
    pub async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        agent::resize(&self.agent, &self.container_id, &self.exec_id, rows, columns).await
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        if self.refused {
            return;
        }
        let start = self.start.take();
        let request = api::ForgetExecRequest { container_id: self.container_id.clone(), exec_id: self.exec_id.clone() };
        tokio::spawn(forget(self.agent.clone(), start, request));
    }
}

/// Whether the process may be there although the call that starts it failed so.
fn in_doubt(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Unreachable | ErrorKind::Internal)
}

/// Has the guest forget a process, one that it is about to start included.
async fn forget(agent: Agent, start: Option<JoinHandle<Result<()>>>, request: api::ForgetExecRequest) {
    let mut doubt = true;
    if let Some(start) = start {
        match start.await {
            Ok(Err(error)) if !in_doubt(&error) => return,
            started => doubt = !matches!(started, Ok(Ok(()))),
        }
    }
    let mut until = Instant::now() + agent.deadline();
    loop {
        match agent.call("forget an exec", agent.client().forget_exec(request.clone())).await {
            Ok(_) => return,
            // It may start what it was asked to start as soon as it goes on.
            Err(Error::Deadline { .. }) => {
                doubt = true;
                let mut reach = agent.watch_reach();
                if reach.wait_for(|reach| *reach == Reach::Answers).await.is_err() {
                    return;
                }
                until = Instant::now() + agent.deadline();
            }
            Err(Error::Agent { kind: AgentFailure::NotFound, .. }) if doubt && Instant::now() < until => {
                tokio::time::sleep(AGAIN).await;
            }
            Err(error) => {
                tracing::debug!(%error, "exec not forgotten");
                return;
            }
        }
    }
}

/// Runs `command` and waits for its end, for as long as `limit` if there is one. When the
/// limit passes, or the caller goes away, the process is killed in the guest, with all that it
/// has started.
pub async fn exec_sync(
    agent: &Agent,
    container_id: &str,
    exec_id: String,
    command: Vec<String>,
    limit: Option<Duration>,
) -> Result<ExecOutput> {
    let request =
        api::ExecRequest { container_id: container_id.into(), exec_id, args: command, ..api::ExecRequest::default() };
    let mut exec = Exec::start(agent, request);
    let run = async {
        exec.started().await?;
        let (stdout, stderr, exit_code) =
            tokio::try_join!(collect(&exec, Stream::Stdout), collect(&exec, Stream::Stderr), exec.wait())?;
        Ok(fit(stdout, stderr, exit_code, EXEC_OUTPUT_LIMIT))
    };
    match limit {
        None => run.await,
        Some(limit) => timeout(limit, run).await.unwrap_or(Err(Error::TimedOut(limit))),
    }
}

/// The beginning of a stream, and how long all of it was.
#[derive(Debug, Default)]
struct Collected {
    kept: Vec<u8>,
    length: u64,
}

/// Both streams in `limit` bytes together. Each gets half of them at least, and what the other does
/// not need.
fn fit(mut stdout: Collected, mut stderr: Collected, exit_code: i32, limit: usize) -> ExecOutput {
    let errors = stderr.kept.len().min((limit / 2).max(limit.saturating_sub(stdout.kept.len())));
    stderr.kept.truncate(errors);
    stdout.kept.truncate(limit.saturating_sub(errors));
    let said = stdout.length.saturating_add(stderr.length);
    let kept = stdout.kept.len().saturating_add(errors) as u64;
    ExecOutput { stdout: stdout.kept, stderr: stderr.kept, dropped: said.saturating_sub(kept), exit_code }
}

/// Reads a stream to its end.
async fn collect(exec: &Exec, stream: Stream) -> Result<Collected> {
    let failed = |e: std::io::Error| agent::broken(&format!("read {stream}"), &e);
    let mut connection = exec.stream(stream).await?;
    let mut collected = Collected::default();
    let mut chunk = vec![0; 16 * 1024];
    loop {
        let got = connection.read(&mut chunk).await.map_err(failed)?;
        if got == 0 {
            return Ok(collected);
        }
        collected.length += got as u64;
        let room = EXEC_OUTPUT_LIMIT.saturating_sub(collected.kept.len());
        collected.kept.extend_from_slice(chunk.get(..got.min(room)).unwrap_or_default());
        connection.write_all(&collected.length.to_le_bytes()).await.map_err(failed)?;
    }
}

/// An id for an exec: of this daemon's, see [`is_own`].
pub fn new_id() -> Result<String> {
    Ok(format!("{}{}", own()?, random_hex::<8>()?))
}

/// Whether this daemon asked for the exec of this id, and no earlier one.
pub fn is_own(id: &str) -> bool {
    own().is_ok_and(|own| id.starts_with(own))
}

/// What the ids of this daemon's execs begin with.
fn own() -> Result<&'static str> {
    static OWN: OnceLock<String> = OnceLock::new();
    match OWN.get() {
        Some(own) => Ok(own),
        None => {
            let drawn = random_hex::<4>()?;
            Ok(OWN.get_or_init(|| drawn))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(length: usize) -> Collected {
        Collected { kept: vec![b'x'; length.min(10)], length: length as u64 }
    }

    #[test]
    fn both_streams_together_keep_to_the_limit_and_neither_takes_the_others_half() {
        for (stdout, stderr, kept, dropped) in [
            (0, 0, (0, 0), 0),
            (4, 6, (4, 6), 0),
            (10, 1, (9, 1), 1),
            (1, 10, (1, 9), 1),
            (10, 10, (5, 5), 10),
            (7, 6, (5, 5), 3),
            (3, 1000, (3, 7), 993),
            (1000, 1000, (5, 5), 1990),
        ] {
            let output = fit(stream(stdout), stream(stderr), 3, 10);
            assert_eq!((output.stdout.len(), output.stderr.len()), kept, "{stdout} {stderr}");
            assert_eq!((output.dropped, output.exit_code), (dropped, 3), "{stdout} {stderr}");
        }
    }
}
