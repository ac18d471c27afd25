//! A registry that answers as a test says.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use nacelle_image::Digest;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::files;

/// A request: method, path and query, and headers in lower case.
pub struct Asked {
    pub method: String,
    pub path: String,
    pub headers: HashMap<String, String>,
}

/// An answer: status, headers, body, and how much of the body is sent before the connection breaks.
#[derive(Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub sent: Option<usize>,
    pub stall: bool,
    /// How long to wait after each byte.
    pub trickle: Option<Duration>,
}

impl Answer {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), sent: None, stall: false, trickle: None }
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

/// A server that answers as `script` says. Returns its address.
pub async fn serve(script: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let script = Arc::new(script);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let script = script.clone();
            tokio::spawn(async move { answer(stream, &*script).await });
        }
    });
    address
}

async fn answer(mut stream: TcpStream, script: &(dyn Fn(&Asked) -> Answer + Send + Sync)) -> Option<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).await.ok()?;
        if count == 0 {
            return None;
        }
        request.extend_from_slice(&buffer[..count]);
        if request.first() == Some(&0x16) {
            // TLS, which it does not speak.
            return None;
        }
    }
    let text = String::from_utf8(request).ok()?;
    let mut lines = text.lines();
    let mut first = lines.next()?.split(' ');
    let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers =
        lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let answer = script(&Asked { method, path, headers: headers.collect() });
    let mut head =
        format!("HTTP/1.1 {} x\r\nconnection: close\r\ncontent-length: {}\r\n", answer.status, answer.body.len());
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all((head + "\r\n").as_bytes()).await.ok()?;
    let body = &answer.body[..answer.sent.unwrap_or(answer.body.len())];
    match answer.trickle {
        None => stream.write_all(body).await.ok()?,
        Some(pause) => {
            for byte in body {
                stream.write_all(&[*byte]).await.ok()?;
                tokio::time::sleep(pause).await;
            }
        }
    }
    stream.flush().await.ok()?;
    if answer.stall {
        let mut buffer = [0; 1];
        let _ = stream.read(&mut buffer).await;
    }
    Some(())
}

/// The documents of a one-layer image by their paths under `/v2/app/`.
pub struct Served {
    pub documents: HashMap<String, (String, Vec<u8>)>,
    pub layer: Digest,
}

pub fn image(content: &[u8]) -> Served {
    let archive = files(&[("file", content)]);
    let layer = Digest::of(&archive);
    let config =
        json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer]}}).to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(config.as_bytes()), "size": config.len(),
        },
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": archive.len()}],
    })
    .to_string();
    let manifest_type = "application/vnd.oci.image.manifest.v1+json".to_owned();
    let blob_type = "application/octet-stream".to_owned();
    let documents = HashMap::from([
        ("/v2/app/manifests/latest".to_owned(), (manifest_type, manifest.into_bytes())),
        (format!("/v2/app/blobs/{}", Digest::of(config.as_bytes())), (blob_type.clone(), config.into_bytes())),
        (format!("/v2/app/blobs/{layer}"), (blob_type, archive)),
    ]);
    Served { documents, layer }
}

impl Served {
    pub fn answer(&self, asked: &Asked) -> Answer {
        match self.documents.get(asked.path.split('?').next().unwrap()) {
            Some((media_type, body)) => Answer::new(200, body.clone()).with("content-type", media_type),
            None => Answer::new(404, ""),
        }
    }

    pub fn layer_path(&self) -> String {
        format!("/v2/app/blobs/{}", self.layer)
    }
}
