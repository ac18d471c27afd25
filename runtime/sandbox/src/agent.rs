//! The agent's client: gRPC and raw streams through the VMM's vsock socket.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::pin;
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
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Response, Status};

use crate::error::AgentFailure;
use crate::{Error, Result, beneath, clock, replies};

/// One guest's agent. Cheap to clone; the connection is made at the first call and again
/// whenever it is needed.
#[derive(Debug, Clone)]
pub struct Agent {
    vsock: PathBuf,
    channel: Channel,
    deadline: Duration,
    unknown_after: Duration,
    reach: Arc<watch::Sender<Reach>>,
    /// Whether somebody asks it for a sign of life.
    asked: Arc<AtomicBool>,
}

/// Whether a guest gives signs of life. Times are nanoseconds since the Unix epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reach {
    /// It answered when it was last asked.
    #[default]
    Answers,
    /// It has not answered since then.
    Silent {
        /// When it was asked.
        since: i64,
    },
    /// Nor has it for so long that nobody can say what runs in it.
    Unknown {
        /// When it was asked.
        since: i64,
    },
}

impl Reach {
    /// Since when it does not answer.
    pub fn silent_since(self) -> Option<i64> {
        match self {
            Self::Answers => None,
            Self::Silent { since } | Self::Unknown { since } => Some(since),
        }
    }
}

impl Agent {
    /// The agent behind a VMM's vsock socket; calls with a deadline get this one. A guest that
    /// gives no sign of life for `unknown_after` is [`Reach::Unknown`].
    pub fn new(vsock: PathBuf, deadline: Duration, unknown_after: Duration) -> Self {
        let path = vsock.clone();
        let endpoint = Endpoint::from_static("http://agent").http2_max_header_list_size(replies::HEADER_LIMIT);
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { connect(&path, AGENT_PORT).await.map(TokioIo::new) }
        }));
        Self { vsock, channel, deadline, unknown_after, reach: Arc::default(), asked: Arc::default() }
    }

    /// The client for [`Agent::call`] and for calls without deadline.
    pub fn client(&self) -> AgentClient<Channel> {
        AgentClient::new(self.channel.clone()).max_decoding_message_size(replies::LIMIT)
    }

    /// Awaits a call for as long as the deadline and puts its failure into words. One that takes
    /// long says little of the guest: when most of the deadline is over, it is asked for a sign of
    /// life, so that at the end it is known whether it gives any.
    pub async fn call<T>(&self, action: &str, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T> {
        let mut call = pin!(call);
        let patience = self.deadline / 4 * 3;
        let answer = match timeout(patience, &mut call).await {
            Ok(answer) => Ok(answer),
            Err(_) => {
                self.doubt();
                timeout(self.deadline.saturating_sub(patience), call).await
            }
        };
        match answer {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(error(action, &status)),
            Err(_) => Err(Error::Deadline { action: action.into(), limit: self.deadline }),
        }
    }

    /// How long a call may take.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Whether it answered when it was last asked.
    pub fn answers(&self) -> bool {
        self.reach() == Reach::Answers
    }

    /// Whether it gives signs of life.
    pub fn reach(&self) -> Reach {
        *self.reach.borrow()
    }

    /// That, as it changes.
    pub fn watch_reach(&self) -> watch::Receiver<Reach> {
        self.reach.subscribe()
    }

    /// Asks it for a sign of life until it gives one, unless somebody does already.
    fn doubt(&self) {
        if self.asked.swap(true, Ordering::Relaxed) {
            return;
        }
        let agent = self.clone();
        tokio::spawn(async move {
            agent.until_it_answers().await;
            agent.asked.store(false, Ordering::Relaxed);
        });
    }

    async fn until_it_answers(&self) {
        let (since, begun) = (clock::now(), Instant::now());
        let mut client = self.client();
        // Less than is left to the call that was in doubt, so that its caller finds the answer.
        let mut patience = self.deadline / 5;
        // Whatever comes back, an error too, is no silence: a guest that is gone is known by the
        // end of its VMM.
        while timeout(patience, client.info(api::InfoRequest {})).await.is_err() {
            let left = self.unknown_after.saturating_sub(begun.elapsed());
            let reach = if left.is_zero() { Reach::Unknown { since } } else { Reach::Silent { since } };
            if self.found(reach) {
                tracing::warn!(vsock = %self.vsock.display(), for = ?begun.elapsed(), "guest does not answer");
            }
            patience = if left.is_zero() { self.deadline } else { self.deadline.min(left) };
        }
        if self.found(Reach::Answers) {
            tracing::info!(vsock = %self.vsock.display(), after = ?begun.elapsed(), "guest answers again");
        }
    }

    /// Notes whether it gives signs of life; whether that is new.
    fn found(&self, reach: Reach) -> bool {
        self.reach.send_if_modified(|known| std::mem::replace(known, reach) != reach)
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
        let failed = |kind, message: String| Error::Agent { action: action(), kind, message };
        let open = async {
            let mut stream = connect(&self.vsock, port).await?;
            let mut line = serde_json::to_vec(header)?;
            line.push(b'\n');
            stream.write_all(&line).await?;
            let reply = read_line(&mut stream).await?;
            std::io::Result::Ok((stream, reply))
        };
        let (stream, reply) = timeout(self.deadline, open)
            .await
            .map_err(|_| Error::Deadline { action: action(), limit: self.deadline })?
            .map_err(|e| broken(&action(), &e))?;
        let reply: Reply =
            serde_json::from_str(&reply).map_err(|e| failed(AgentFailure::Other, format!("bad reply: {e}")))?;
        match reply {
            Reply { error, .. } if error.is_empty() => Ok(stream),
            Reply { start: Some(start), .. } => Err(Error::OutputGone { action: action(), start }),
            Reply { error, .. } => Err(failed(AgentFailure::Other, error)),
        }
    }
}

/// Sets the size of the terminal of a container, or of one of its further processes.
pub async fn resize(agent: &Agent, container_id: &str, exec_id: &str, rows: u16, columns: u16) -> Result<()> {
    let request = api::ResizeTerminalRequest {
        container_id: container_id.into(),
        exec_id: exec_id.into(),
        rows: rows.into(),
        columns: columns.into(),
    };
    agent.call("resize a terminal", agent.client().resize_terminal(request)).await.map(drop)
}

/// What an agent's refusal means here.
pub fn error(action: &str, status: &Status) -> Error {
    let message = match status.message() {
        "" => status.code().to_string(),
        message => replies::message(message),
    };
    let kind = match status.code() {
        Code::InvalidArgument => return Error::Command(message),
        Code::ResourceExhausted => return Error::Exhausted(message),
        // What did not come from the agent has a cause on this side.
        _ if std::error::Error::source(status).is_some() => AgentFailure::Unreachable,
        Code::Unavailable | Code::Cancelled => AgentFailure::Unreachable,
        Code::NotFound => AgentFailure::NotFound,
        Code::AlreadyExists => AgentFailure::Exists,
        Code::FailedPrecondition => AgentFailure::State,
        Code::DeadlineExceeded => AgentFailure::Timeout,
        _ => AgentFailure::Other,
    };
    Error::Agent { action: action.into(), kind, message }
}

/// What the failure of a connection to the agent means here.
pub fn broken(action: &str, error: &std::io::Error) -> Error {
    Error::Agent { action: action.into(), kind: AgentFailure::Unreachable, message: error.to_string() }
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

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(30);
    const UNKNOWN: Duration = Duration::from_secs(300);

    /// A call that is never answered.
    async fn stuck(agent: &Agent) {
        let error = agent.call("wait", std::future::pending::<Result<Response<()>, Status>>()).await.unwrap_err();
        assert!(matches!(error, Error::Deadline { limit, .. } if limit == DEADLINE), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_takes_what_is_sent_and_says_nothing_is_silent_and_after_minutes_unknown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = Agent::new(path, DEADLINE, UNKNOWN);
        let mut reach = agent.watch_reach();
        let begun = Instant::now();
        stuck(&agent).await;
        assert_eq!(begun.elapsed(), DEADLINE, "to ask for signs of life takes the caller no time");
        let Reach::Silent { since } = agent.reach() else { panic!("{:?}", agent.reach()) };
        let unknown = reach.wait_for(|reach| matches!(reach, Reach::Unknown { .. })).await.unwrap().silent_since();
        assert_eq!(unknown, Some(since));
        assert!(begun.elapsed() > UNKNOWN && begun.elapsed() < UNKNOWN + 2 * DEADLINE, "{:?}", begun.elapsed());
        // Other calls that are stuck meanwhile change nothing.
        stuck(&agent).await;
        assert_eq!(agent.reach(), Reach::Unknown { since });
        // It is refused, and no longer silent.
        drop(listener);
        reach.wait_for(|reach| *reach == Reach::Answers).await.unwrap();
        assert!(agent.answers());
    }

    #[tokio::test(start_paused = true)]
    async fn one_call_that_is_stuck_makes_no_silence() {
        let directory = tempfile::tempdir().unwrap();
        // A sign of life is refused at once, which is an answer, too.
        let agent = Agent::new(directory.path().join("vsock"), DEADLINE, UNKNOWN);
        let reach = agent.watch_reach();
        stuck(&agent).await;
        assert_eq!(agent.reach(), Reach::Answers);
        assert!(!reach.has_changed().unwrap(), "not even for a moment");
        let error = agent.shutdown().await.unwrap_err();
        assert!(matches!(error, Error::Agent { kind: AgentFailure::Unreachable, .. }), "{error:?}");
    }
}
