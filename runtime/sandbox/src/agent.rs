//! The agent's client: gRPC and raw streams through the VMM's vsock socket.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nacelle_proto::agent::v1 as api;
use nacelle_proto::agent::v1::agent_client::AgentClient;
use nacelle_proto::port_forward;
use nacelle_proto::stdio::{AGENT_PORT, Header, LINE_LIMIT, Reply, STDIO_PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Response, Status};

use crate::{Error, Result, beneath};

/// One guest's agent. Cheap to clone; the connection is made at the first call and again
/// whenever it is needed.
#[derive(Debug, Clone)]
pub struct Agent {
    vsock: PathBuf,
    channel: Channel,
    deadline: Duration,
    silent: Arc<AtomicBool>,
}

impl Agent {
    /// The agent behind a VMM's vsock socket; calls with a deadline get this one.
    pub fn new(vsock: PathBuf, deadline: Duration) -> Self {
        let path = vsock.clone();
        let channel =
            Endpoint::from_static("http://agent").connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move { connect(&path, AGENT_PORT).await.map(TokioIo::new) }
            }));
        Self { vsock, channel, deadline, silent: Arc::default() }
    }

    /// The client for [`Agent::call`] and for calls without deadline.
    pub fn client(&self) -> AgentClient<Channel> {
        AgentClient::new(self.channel.clone())
    }

    /// Awaits a call for as long as the deadline and puts its failure into words.
    pub async fn call<T>(&self, action: &str, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T> {
        match tokio::time::timeout(self.deadline, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(error(action, &status)),
            Err(_) => {
                self.fell_silent();
                Err(Error::Deadline { action: action.into(), limit: self.deadline })
            }
        }
    }

    /// Whether it answered when it was last asked.
    pub fn answers(&self) -> bool {
        !self.silent.load(Ordering::Relaxed)
    }

    /// A call was not answered in time. From now on somebody asks until one is.
    fn fell_silent(&self) {
        if self.silent.swap(true, Ordering::Relaxed) {
            return;
        }
        tracing::warn!(vsock = %self.vsock.display(), "guest does not answer");
        let agent = self.clone();
        tokio::spawn(async move {
            let mut client = agent.client();
            // Whatever comes back, an error too, is no silence: a guest that is gone is
            // known by the end of its VMM.
            while tokio::time::timeout(agent.deadline, client.info(api::InfoRequest {})).await.is_err() {}
            agent.silent.store(false, Ordering::Relaxed);
            tracing::info!(vsock = %agent.vsock.display(), "guest answers again");
        });
    }

    /// Ends all containers and powers the guest off.
    pub async fn shutdown(&self) -> Result<()> {
        let mut client = self.client();
        self.call("shut the guest down", client.shutdown(api::ShutdownRequest {})).await.map(drop)
    }

    /// Opens one standard stream.
    pub async fn stream(&self, header: &Header) -> Result<UnixStream> {
        self.open(STDIO_PORT, header, || format!("open {} of {}", header.stream, header.container_id)).await
    }

    /// Connects to a port of the pod.
    pub async fn port_forward(&self, port: u16) -> Result<UnixStream> {
        let header = port_forward::Header { port };
        self.open(port_forward::PORT, &header, || format!("reach port {port}")).await
    }

    /// Connects to a guest port where a line says what is wanted and a line answers.
    async fn open(&self, port: u32, header: &impl serde::Serialize, action: impl Fn() -> String) -> Result<UnixStream> {
        let failed = |message: String| Error::Agent { action: action(), message };
        let open = async {
            let mut stream = connect(&self.vsock, port).await?;
            let mut line = serde_json::to_vec(header)?;
            line.push(b'\n');
            stream.write_all(&line).await?;
            let reply = read_line(&mut stream).await?;
            std::io::Result::Ok((stream, reply))
        };
        let (stream, reply) = tokio::time::timeout(self.deadline, open)
            .await
            .map_err(|_| Error::Deadline { action: action(), limit: self.deadline })?
            .map_err(|e| failed(e.to_string()))?;
        let reply: Reply = serde_json::from_str(&reply).map_err(|e| failed(format!("bad reply: {e}")))?;
        match reply {
            Reply { error, .. } if error.is_empty() => Ok(stream),
            Reply { start: Some(start), .. } => Err(Error::OutputGone { action: action(), start }),
            Reply { error, .. } => Err(failed(error)),
        }
    }
}

/// What an agent's refusal means here.
pub fn error(action: &str, status: &Status) -> Error {
    let message = status.message().to_owned();
    match status.code() {
        Code::InvalidArgument => Error::Command(message),
        Code::ResourceExhausted => Error::Exhausted(message),
        _ if message.is_empty() => Error::Agent { action: action.into(), message: status.code().to_string() },
        _ => Error::Agent { action: action.into(), message },
    }
}

/// Connects to a guest port by the socket `vsock`, whose directory is the pod's own. Its VMM can put anything in there: what
/// leads to another pod's socket is not followed.
async fn connect(vsock: &Path, port: u32) -> std::io::Result<UnixStream> {
    let found = |(directory, name): (&Path, &std::ffi::OsStr)| beneath::Directory::open(directory)?.socket(name);
    let socket = vsock.parent().zip(vsock.file_name()).map(found);
    let socket = socket.ok_or(std::io::ErrorKind::InvalidInput)?.map_err(Error::into_io)?;
    let mut stream = beneath::connect_to(&socket).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let answer = read_line(&mut stream).await?;
    if answer.starts_with("OK ") {
        Ok(stream)
    } else {
        Err(std::io::Error::new(std::io::ErrorKind::ConnectionRefused, format!("guest port {port} is not open")))
    }
}

/// Reads up to a newline and not a byte further: what follows belongs to the stream.
async fn read_line(stream: &mut UnixStream) -> std::io::Result<String> {
    let mut line = Vec::new();
    loop {
        let byte = stream.read_u8().await?;
        if byte == b'\n' {
            return String::from_utf8(line).map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidData, e));
        }
        if line.len() >= LINE_LIMIT {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "line too long"));
        }
        line.push(byte);
    }
}
