//! One connection of the host to a standard stream.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nacelle_proto::stdio::{Header, LINE_LIMIT, Reply, Stream};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, split};
use tokio::time::timeout;

use super::streams::Streams;
use super::{input, output};

/// How long the host may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves one connection from its header to its end. `find` looks up the streams of the
/// process that the header names, or says why it cannot.
pub async fn serve<S, F>(connection: S, find: F)
where
    S: AsyncRead + AsyncWrite,
    F: FnOnce(&str, &str) -> Result<Arc<Streams>, String>,
{
    let (read, mut write) = split(connection);
    let mut read = BufReader::new(read);
    let Ok(header) = timeout(PATIENCE, read_header(&mut read)).await else { return };
    let target = header.map_err(refusal).and_then(|header| {
        let streams = find(&header.container_id, &header.exec_id).map_err(refusal)?;
        Target::attach(&streams, &header)
    });
    let answer = target.as_ref().err().map_or_else(Reply::default, |refusal| refusal.clone());
    if reply(&mut write, answer).await.is_err() {
        return;
    }
    match target {
        Ok(Target::Input(input, attachment)) => input.serve(attachment, read, write).await,
        Ok(Target::Output(output, attachment)) => output.serve(attachment, read, write).await,
        Err(_) => {}
    }
}

enum Target {
    Input(Arc<input::Input>, input::Attachment),
    Output(Arc<output::Output>, output::Attachment),
}

impl Target {
    fn attach(streams: &Streams, header: &Header) -> Result<Self, Reply> {
        let missing = || refusal(format!("the process has no {} of its own", header.stream));
        let output = match header.stream {
            Stream::Stdin => {
                let input = streams.stdin.clone().ok_or_else(missing)?;
                let attachment = input.attach().ok_or_else(|| refusal("the process's stdin is closed".into()))?;
                return Ok(Self::Input(input, attachment));
            }
            Stream::Stdout => streams.stdout.clone(),
            Stream::Stderr => streams.stderr.clone().ok_or_else(missing)?,
        };
        let attachment = output
            .attach(header.offset)
            .map_err(|error| Reply { start: error.acknowledged(), error: error.to_string() })?;
        Ok(Self::Output(output, attachment))
    }
}

fn refusal(error: String) -> Reply {
    Reply { error, start: None }
}

async fn read_header<R: AsyncBufRead + Unpin>(read: &mut R) -> Result<Header, String> {
    let mut line = Vec::new();
    let limit = LINE_LIMIT as u64;
    read.take(limit).read_until(b'\n', &mut line).await.map_err(|error| format!("cannot read the header: {error}"))?;
    if line.last() != Some(&b'\n') {
        return Err(format!("the header is not a line of at most {LINE_LIMIT} bytes"));
    }
    serde_json::from_slice(&line).map_err(|error| format!("the header is malformed: {error}"))
}

async fn reply<W: AsyncWrite + Unpin>(write: &mut W, mut reply: Reply) -> io::Result<()> {
    // Room for the quoting; the limit holds for the whole line.
    reply.error.truncate(reply.error.floor_char_boundary(LINE_LIMIT / 8));
    let mut line = serde_json::to_vec(&reply)?;
    line.push(b'\n');
    write.write_all(&line).await
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use tokio::io::{DuplexStream, duplex};

    use super::*;

    async fn ask(header: &[u8], streams: Option<Arc<Streams>>) -> (String, BufReader<DuplexStream>) {
        let (mut host, agent) = duplex(1 << 20);
        tokio::spawn(serve(agent, move |container, exec| {
            assert_eq!((container, exec), ("c", "e"));
            streams.ok_or_else(|| "no such process".to_owned())
        }));
        host.write_all(header).await.unwrap();
        let mut host = BufReader::new(host);
        let mut line = String::new();
        timeout(Duration::from_secs(5), host.read_line(&mut line)).await.unwrap().unwrap();
        (serde_json::from_str::<Reply>(&line).unwrap().error, host)
    }

    fn header(stream: Stream, offset: u64) -> Vec<u8> {
        let header = Header { container_id: "c".into(), exec_id: "e".into(), stream, offset };
        let mut line = serde_json::to_vec(&header).unwrap();
        line.push(b'\n');
        line
    }

    #[tokio::test]
    async fn bytes_right_behind_the_header_reach_the_process() {
        let (streams, [stdin, ..]) = Streams::pipes(true, 0).unwrap();
        let mut line = header(Stream::Stdin, 0);
        line.extend(b"early");
        let (error, mut host) = ask(&line, Some(Arc::new(streams))).await;
        assert_eq!(error, "");
        host.shutdown().await.unwrap();
        let mut seen = String::new();
        tokio::task::spawn_blocking(move || {
            io::Read::read_to_string(&mut std::fs::File::from(stdin), &mut seen).unwrap();
            assert_eq!(seen, "early");
        })
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn output_comes_from_the_offset_asked_for() {
        let (streams, [_, stdout, stderr]) = Streams::pipes(false, 0).unwrap();
        std::fs::File::from(stdout).write_all(b"0123456789").unwrap();
        drop(stderr);
        let streams = Arc::new(streams);
        tokio::time::sleep(Duration::from_millis(20)).await;
        let (error, mut host) = ask(&header(Stream::Stdout, 4), Some(streams.clone())).await;
        assert_eq!(error, "");
        let mut seen = String::new();
        timeout(Duration::from_secs(5), host.read_to_string(&mut seen)).await.unwrap().unwrap();
        assert_eq!(seen, "456789");
        let (error, _) = ask(&header(Stream::Stdout, 11), Some(streams.clone())).await;
        assert!(error.contains("offset 11"), "{error}");
        let (error, _) = ask(&header(Stream::Stdin, 0), Some(streams)).await;
        assert!(error.contains("no stdin"), "{error}");
    }

    #[tokio::test]
    async fn what_cannot_be_served_is_refused_with_its_reason() {
        let (error, mut host) = ask(&header(Stream::Stdout, 0), None).await;
        assert_eq!(error, "no such process");
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
        for junk in [&b"{}\n"[..], b"\n", b"\xff\xfe\n", &[b' '; LINE_LIMIT + 1]] {
            let (error, _) = ask(junk, None).await;
            assert!(error.contains("header"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_header_can_make_it_panic_or_hang(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (mut host, agent) = duplex(1 << 16);
                let server = tokio::spawn(serve(agent, |_, _| Err("no".to_owned())));
                host.write_all(&bytes).await.unwrap();
                host.shutdown().await.unwrap();
                timeout(Duration::from_secs(5), server).await.unwrap().unwrap();
            });
        }
    }
}
