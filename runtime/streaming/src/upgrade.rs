//! From a request to an upgraded connection.

use bytes::Bytes;
use http::header::{
    CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming as Body;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::backend::{Backend, Request};
use crate::protocol::{self, Channels, Remote};
use crate::remote_command::{self, Command};
use crate::server::{Admission, Visitor};
use crate::tunnel::tunnel;
use crate::{port_forward, websocket};

const PROTOCOL_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const SPDY: &str = "SPDY/3.1";

/// Which conversation follows.
enum Conversation {
    Spdy(Command, Remote),
    Channels(Command, Channels),
    PortForward { sandbox: String, tunnelled: bool },
}

/// Why there is none.
struct Refusal(StatusCode, String);

/// Answers a request, and serves the upgraded connection on a task of its own if it is
/// one for a token.
pub(crate) fn answer<B: Backend>(visitor: &Visitor<B>, mut request: hyper::Request<Body>) -> Response<Full<Bytes>> {
    match accept(visitor, &request) {
        Ok((admission, conversation, response)) => {
            let upgrade = hyper::upgrade::on(&mut request);
            let visitor = visitor.clone();
            tokio::spawn(async move {
                let _admission = admission;
                match upgrade.await {
                    Ok(upgraded) => converse(&visitor, conversation, TokioIo::new(upgraded)).await,
                    Err(error) => tracing::debug!(%error, "streaming client did not upgrade"),
                }
            });
            response
        }
        Err(Refusal(status, text)) => {
            tracing::debug!(%status, text, "streaming request refused");
            let mut response = Response::new(Full::from(text + "\n"));
            *response.status_mut() = status;
            insert(&mut response, CONNECTION, "close");
            response
        }
    }
}

async fn converse<B: Backend>(
    visitor: &Visitor<B>,
    conversation: Conversation,
    transport: TokioIo<hyper::upgrade::Upgraded>,
) {
    let (backend, timeouts) = (visitor.backend.clone(), visitor.timeouts);
    match conversation {
        Conversation::Spdy(command, remote) => {
            remote_command::serve(backend, command, remote, transport, timeouts).await;
        }
        Conversation::Channels(command, channels) => {
            websocket::serve(backend, command, channels, transport, timeouts).await;
        }
        Conversation::PortForward { sandbox, tunnelled: false } => {
            port_forward::serve(backend, sandbox, transport, timeouts).await;
        }
        Conversation::PortForward { sandbox, tunnelled: true } => {
            let (stream, carry) = tunnel(transport);
            tokio::join!(port_forward::serve(backend, sandbox, stream, timeouts), carry);
        }
    }
}

/// Finds out what is wanted. The token is used up by it, whatever comes of it.
fn accept<B: Backend>(
    visitor: &Visitor<B>,
    request: &hyper::Request<Body>,
) -> Result<(Admission, Conversation, Response<Full<Bytes>>), Refusal> {
    let refuse = |status, text: &str| Refusal(status, text.to_owned());
    if ![Method::GET, Method::POST].contains(request.method()) {
        return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "use GET or POST"));
    }
    let unknown = || refuse(StatusCode::NOT_FOUND, "no such request: each URL is good once and for a minute");
    let (kind, token) =
        request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/')).ok_or_else(unknown)?;
    let wanted = visitor.door.redeem(token).filter(|wanted| wanted.kind() == kind).ok_or_else(unknown)?;
    let full = || refuse(StatusCode::SERVICE_UNAVAILABLE, "too many streaming connections: end others, or try again");
    let admission = visitor.admit().ok_or_else(full)?;
    let headers = request.headers();
    let upgrades = values(headers, &UPGRADE);
    let upgrade = |name: &str| upgrades.iter().any(|upgrade| upgrade.eq_ignore_ascii_case(name));
    if !values(headers, &CONNECTION).iter().any(|option| option.eq_ignore_ascii_case("upgrade")) {
        return Err(refuse(StatusCode::BAD_REQUEST, "not an upgrade request: use SPDY/3.1 or WebSocket"));
    }
    let (conversation, response) = if upgrade("websocket") {
        by_websocket(wanted, headers)?
    } else if upgrade(SPDY) {
        by_spdy(wanted, headers)?
    } else {
        return Err(refuse(StatusCode::BAD_REQUEST, "unknown protocol to upgrade to: use SPDY/3.1 or WebSocket"));
    };
    Ok((admission, conversation, response))
}

fn by_spdy(wanted: Request, headers: &HeaderMap) -> Result<(Conversation, Response<Full<Bytes>>), Refusal> {
    let offered = values(headers, &PROTOCOL_VERSION);
    if offered.is_empty() {
        return Err(Refusal(StatusCode::BAD_REQUEST, format!("the header {PROTOCOL_VERSION} is missing")));
    }
    let none = || Refusal(StatusCode::FORBIDDEN, format!("none of the protocols {offered:?} is known"));
    let remote = || protocol::remote(&offered).ok_or_else(none);
    let (name, conversation) = match wanted {
        Request::Exec(exec) => {
            remote().map(|(name, remote)| (name, Conversation::Spdy(Command::Exec(exec), remote)))?
        }
        Request::Attach(attach) => {
            remote().map(|(name, remote)| (name, Conversation::Spdy(Command::Attach(attach), remote)))?
        }
        Request::PortForward { sandbox } => {
            let name = protocol::port_forward(&offered, false).ok_or_else(none)?;
            (name, Conversation::PortForward { sandbox, tunnelled: false })
        }
    };
    let mut response = switching(SPDY);
    insert(&mut response, PROTOCOL_VERSION, name);
    Ok((conversation, response))
}

fn by_websocket(wanted: Request, headers: &HeaderMap) -> Result<(Conversation, Response<Full<Bytes>>), Refusal> {
    let refuse = |text: &str| Refusal(StatusCode::BAD_REQUEST, text.to_owned());
    if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err(refuse("only version 13 of WebSocket is known"));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).ok_or_else(|| refuse("the header Sec-WebSocket-Key is missing"))?;
    let offered = values(headers, &SEC_WEBSOCKET_PROTOCOL);
    let none = || Refusal(StatusCode::FORBIDDEN, format!("none of the protocols {offered:?} is known"));
    let channels = || protocol::channels(&offered).ok_or_else(none);
    let (name, conversation) = match wanted {
        Request::Exec(exec) => {
            channels().map(|(name, channels)| (name, Conversation::Channels(Command::Exec(exec), channels)))?
        }
        Request::Attach(attach) => {
            channels().map(|(name, channels)| (name, Conversation::Channels(Command::Attach(attach), channels)))?
        }
        Request::PortForward { sandbox } => {
            let name = protocol::port_forward(&offered, true).ok_or_else(none)?;
            (name, Conversation::PortForward { sandbox, tunnelled: true })
        }
    };
    let mut response = switching("websocket");
    insert(&mut response, SEC_WEBSOCKET_ACCEPT, &derive_accept_key(key.as_bytes()));
    if !name.is_empty() {
        insert(&mut response, SEC_WEBSOCKET_PROTOCOL, name);
    }
    Ok((conversation, response))
}

fn switching(protocol: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    insert(&mut response, CONNECTION, "Upgrade");
    insert(&mut response, UPGRADE, protocol);
    response
}

fn insert(response: &mut Response<Full<Bytes>>, name: HeaderName, value: &str) {
    // Every value here was a header before, or is one of ours.
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

/// The values of a header, given in one line or several.
fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Vec<&'a str> {
    let lines = headers.get_all(name).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|value| !value.is_empty()).collect()
}
