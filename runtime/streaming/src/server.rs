//! The HTTP server: takes upgrade requests for tokens, and hands the upgraded connections
//! to whoever speaks their protocol.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming as Body;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::backend::{Backend, Request};
use crate::lobby::{Lobby, Place};
use crate::tls::{self, TlsError, TlsFiles};
use crate::tokens::{TokenError, Tokens};
use crate::upgrade;

/// Conversations at a time.
const CONVERSATIONS: usize = 1024;
/// Connections at a time that have not shown a token.
const STRANGERS: usize = 1024;
/// Most headers of a request.
const HEADERS: usize = 64;
/// Largest head of a request, in bytes.
const HEAD_BYTES: usize = 16 * 1024;

/// How long clients may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For a request, a TLS handshake, the opening of the streams.
    pub handshake: Duration,
    /// Without anything moving on a connection.
    pub idle: Duration,
}

/// Where and how it serves.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens; port 0 for any that is free.
    pub address: SocketAddr,
    /// TLS, if wanted.
    pub tls: Option<TlsFiles>,
    /// How long clients may take.
    pub timeouts: Timeouts,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be used.
    #[error(
        "cannot listen on {address} for streaming: {source}: configure another streaming.address or streaming.port"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// See [`TlsError`].
    #[error("streaming.tls: {0}")]
    Tls(#[from] TlsError),
}

/// A server that listens, and serves in [`Server::serve`].
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    timeouts: Timeouts,
    door: Door,
}

/// Where requests are left for their clients. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Door {
    base: Arc<str>,
    tokens: Arc<Tokens>,
}

impl Door {
    /// The URL at which a request's client is served, once.
    ///
    /// # Errors
    /// Too many wait for their clients.
    pub fn url(&self, request: Request) -> Result<String, TokenError> {
        let kind = request.kind();
        self.tokens.issue(request).map(|token| format!("{}/{kind}/{token}", self.base))
    }

    /// What a token stands for, once.
    pub(crate) fn redeem(&self, token: &str) -> Option<Request> {
        self.tokens.redeem(token)
    }
}

impl Server {
    /// Starts to listen.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub async fn bind(options: Options) -> Result<Self, ServerError> {
        let tls = options.tls.as_ref().map(tls::load).transpose()?;
        let failed = |source| ServerError::Listen { address: options.address, source };
        let listener = TcpListener::bind(options.address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let door = Door { base: format!("{scheme}://{address}").into(), tokens: Arc::default() };
        Ok(Self { listener, tls, timeouts: options.timeouts, door })
    }

    /// Where requests are left for their clients.
    #[must_use]
    pub fn door(&self) -> Door {
        self.door.clone()
    }

    /// Serves for ever.
    pub async fn serve<B: Backend>(self, backend: Arc<B>) {
        let conversations = Arc::new(Semaphore::new(CONVERSATIONS));
        let lobby = Lobby::new(STRANGERS);
        loop {
            let connection = match self.listener.accept().await {
                Ok((connection, _)) => connection,
                Err(error) => {
                    // Out of descriptors, for example: it passes.
                    tracing::warn!(%error, "streaming client not accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let _ = connection.set_nodelay(true);
            let (place, shown_out) = lobby.enter();
            let visitor = Visitor {
                door: self.door.clone(),
                backend: backend.clone(),
                timeouts: self.timeouts,
                place: Arc::new(place),
                conversations: conversations.clone(),
            };
            let tls = self.tls.clone();
            let served = async move {
                let Some(config) = tls else { return visitor.serve(connection).await };
                match timeout(visitor.timeouts.handshake, TlsAcceptor::from(config).accept(connection)).await {
                    Ok(Ok(connection)) => visitor.serve(connection).await,
                    Ok(Err(error)) => tracing::debug!(%error, "TLS handshake of a streaming client failed"),
                    Err(_) => tracing::debug!("TLS handshake of a streaming client took too long"),
                }
            };
            tokio::spawn(async move {
                tokio::select! {
                    () = served => {}
                    () = shown_out.wait() => tracing::debug!("streaming client without a request gave way to another"),
                }
            });
        }
    }
}

/// What one connection needs.
#[derive(Debug)]
pub(crate) struct Visitor<B> {
    pub(crate) door: Door,
    pub(crate) backend: Arc<B>,
    pub(crate) timeouts: Timeouts,
    place: Arc<Place>,
    conversations: Arc<Semaphore>,
}

/// The right to hold a conversation, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Admission {
    _permit: OwnedSemaphorePermit,
}

impl<B> Clone for Visitor<B> {
    fn clone(&self) -> Self {
        Self {
            door: self.door.clone(),
            backend: self.backend.clone(),
            timeouts: self.timeouts,
            place: self.place.clone(),
            conversations: self.conversations.clone(),
        }
    }
}

impl<B: Backend> Visitor<B> {
    /// Lets the client of a request in, if there is room for one more.
    pub(crate) fn admit(&self) -> Option<Admission> {
        let permit = self.conversations.clone().try_acquire_owned().ok()?;
        // One that is being shown out finds its connection closed.
        self.place.leave();
        Some(Admission { _permit: permit })
    }

    async fn serve<T>(self, transport: T)
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let handshake = self.timeouts.handshake;
        let service = service_fn(move |request: hyper::Request<Body>| {
            let response = upgrade::answer(&self, request);
            async move { Ok::<_, Infallible>(response) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(handshake)
            .max_headers(HEADERS)
            .max_buf_size(HEAD_BYTES)
            .serve_connection(TokioIo::new(transport), service)
            .with_upgrades();
        if let Err(error) = connection.await {
            tracing::debug!(%error, "streaming request not served");
        }
    }
}
