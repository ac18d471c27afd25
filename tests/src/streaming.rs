//! Clients of the streaming server: SPDY/3.1 as kubectl speaks it, and WebSocket channels.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{SinkExt, StreamExt};
use nacelle_proto::runtime::v1 as cri;
use nacelle_streaming::spdy::frame::{Frame, FrameReader};
use nacelle_streaming::spdy::headers::{Deflater, Headers};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::client::{Client, limit};

/// A terminal's size as clients send it.
pub fn size(columns: u16, rows: u16) -> Vec<u8> {
    format!("{{\"Width\":{columns},\"Height\":{rows}}}\n").into_bytes()
}

impl Client {
    /// The URL for an exec.
    pub async fn exec_url(&self, request: cri::ExecRequest) -> Result<String, tonic::Status> {
        self.runtime.clone().exec(request).await.map(|answer| answer.into_inner().url)
    }

    /// The URL to attach at.
    pub async fn attach_url(&self, request: cri::AttachRequest) -> Result<String, tonic::Status> {
        self.runtime.clone().attach(request).await.map(|answer| answer.into_inner().url)
    }

    /// The URL for a pod's ports.
    pub async fn port_forward_url(&self, pod: &str) -> Result<String, tonic::Status> {
        let request = cri::PortForwardRequest { pod_sandbox_id: pod.into(), port: Vec::new() };
        self.runtime.clone().port_forward(request).await.map(|answer| answer.into_inner().url)
    }
}

/// Host with port, and path of a URL.
fn parts(url: &str) -> Result<(&str, &str)> {
    let rest = url.strip_prefix("http://").with_context(|| format!("no http URL: {url}"))?;
    let slash = rest.find('/').with_context(|| format!("no path in {url}"))?;
    Ok(rest.split_at(slash))
}

/// Sends a request and reads the head of the answer, to the byte.
pub async fn request(url: &str, headers: &str) -> Result<(String, TcpStream)> {
    let (host, path) = parts(url)?;
    let mut stream = TcpStream::connect(host).await.with_context(|| format!("connect to {host}"))?;
    // The server may refuse a request before it has read all of it.
    let _ = stream.write_all(format!("POST {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n").as_bytes()).await;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match timeout(limit(30), stream.read_u8()).await.context("an answer in time")? {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    Ok((String::from_utf8_lossy(&head).into_owned(), stream))
}

/// The headers of a request to upgrade to SPDY.
pub fn upgrade(protocols: &str) -> String {
    format!("Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocols}\r\n")
}

/// A connection that was upgraded to SPDY.
pub struct Spdy {
    reader: FrameReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    deflater: Deflater,
    next: u32,
    data: HashMap<u32, Vec<u8>>,
    ended: HashSet<u32>,
    /// Streams that were accepted, and those that were reset.
    pub accepted: HashSet<u32>,
    /// Streams that were reset.
    pub reset: HashSet<u32>,
    /// Windows that were granted: stream and bytes.
    pub granted: HashMap<u32, u32>,
}

impl Spdy {
    /// Goes to a URL with the protocols of this name.
    pub async fn connect(url: &str, protocols: &str) -> Result<Self> {
        let (head, stream) = request(url, &upgrade(protocols)).await?;
        let lines = head.to_lowercase();
        if !lines.starts_with("http/1.1 101 ") || !lines.contains("\r\nconnection: upgrade\r\n") {
            bail!("not upgraded: {head}");
        }
        let (reader, writer) = stream.into_split();
        Ok(Self {
            reader: FrameReader::new(reader),
            writer,
            deflater: Deflater::default(),
            next: 1,
            data: HashMap::new(),
            ended: HashSet::new(),
            accepted: HashSet::new(),
            reset: HashSet::new(),
            granted: HashMap::new(),
        })
    }

    /// Sends a frame.
    pub async fn frame(&mut self, frame: Frame) -> Result<()> {
        let mut bytes = Vec::new();
        frame.encode(&mut self.deflater, &mut bytes);
        Ok(self.writer.write_all(&bytes).await?)
    }

    /// Sends bytes that need be no frame.
    pub async fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.writer.write_all(bytes).await?)
    }

    /// Opens a stream with these headers.
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> Result<u32> {
        let id = self.next;
        self.next += 2;
        self.frame(Frame::SynStream { id, fin: false, headers: Headers::new(headers) }).await?;
        Ok(id)
    }

    /// Opens the streams of a command, in this order.
    pub async fn open_all<const N: usize>(&mut self, kinds: [&str; N]) -> Result<[u32; N]> {
        let mut ids = [0; N];
        for (id, kind) in ids.iter_mut().zip(kinds) {
            *id = self.open(&[("streamtype", kind)]).await?;
        }
        Ok(ids)
    }

    /// Sends data, the last of it if `fin`.
    pub async fn send(&mut self, id: u32, data: &[u8], fin: bool) -> Result<()> {
        self.frame(Frame::Data { id, fin, data: data.to_vec().into() }).await
    }

    /// Takes one frame. False at the end of the connection.
    pub async fn step(&mut self) -> Result<bool> {
        let frame = timeout(limit(60), self.reader.next()).await.context("a frame in time")??;
        match frame {
            None => return Ok(false),
            Some(Frame::Data { id, fin, data }) => {
                self.data.entry(id).or_default().extend_from_slice(&data);
                if fin {
                    self.ended.insert(id);
                }
            }
            Some(Frame::SynReply { id, .. }) => drop(self.accepted.insert(id)),
            Some(Frame::Reset { id, .. }) => drop(self.reset.insert(id)),
            Some(Frame::WindowUpdate { id, delta }) => *self.granted.entry(id).or_default() += delta,
            Some(_) => {}
        }
        Ok(true)
    }

    /// What has come on a stream.
    pub fn data(&self, id: u32) -> &[u8] {
        self.data.get(&id).map_or(&[], Vec::as_slice)
    }

    /// Reads until a stream's data contains `text`.
    pub async fn until(&mut self, id: u32, text: &str) -> Result<()> {
        while !String::from_utf8_lossy(self.data(id)).contains(text) {
            if self.ended.contains(&id) || !self.step().await? {
                bail!("no {text:?} in {:?}", String::from_utf8_lossy(self.data(id)));
            }
        }
        Ok(())
    }

    /// Reads a stream to its end.
    pub async fn finish(&mut self, id: u32) -> Result<String> {
        while !self.ended.contains(&id) {
            if !self.step().await? {
                bail!("the connection ended before stream {id}");
            }
        }
        Ok(String::from_utf8_lossy(self.data(id)).into_owned())
    }
}

/// A connection that was upgraded to WebSocket.
pub struct Channels(WebSocketStream<TcpStream>);

impl Channels {
    /// Goes to a URL with this protocol.
    pub async fn connect(url: &str, protocol: &str) -> Result<Self> {
        let (host, path) = parts(url)?;
        let mut request = format!("ws://{host}{path}").into_client_request()?;
        request.headers_mut().insert("Sec-WebSocket-Protocol", protocol.parse()?);
        let stream = TcpStream::connect(host).await?;
        let (socket, answer) = tokio_tungstenite::client_async(request, stream).await?;
        let chosen = answer.headers().get("Sec-WebSocket-Protocol").context("a chosen protocol")?;
        if chosen != protocol {
            bail!("the server chose {chosen:?}");
        }
        Ok(Self(socket))
    }

    /// Sends data on a channel.
    pub async fn send(&mut self, channel: u8, data: &[u8]) -> Result<()> {
        let mut message = vec![channel];
        message.extend_from_slice(data);
        Ok(self.0.send(Message::Binary(message.into())).await?)
    }

    /// Sends text.
    pub async fn text(&mut self, text: &str) -> Result<()> {
        Ok(self.0.send(Message::text(text)).await?)
    }

    /// Reads to the end of the connection: the messages joined for each channel, and
    /// whether it was closed in good order.
    pub async fn finish(mut self) -> Result<(HashMap<u8, String>, bool)> {
        let mut channels = HashMap::<u8, String>::new();
        while let Some(message) = timeout(limit(60), self.0.next()).await.context("a message in time")? {
            match message? {
                Message::Binary(data) => {
                    let (channel, data) = data.split_first().context("a channel")?;
                    channels.entry(*channel).or_default().push_str(&String::from_utf8_lossy(data));
                }
                Message::Text(text) => {
                    let channel = text.as_bytes().first().context("a channel")? - b'0';
                    let data = STANDARD.decode(&text[1..])?;
                    channels.entry(channel).or_default().push_str(&String::from_utf8_lossy(&data));
                }
                Message::Close(_) => return Ok((channels, true)),
                _ => {}
            }
        }
        Ok((channels, false))
    }
}
