//! Standard input of a running container, shared by the clients attached to it.
//!
//! The guest takes input from one connection at a time, so the daemon holds that one and
//! its clients hand their bytes to it. Without `stdin_once` the input stays open when a
//! client has no more, and also when the daemon ends; with it, it is closed for good after
//! the first client.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use nacelle_proto::stdio::{Header, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::agent::Agent;

/// Pieces that wait for the process to read them.
const QUEUE: usize = 4;

/// The input of one container.
#[derive(Debug, Default)]
pub struct Stdin {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
enum State {
    /// Nobody has attached yet.
    #[default]
    Idle,
    Open(mpsc::Sender<Bytes>),
    Closed,
}

/// A client's hold on the input. Dropping it is the end of that client's input.
#[derive(Debug)]
pub struct StdinWriter {
    container: std::sync::Arc<Stdin>,
    queue: Option<mpsc::Sender<Bytes>>,
    once: bool,
}

impl Stdin {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A hold on the input, which is opened for the first.
    pub fn attach(self: &std::sync::Arc<Self>, agent: &Agent, container_id: &str, once: bool) -> StdinWriter {
        let mut state = self.lock();
        let queue = match &*state {
            State::Open(queue) if !queue.is_closed() => Some(queue.clone()),
            State::Closed => None,
            State::Idle | State::Open(_) => {
                let (queue, input) = mpsc::channel(QUEUE);
                tokio::spawn(carry(agent.clone(), container_id.to_owned(), input));
                *state = State::Open(queue.clone());
                Some(queue)
            }
        };
        StdinWriter { container: self.clone(), queue, once }
    }
}

impl StdinWriter {
    /// Hands bytes to the process; waits while it does not read. Bytes for an input that
    /// is closed are dropped, as they are when a process ends before it has read them.
    pub async fn write(&mut self, data: Bytes) {
        if let Some(queue) = &self.queue
            && queue.send(data).await.is_err()
        {
            self.queue = None;
        }
    }
}

impl Drop for StdinWriter {
    fn drop(&mut self) {
        if self.once {
            *self.container.lock() = State::Closed;
        }
    }
}

/// Carries input to the process until the last holder has let go, which closes it.
async fn carry(agent: Agent, container_id: String, mut input: mpsc::Receiver<Bytes>) {
    let header = Header { container_id, exec_id: String::new(), stream: Stream::Stdin, offset: 0 };
    let result = async {
        let mut connection = agent.stream(&header).await.map_err(std::io::Error::other)?;
        while let Some(data) = input.recv().await {
            connection.write_all(&data).await?;
        }
        close(&mut connection).await
    };
    if let Err(error) = result.await {
        tracing::debug!(container = header.container_id, %error, "standard input ended");
    }
}

/// Closes a process's input by its connection, and waits until it is.
pub async fn close(connection: &mut tokio::net::UnixStream) -> std::io::Result<()> {
    connection.shutdown().await?;
    // The agent says when all that came before has reached the process.
    connection.read_u8().await.map(drop)
}
