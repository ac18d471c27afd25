//! Serves the two ports, whatever carries them: vsock in a guest, unix sockets in tests.

use std::error::Error;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use nacelle_proto::agent::v1::agent_server::AgentServer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::transport::server::Connected;

use crate::agent::Agent;
use crate::service::Service;
use crate::stdio::connection;

/// How long the host may take to hang up once the answer to a shutdown is sent.
const FAREWELL: Duration = Duration::from_millis(500);

/// Serves until the host asks for a shutdown, or `asked` does, and everything has ended.
pub async fn serve<C, G, S>(
    agent: Arc<Agent>,
    calls: G,
    streams: S,
    asked: impl Future<Output = ()>,
) -> Result<(), Box<dyn Error>>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    G: Stream<Item = io::Result<C>>,
    S: Stream<Item = io::Result<C>> + Unpin + Send + 'static,
{
    let (power_off, going) = watch::channel(false);
    let service = AgentServer::new(Service::new(agent.clone(), power_off));
    tokio::spawn(accept_streams(agent.clone(), streams));

    let mut draining = going.clone();
    let drained = Server::builder().add_service(service).serve_with_incoming_shutdown(calls, async move {
        let _ = draining.wait_for(|going| *going).await;
    });
    let mut farewell = going.clone();
    tokio::select! {
        // Ends when the host has the answer and has hung up,
        result = drained => result?,
        // or takes too long for it.
        () = async { let _ = farewell.wait_for(|going| *going).await; sleep(FAREWELL).await } => {}
        () = asked => {
            let ending = agent.clone();
            agent
                .blocking(move || {
                    ending.end_everything();
                    Ok(())
                })
                .await?;
        }
    }
    Ok(())
}

async fn accept_streams<C, S>(agent: Arc<Agent>, mut streams: S)
where
    C: AsyncRead + AsyncWrite + Send + 'static,
    S: Stream<Item = io::Result<C>> + Unpin,
{
    while let Some(accepted) = streams.next().await {
        match accepted {
            Ok(stream) => {
                let agent = agent.clone();
                tokio::spawn(connection::serve(stream, move |container, exec| agent.streams(container, exec)));
            }
            // Out of descriptors or memory: it passes, or the host gives up.
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}
