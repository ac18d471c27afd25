//! What a streaming client needs of a pod: processes to talk to, containers to attach to,
//! ports to reach.

use bytes::Bytes;
use nacelle_proto::agent::v1 as api;
use nacelle_proto::stdio::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::agent::{self, Agent};
use crate::exec::{self, Exec};
use crate::live::LiveOutput;
use crate::manager::Manager;
use crate::model::{ContainerState, SandboxState};
use crate::stdin::{self, StdinWriter};
use crate::{Error, Result};

/// Most output taken from the guest at once, in bytes.
const CHUNK_BYTES: usize = 32 * 1024;

/// A process as a streaming client asks for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecConfig {
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Whether the client has input for it.
    pub stdin: bool,
    /// Whether it gets a terminal.
    pub tty: bool,
}

/// A further process in a container. Dropping it kills the process.
#[derive(Debug)]
pub struct ExecSession {
    /// Takes the process's input.
    pub stdin: Option<ExecInput>,
    /// Its output, or its terminal's.
    pub stdout: ExecOutputStream,
    /// Its error output, unless it has a terminal.
    pub stderr: Option<ExecOutputStream>,
    /// Its terminal and its end.
    pub process: ExecProcess,
}

/// Standard input of an exec.
#[derive(Debug)]
pub struct ExecInput(UnixStream);

/// An output stream of an exec.
#[derive(Debug)]
pub struct ExecOutputStream {
    connection: UnixStream,
    received: u64,
    stream: Stream,
}

/// An exec's process in the guest.
#[derive(Debug)]
pub struct ExecProcess(Exec);

impl ExecInput {
    /// Hands bytes to the process; waits while it does not read.
    ///
    /// # Errors
    /// The process reads no more.
    pub async fn write(&mut self, data: &[u8]) -> Result<()> {
        self.0.write_all(data).await.map_err(|e| agent::broken("write stdin", &e))
    }

    /// Closes the process's input.
    ///
    /// # Errors
    /// The process reads no more.
    pub async fn close(mut self) -> Result<()> {
        stdin::close(&mut self.0).await.map_err(|e| agent::broken("close stdin", &e))
    }
}

impl ExecOutputStream {
    /// The next piece of output; nothing at its end.
    ///
    /// # Errors
    /// The guest is gone.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        let failed = |e: std::io::Error| agent::broken(&format!("read {}", self.stream), &e);
        let mut chunk = vec![0; CHUNK_BYTES];
        let got = self.connection.read(&mut chunk).await.map_err(failed)?;
        if got == 0 {
            return Ok(None);
        }
        self.received += got as u64;
        // What is on its way is lost if the connection breaks, as on any pipe.
        self.connection.write_all(&self.received.to_le_bytes()).await.map_err(failed)?;
        chunk.truncate(got);
        Ok(Some(chunk.into()))
    }
}

impl ExecProcess {
    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// It has none, or has ended.
    pub async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        self.0.resize(rows, columns).await
    }

    /// Waits for its end; returns its exit code, 0 to 255.
    ///
    /// # Errors
    /// The guest is gone.
    pub async fn wait(&self) -> Result<i32> {
        self.0.wait().await
    }
}

/// A client's hold on a running container's streams.
#[derive(Debug)]
pub struct Attachment {
    /// Takes input, if the container has a standard input and the client asked for it.
    pub stdin: Option<StdinWriter>,
    /// Output from now on.
    pub stdout: LiveOutput,
    /// Error output from now on; at its end at once if there is a terminal.
    pub stderr: LiveOutput,
    /// The container's terminal.
    pub terminal: AttachedTerminal,
}

/// The terminal of a container that somebody is attached to.
#[derive(Debug)]
pub struct AttachedTerminal {
    agent: Agent,
    container_id: String,
}

impl AttachedTerminal {
    /// Sets its size.
    ///
    /// # Errors
    /// There is none, or the container has ended.
    pub async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        agent::resize(&self.agent, &self.container_id, "", rows, columns).await
    }
}

impl Manager {
    /// Starts a further process in a running container.
    ///
    /// # Errors
    /// The container does not run, or the command cannot be executed.
    pub async fn exec(&self, id: &str, config: ExecConfig) -> Result<ExecSession> {
        let (sandbox, container) = self.require_container(id)?;
        container.require(ContainerState::Running, "run a command in it")?;
        let request = api::ExecRequest {
            container_id: container.id.clone(),
            exec_id: exec::new_id()?,
            args: config.command,
            stdin: config.stdin,
            terminal: config.tty,
            ..api::ExecRequest::default()
        };
        let mut exec = Exec::start(sandbox.agent(), request);
        exec.started().await?;
        let open = async |wanted: bool, stream| match wanted {
            true => exec.stream(stream).await.map(Some),
            false => Ok(None),
        };
        let (stdin, stdout, stderr) = tokio::try_join!(
            open(config.stdin, Stream::Stdin),
            open(true, Stream::Stdout),
            open(!config.tty, Stream::Stderr)
        )?;
        let output = |stream| move |connection| ExecOutputStream { connection, received: 0, stream };
        Ok(ExecSession {
            stdin: stdin.map(ExecInput),
            stdout: stdout
                .map(output(Stream::Stdout))
                .ok_or_else(|| Error::Internal("an exec without output".into()))?,
            stderr: stderr.map(output(Stream::Stderr)),
            process: ExecProcess(exec),
        })
    }

    /// Attaches to a running container.
    ///
    /// # Errors
    /// The container does not run.
    pub fn attach(&self, id: &str, stdin: bool) -> Result<Attachment> {
        let (sandbox, container) = self.require_container(id)?;
        container.require(ContainerState::Running, "attach to it")?;
        let config = container.record().config;
        let agent = sandbox.agent();
        let stdin = (stdin && config.stdin).then(|| container.stdin.attach(agent, &container.id, config.stdin_once));
        Ok(Attachment {
            stdin,
            stdout: container.stdout.subscribe(),
            stderr: container.stderr.subscribe(),
            terminal: AttachedTerminal { agent: agent.clone(), container_id: container.id.clone() },
        })
    }

    /// Connects to a TCP port on a pod's loopback. Shutting the connection down is a half-close.
    ///
    /// # Errors
    /// The pod is not ready, or nobody listens there.
    pub async fn port_forward(&self, sandbox_id: &str, port: u16) -> Result<UnixStream> {
        let sandbox = self.require_sandbox(sandbox_id)?;
        if sandbox.state() != SandboxState::Ready {
            return Err(Error::GuestGone { id: sandbox.id.clone(), reason: "it is not ready".into() });
        }
        sandbox.agent().port_forward(port).await
    }

    /// Goes on in a new log file of a running container; it exists when this returns.
    ///
    /// # Errors
    /// The container does not run, or the file cannot be made.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let (_, container) = self.require_container(id)?;
        tokio::task::spawn_blocking(move || container.reopen_log()).await.map_err(|e| Error::Internal(e.to_string()))?
    }
}
