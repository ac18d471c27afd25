//! ExecSync: a further process in a container, its output collected.

use std::time::Duration;

use nacelle_proto::agent::v1 as api;
use nacelle_proto::stdio::{Header, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::agent::Agent;
use crate::{Error, Result};

/// Most output kept of each stream, in bytes; the rest is read and dropped, as the
/// kubelet's own runtimes do.
const OUTPUT_LIMIT: usize = 16 << 20;

/// What a process said and how it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code, 0 to 255.
    pub exit_code: i32,
}

/// Makes sure the guest forgets the process, whatever becomes of the call.
#[derive(Debug)]
pub struct Forget {
    agent: Agent,
    container_id: String,
    exec_id: String,
}

impl Forget {
    /// Forgets, and kills, this process when it is dropped.
    pub fn new(agent: &Agent, container_id: &str, exec_id: &str) -> Self {
        Self { agent: agent.clone(), container_id: container_id.into(), exec_id: exec_id.into() }
    }
}

impl Drop for Forget {
    fn drop(&mut self) {
        let request = api::ForgetExecRequest { container_id: self.container_id.clone(), exec_id: self.exec_id.clone() };
        let agent = self.agent.clone();
        tokio::spawn(async move {
            let mut client = agent.client();
            if let Err(error) = agent.call("forget an exec", client.forget_exec(request)).await {
                tracing::debug!(%error, "exec not forgotten");
            }
        });
    }
}

/// Runs `command` and waits for its end, for as long as `limit` if there is one. When the
/// limit passes, or the caller goes away, the process is killed in the guest.
pub async fn exec_sync(
    agent: &Agent,
    container_id: &str,
    exec_id: String,
    command: Vec<String>,
    limit: Option<Duration>,
) -> Result<ExecOutput> {
    let mut client = agent.client();
    let request = api::ExecRequest {
        container_id: container_id.into(),
        exec_id: exec_id.clone(),
        args: command,
        ..api::ExecRequest::default()
    };
    let _forget = Forget::new(agent, container_id, &exec_id);
    agent.call("exec", client.exec(request)).await?;
    let run = async {
        let header = |stream| Header { container_id: container_id.into(), exec_id: exec_id.clone(), stream, offset: 0 };
        let (stdout, stderr) = (header(Stream::Stdout), header(Stream::Stderr));
        let request = api::WaitRequest { container_id: container_id.into(), exec_id: exec_id.clone() };
        let wait =
            async { client.wait(request).await.map_err(|status| crate::agent::error("wait for an exec", &status)) };
        let (stdout, stderr, exit) = tokio::try_join!(collect(agent, &stdout), collect(agent, &stderr), wait)?;
        Ok(ExecOutput { stdout, stderr, exit_code: exit.into_inner().exit_code })
    };
    match limit {
        None => run.await,
        Some(limit) => match tokio::time::timeout(limit, run).await {
            Ok(result) => result,
            Err(_) => {
                let request = api::SignalRequest {
                    container_id: container_id.into(),
                    exec_id,
                    signal: crate::signal::KILL,
                    all: false,
                };
                let mut client = agent.client();
                let _ = agent.call("kill an exec", client.signal(request)).await;
                Err(Error::Deadline { action: "the command".into(), limit })
            }
        },
    }
}

/// Reads a stream to its end.
async fn collect(agent: &Agent, header: &Header) -> Result<Vec<u8>> {
    let failed = |e: std::io::Error| Error::Agent { action: format!("read {}", header.stream), message: e.to_string() };
    let mut connection = agent.stream(header).await?;
    let mut kept = Vec::new();
    let mut received = 0_u64;
    let mut chunk = vec![0; 16 * 1024];
    loop {
        let got = connection.read(&mut chunk).await.map_err(failed)?;
        if got == 0 {
            return Ok(kept);
        }
        received += got as u64;
        let room = OUTPUT_LIMIT.saturating_sub(kept.len());
        kept.extend_from_slice(chunk.get(..got.min(room)).unwrap_or_default());
        connection.write_all(&received.to_le_bytes()).await.map_err(failed)?;
    }
}

/// An id for an exec.
pub fn new_id() -> Result<String> {
    random_hex::<8>()
}

/// Hexadecimal digits of `N` random bytes.
pub fn random_hex<const N: usize>() -> Result<String> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::Internal(format!("no random numbers: {e}")))?;
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
