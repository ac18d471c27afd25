//! Connections of the host to ports of the pod (`nacelle_proto::port_forward`).

use std::fs::File;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nacelle_proto::port_forward::{Header, LINE_LIMIT, Reply};
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, Interest, copy, split,
};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_stream::{Stream, StreamExt};
use tokio_vsock::VsockStream;

use crate::agent::Agent;
use crate::fd;

/// Connections at a time; more wait to be accepted.
const LIMIT: usize = 1024;
/// How long the host may take to say what it wants, and the port to be connected to.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves the connections that the host makes, for ever.
pub async fn accept(agent: Arc<Agent>, mut connections: impl Stream<Item = io::Result<VsockStream>> + Unpin) {
    let places = Arc::new(Semaphore::new(LIMIT));
    while let Ok(place) = places.clone().acquire_owned().await
        && let Some(accepted) = connections.next().await
    {
        let watched =
            accepted.and_then(|stream| stream.as_fd().try_clone_to_owned().map(|fd| (stream, File::from(fd))));
        match watched {
            Ok((stream, file)) => {
                let agent = agent.clone();
                drop(tokio::spawn(async move {
                    serve(stream, hung_up(file), |address| dial(&agent, address)).await;
                    drop(place);
                }));
            }
            // Out of descriptors or memory: it passes, or the host gives up.
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Waits until the host has closed a connection in both directions. A process that it was
/// forwarded to might never notice otherwise.
async fn hung_up(file: File) {
    let Ok(watched) = fd::watch(file, Interest::WRITABLE) else { return std::future::pending().await };
    while let Ok(mut ready) = watched.ready(Interest::WRITABLE).await {
        if ready.ready().is_write_closed() {
            return;
        }
        ready.clear_ready();
    }
}

/// Connects to an address of the pod.
async fn dial(agent: &Agent, address: SocketAddr) -> io::Result<TcpStream> {
    let Some(namespaces) = agent.sandbox.namespaces() else { return TcpStream::connect(address).await };
    let open = || if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    // A socket stays in the network namespace that it was made in. That takes a thread, but no
    // longer than to start one.
    let socket = namespaces.inside(open).map_err(io::Error::other)??;
    socket.connect(address).await
}

/// Serves one connection to its end, or until `gone`. `dial` connects to an address of the pod.
async fn serve<S, D>(connection: S, gone: impl Future<Output = ()>, dial: impl Fn(SocketAddr) -> D)
where
    S: AsyncRead + AsyncWrite,
    D: Future<Output = io::Result<TcpStream>>,
{
    let (read, mut write) = split(connection);
    let mut read = BufReader::new(read);
    let target = match timeout(PATIENCE, read_header(&mut read)).await {
        Ok(Ok(Header { port })) => connect(port, dial).await,
        Ok(Err(error)) => Err(error),
        Err(_) => return,
    };
    let reply = Reply { error: target.as_ref().err().cloned().unwrap_or_default(), start: None };
    let Ok(mut line) = serde_json::to_vec(&reply) else { return };
    line.push(b'\n');
    let (Ok(()), Ok(target)) = (write.write_all(&line).await, target) else { return };
    let (mut from, mut to) = target.into_split();
    let up = async {
        // If the process reads no more, what it still has to say counts all the same.
        if copy(&mut read, &mut to).await.is_ok() {
            let _ = to.shutdown().await;
        }
    };
    let down = async {
        let _ = copy(&mut from, &mut write).await;
        let _ = write.shutdown().await;
    };
    tokio::select! {
        _ = async { tokio::join!(up, down) } => {}
        () = gone => {}
    }
}

async fn read_header<R: tokio::io::AsyncBufRead + Unpin>(read: &mut R) -> Result<Header, String> {
    let mut line = Vec::new();
    let limit = LINE_LIMIT as u64;
    read.take(limit).read_until(b'\n', &mut line).await.map_err(|error| format!("cannot read the header: {error}"))?;
    serde_json::from_slice(&line).map_err(|error| format!("the header is malformed: {error}"))
}

async fn connect<D>(port: u16, dial: impl Fn(SocketAddr) -> D) -> Result<TcpStream, String>
where
    D: Future<Output = io::Result<TcpStream>>,
{
    let attempt = async {
        match dial((Ipv4Addr::LOCALHOST, port).into()).await {
            Ok(stream) => Ok(stream),
            Err(error) => dial((Ipv6Addr::LOCALHOST, port).into()).await.map_err(|_| error),
        }
    };
    match timeout(PATIENCE, attempt).await {
        Ok(Ok(stream)) => {
            let _ = stream.set_nodelay(true);
            Ok(stream)
        }
        Ok(Err(error)) => Err(format!("cannot connect to port {port} in the pod: {error}")),
        Err(_) => Err(format!("cannot connect to port {port} in the pod within {PATIENCE:?}")),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};
    use tokio::net::TcpListener;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    async fn ask(header: &str, gone: impl Future<Output = ()> + Send + 'static) -> (String, BufReader<DuplexStream>) {
        let (mut host, agent) = duplex(1 << 16);
        tokio::spawn(serve(agent, gone, TcpStream::connect::<SocketAddr>));
        host.write_all(header.as_bytes()).await.unwrap();
        let mut host = BufReader::new(host);
        let mut line = String::new();
        timeout(SOON, host.read_line(&mut line)).await.unwrap().unwrap();
        (serde_json::from_str::<Reply>(&line).unwrap().error, host)
    }

    #[tokio::test]
    async fn each_direction_ends_on_its_own() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let process = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = String::new();
            stream.read_to_string(&mut request).await.unwrap();
            stream.write_all(format!("{request} after its end").as_bytes()).await.unwrap();
        });
        let (error, mut host) = ask(&format!("{{\"port\":{port}}}\nearly"), std::future::pending()).await;
        assert_eq!(error, "");
        host.write_all(b" and late").await.unwrap();
        host.shutdown().await.unwrap();
        let mut answer = String::new();
        timeout(SOON, host.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert_eq!(answer, "early and late after its end");
        process.await.unwrap();
    }

    #[tokio::test]
    async fn a_host_that_is_gone_ends_the_connection_in_the_pod() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (leave, left) = tokio::sync::oneshot::channel::<()>();
        let gone = async { left.await.unwrap_or_default() };
        let (error, _host) = ask(&format!("{{\"port\":{port}}}\n"), gone).await;
        assert_eq!(error, "");
        let (mut stream, _) = listener.accept().await.unwrap();
        leave.send(()).unwrap();
        assert_eq!(timeout(SOON, stream.read(&mut [0])).await.unwrap().unwrap(), 0);
    }

    #[tokio::test]
    async fn a_port_where_nobody_listens_and_a_header_that_is_none_are_told() {
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let (error, _) = ask(&format!("{{\"port\":{port}}}\n"), std::future::pending()).await;
        assert!(error.contains(&format!("port {port}")), "{error}");
        let (error, _) = ask("what\n", std::future::pending()).await;
        assert!(error.contains("header"), "{error}");
    }
}
