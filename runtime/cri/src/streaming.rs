//! The streaming calls: what is asked for goes to the streaming server's door, and what
//! the server's clients then do, goes to the pods.

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{
    Attachment, ContainerState, ExecConfig, ExecInput, ExecOutput, ExecOutputStream, ExecSession, LiveOutput, Manager,
    SandboxState,
};
use nacelle_streaming::{Attach, Backend, Exec, Failure, Incoming, Outgoing, Request, Size, Streams, Wanted};
use tokio::net::UnixStream;
use tonic::Status;

use crate::status::{bounded, invalid, of_sandbox, wrong_state};

/// What an Exec call asks for.
pub fn exec(manager: &Manager, request: cri::ExecRequest) -> Result<Request, Status> {
    let container = running(manager, &request.container_id, "run a command in it")?;
    if request.cmd.is_empty() {
        return Err(invalid("cmd", "is empty"));
    }
    let wanted = wanted(request.stdin, request.stdout, request.stderr, request.tty)?;
    Ok(Request::Exec(Exec { container, command: request.cmd, wanted }))
}

/// What an ExecSync call answers. Output that was cut is said to be, where people look.
pub fn collected(output: ExecOutput) -> cri::ExecSyncResponse {
    let ExecOutput { stdout, mut stderr, dropped, exit_code } = output;
    if dropped > 0 {
        let note = format!("\n[nacelle: {dropped} bytes of output left out: it does not fit into one answer]\n");
        stderr.extend_from_slice(note.as_bytes());
    }
    cri::ExecSyncResponse { stdout, stderr, exit_code }
}

/// What an Attach call asks for.
pub fn attach(manager: &Manager, request: &cri::AttachRequest) -> Result<Request, Status> {
    let container = running(manager, &request.container_id, "attach to it")?;
    let wanted = wanted(request.stdin, request.stdout, request.stderr, request.tty)?;
    Ok(Request::Attach(Attach { container, wanted }))
}

/// What a PortForward call asks for.
pub fn port_forward(manager: &Manager, request: &cri::PortForwardRequest) -> Result<Request, Status> {
    if request.pod_sandbox_id.is_empty() {
        return Err(invalid("pod_sandbox_id", "is empty"));
    }
    if let Some(port) = request.port.iter().find(|port| !(1..=65535).contains(*port)) {
        return Err(invalid("port", format!("{port} is not 1 to 65535")));
    }
    let status = manager.sandbox(&request.pod_sandbox_id).map_err(|e| of_sandbox(&e))?;
    if status.state != SandboxState::Ready {
        return Err(wrong_state(format!("sandbox {} is not ready: cannot forward its ports", status.id)));
    }
    Ok(Request::PortForward { sandbox: status.id })
}

/// The whole id of a container, which must run.
fn running(manager: &Manager, id: &str, action: &str) -> Result<String, Status> {
    if id.is_empty() {
        return Err(invalid("container_id", "is empty"));
    }
    let status = manager.container(id).map_err(|e| of_sandbox(&e))?;
    if status.state != ContainerState::Running {
        return Err(wrong_state(format!("container {} is not running: cannot {action}", status.id)));
    }
    Ok(status.id)
}

fn wanted(stdin: bool, stdout: bool, stderr: bool, tty: bool) -> Result<Wanted, Status> {
    if tty && stderr {
        return Err(invalid("stderr", "a terminal has no error stream of its own: ask for tty or for stderr"));
    }
    if !(stdin || stdout || stderr) {
        return Err(invalid("stdin, stdout, stderr", "ask for at least one of them"));
    }
    Ok(Wanted { stdin, stdout, stderr, tty })
}

/// The pods, as the streaming server wants them.
#[derive(Debug, Clone)]
pub struct Pods(Manager);

impl Pods {
    /// The pods of this manager.
    #[must_use]
    pub fn new(manager: Manager) -> Self {
        Self(manager)
    }
}

impl Backend for Pods {
    type Connection = UnixStream;

    async fn exec(&self, request: Exec, streams: Streams) -> Result<i32, Failure> {
        let Wanted { stdin, tty, .. } = request.wanted;
        let config = ExecConfig { command: request.command, stdin, tty };
        let session = self.0.exec(&request.container, config).await.map_err(failure)?;
        let ExecSession { stdin, stdout, stderr, process } = session;
        let ended = async {
            let outputs = async {
                tokio::try_join!(send(stdout, streams.stdout), async {
                    match stderr {
                        Some(stderr) => send(stderr, streams.stderr).await,
                        None => Ok(()),
                    }
                })
            };
            let (_, code) = tokio::try_join!(async { outputs.await.map_err(failure) }, async {
                process.wait().await.map_err(failure)
            })?;
            Ok(code)
        };
        let input = async {
            if let (Some(source), Some(sink)) = (streams.stdin, stdin) {
                feed(source, sink).await;
            }
        };
        let resizes = async {
            if let Some(mut resizes) = streams.resizes {
                while let Some(Size { width, height }) = resizes.next().await {
                    if let Err(error) = process.resize(height, width).await {
                        tracing::debug!(%error, "terminal not resized");
                    }
                }
            }
        };
        tokio::select! {
            result = ended => result,
            never = forever(input) => match never {},
            never = forever(resizes) => match never {},
        }
    }

    async fn attach(&self, request: Attach, streams: Streams) -> Result<(), Failure> {
        let Attachment { stdin, stdout, stderr, terminal } =
            self.0.attach(&request.container, request.wanted.stdin).map_err(failure)?;
        let outputs = async { tokio::try_join!(show(stdout, streams.stdout), show(stderr, streams.stderr)).map(drop) };
        let input = async {
            if let Some(mut source) = streams.stdin {
                let mut sink = stdin;
                while let Ok(Some(data)) = source.next().await {
                    if let Some(sink) = &mut sink {
                        sink.write(data).await;
                    }
                }
            }
        };
        let resizes = async {
            if let Some(mut resizes) = streams.resizes {
                while let Some(Size { width, height }) = resizes.next().await {
                    if let Err(error) = terminal.resize(height, width).await {
                        tracing::debug!(%error, "terminal not resized");
                    }
                }
            }
        };
        tokio::select! {
            result = outputs => result,
            never = forever(input) => match never {},
            never = forever(resizes) => match never {},
        }
    }

    async fn connect(&self, sandbox: &str, port: u16) -> Result<UnixStream, Failure> {
        self.0.port_forward(sandbox, port).await.map_err(failure)
    }
}

fn failure(error: nacelle_sandbox::Error) -> Failure {
    Failure(bounded(error.to_string()))
}

/// Runs `work`, and then waits for something else to end it all.
async fn forever(work: impl Future<Output = ()>) -> std::convert::Infallible {
    work.await;
    std::future::pending().await
}

/// Sends a process's output to the client, to its end; without one who wants it, or still
/// wants it, it is dropped.
async fn send(mut source: ExecOutputStream, mut sink: Option<Outgoing>) -> Result<(), nacelle_sandbox::Error> {
    while let Some(data) = source.next().await? {
        if let Some(open) = &mut sink
            && open.send(data).await.is_err()
        {
            sink = None;
        }
    }
    Ok(())
}

/// Sends a container's output to the client, to its end.
async fn show(mut source: LiveOutput, mut sink: Option<Outgoing>) -> Result<(), Failure> {
    loop {
        match source.next().await {
            Ok(Some(data)) => {
                if let Some(open) = &mut sink
                    && open.send(data).await.is_err()
                {
                    sink = None;
                }
            }
            Ok(None) => return Ok(()),
            Err(nacelle_sandbox::Overrun) => {
                return Err(Failure("the client did not read the container's output fast enough: attach again".into()));
            }
        }
    }
}

/// Hands the client's input to a process, to its end.
async fn feed(mut source: Incoming, mut sink: ExecInput) {
    loop {
        match source.next().await {
            Ok(Some(data)) => {
                if let Err(error) = sink.write(&data).await {
                    tracing::debug!(%error, "process takes no more input");
                    return;
                }
            }
            Ok(None) | Err(_) => {
                if let Err(error) = sink.close().await {
                    tracing::debug!(%error, "input of a process not closed");
                }
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// What the kubelet takes in one message.
    const KUBELET: usize = 16 << 20;

    #[test]
    fn output_that_was_cut_is_said_to_be_and_fits_into_a_message() {
        let whole = ExecOutput { stdout: b"out".to_vec(), stderr: b"err".to_vec(), dropped: 0, exit_code: 3 };
        let answer = collected(whole.clone());
        assert_eq!((&answer.stdout[..], &answer.stderr[..], answer.exit_code), (&b"out"[..], &b"err"[..], 3));
        let cut = ExecOutput { stdout: vec![0; nacelle_sandbox::EXEC_OUTPUT_LIMIT - 3], dropped: u64::MAX, ..whole };
        let answer = collected(cut);
        assert!(answer.encoded_len() < KUBELET, "{}", answer.encoded_len());
        let said = String::from_utf8(answer.stderr).unwrap();
        assert!(said.starts_with("err\n[nacelle: 18446744073709551615 bytes"), "{said}");
    }
}
