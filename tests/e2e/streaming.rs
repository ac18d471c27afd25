//! Exec, attach and port forwarding, as kubectl does them.

use nacelle_proto::runtime::v1 as cri;
use nacelle_streaming::spdy::frame::Frame;
use nacelle_tests::client::{Client, container_config, limit, log_lines};
use nacelle_tests::streaming::{Channels, Spdy, request, size, upgrade};
use tempfile::TempDir;
use tonic::Code;

const V4: &str = "v4.channel.k8s.io";

/// A pod with a container of this configuration, started.
async fn running(config: cri::ContainerConfig) -> (Client, String, String, TempDir) {
    let client = Client::node().await;
    let logs = tempfile::tempdir().unwrap();
    client.pull("busybox").await.unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let id = client.create_as(&pod, config).await.unwrap();
    client.start(&id).await.unwrap();
    (client, pod, id, logs)
}

fn command(id: &str, command: &[&str]) -> cri::ExecRequest {
    cri::ExecRequest {
        container_id: id.into(),
        cmd: command.iter().map(ToString::to_string).collect(),
        stdout: true,
        ..Default::default()
    }
}

#[tokio::test]
async fn exec_by_spdy_has_all_streams_a_terminal_and_the_exit_code() {
    let (client, pod, id, _logs) = running(container_config("busybox", &["sleep", "1000"])).await;

    let script = "echo out; echo err >&2; cat; exit 42";
    let exec = cri::ExecRequest { stdin: true, stderr: true, ..command(&id, &["sh", "-c", script]) };
    let mut spdy = Spdy::connect(&client.exec_url(exec).await.unwrap(), V4).await.unwrap();
    let [error, stdin, stdout, stderr] = spdy.open_all(["error", "stdin", "stdout", "stderr"]).await.unwrap();
    spdy.frame(Frame::Ping(7)).await.unwrap();
    spdy.until(stdout, "out\n").await.unwrap();
    // More than any buffer on the way.
    let input: String = (0..200_000).map(|n| format!("{n}\n")).collect();
    let mut sent = 0;
    for piece in input.as_bytes().chunks(30_000) {
        spdy.send(stdin, piece, false).await.unwrap();
        sent += piece.len();
        while spdy.data(stdout).len() + 200_000 < sent {
            assert!(spdy.step().await.unwrap());
        }
    }
    spdy.send(stdin, b"end", true).await.unwrap();
    assert_eq!(spdy.finish(stdout).await.unwrap(), format!("out\n{input}end"));
    assert_eq!(spdy.finish(stderr).await.unwrap(), "err\n");
    let status = spdy.finish(error).await.unwrap();
    assert!(status.contains("NonZeroExitCode") && status.contains("\"42\""), "{status}");
    assert!(spdy.granted.get(&stdin).copied().unwrap_or_default() > 1_000_000, "windows: {:?}", spdy.granted);
    while spdy.step().await.unwrap() {}

    let script = "trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.1; done";
    let exec = cri::ExecRequest { tty: true, stdin: true, ..command(&id, &["sh", "-c", script]) };
    let mut spdy = Spdy::connect(&client.exec_url(exec).await.unwrap(), V4).await.unwrap();
    let [error, _, stdout, resize] = spdy.open_all(["error", "stdin", "stdout", "resize"]).await.unwrap();
    spdy.until(stdout, "ready").await.unwrap();
    spdy.send(resize, &size(97, 31), false).await.unwrap();
    assert!(spdy.finish(stdout).await.unwrap().contains("31 97"));
    assert!(spdy.finish(error).await.unwrap().contains("\"3\""));

    // Before version 4 an end in good order was silence.
    let url = client.exec_url(command(&id, &["true"])).await.unwrap();
    let mut spdy = Spdy::connect(&url, "channel.k8s.io").await.unwrap();
    let [error, _] = spdy.open_all(["error", "stdout"]).await.unwrap();
    assert_eq!(spdy.finish(error).await.unwrap(), "");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn exec_by_websocket_ends_its_input_alone_and_closes_in_good_order() {
    let (client, pod, id, _logs) = running(container_config("busybox", &["sleep", "1000"])).await;
    let exec =
        cri::ExecRequest { stdin: true, stderr: true, ..command(&id, &["sh", "-c", "cat; echo err >&2; exit 9"]) };
    let mut channels = Channels::connect(&client.exec_url(exec).await.unwrap(), "v5.channel.k8s.io").await.unwrap();
    channels.send(0, b"hello").await.unwrap();
    channels.send(255, &[0]).await.unwrap();
    let (said, in_order) = channels.finish().await.unwrap();
    assert_eq!((said[&1].as_str(), said[&2].as_str(), in_order), ("hello", "err\n", true));
    assert!(said[&3].contains("NonZeroExitCode") && said[&3].contains("\"9\""), "{said:?}");

    let exec = cri::ExecRequest { stdin: true, tty: true, ..command(&id, &["sh", "-c", "read x; echo got $x"]) };
    let url = client.exec_url(exec).await.unwrap();
    let mut channels = Channels::connect(&url, "v4.base64.channel.k8s.io").await.unwrap();
    channels.text("0aGkK").await.unwrap();
    let (said, _) = channels.finish().await.unwrap();
    assert!(said[&1].contains("got hi") && said[&3].contains("Success"), "{said:?}");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn attached_clients_share_the_container_and_its_log_is_whole() {
    let script = "while read line; do echo got $line; done; echo over; exit 6";
    let mut config = container_config("busybox", &["sh", "-c", script]);
    (config.stdin, config.stdin_once) = (true, true);
    let (client, pod, id, _logs) = running(config).await;
    let attach = |stdin| cri::AttachRequest { container_id: id.clone(), stdin, stdout: true, ..Default::default() };
    let mut watcher = Spdy::connect(&client.attach_url(attach(false)).await.unwrap(), V4).await.unwrap();
    let [watched_error, watched] = watcher.open_all(["error", "stdout"]).await.unwrap();
    let mut talker = Spdy::connect(&client.attach_url(attach(true)).await.unwrap(), V4).await.unwrap();
    let [error, stdin, stdout] = talker.open_all(["error", "stdin", "stdout"]).await.unwrap();
    talker.send(stdin, b"one\n", false).await.unwrap();
    talker.until(stdout, "got one\n").await.unwrap();
    // Both are there by now, so both see all that follows.
    talker.send(stdin, b"two\n", false).await.unwrap();
    watcher.until(watched, "got two\n").await.unwrap();
    talker.send(stdin, b"", true).await.unwrap();
    assert_eq!(talker.finish(stdout).await.unwrap(), "got one\ngot two\nover\n");
    assert!(talker.finish(error).await.unwrap().contains("Success"));
    assert!(watcher.finish(watched).await.unwrap().ends_with("got two\nover\n"));
    watcher.finish(watched_error).await.unwrap();
    let status = client.wait_exit(&id).await.unwrap();
    assert_eq!(status.exit_code, 6, "the first client's end was the end of the input");
    let lines: Vec<_> = log_lines(&status.log_path).unwrap().into_iter().map(|line| line.1).collect();
    assert_eq!(lines, ["got one", "got two", "over"]);
    let error = client.attach_url(attach(false)).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn input_that_is_not_once_stays_open_and_a_terminal_takes_its_size() {
    let mut config = container_config("busybox", &["sh"]);
    (config.stdin, config.tty) = (true, true);
    let (client, pod, id, _logs) = running(config).await;
    let attach =
        cri::AttachRequest { container_id: id.clone(), stdin: true, stdout: true, tty: true, ..Default::default() };
    for (columns, rows) in [(101, 41), (102, 42)] {
        let url = client.attach_url(attach.clone()).await.unwrap();
        let mut spdy = Spdy::connect(&url, V4).await.unwrap();
        let [_, stdin, stdout, resize] = spdy.open_all(["error", "stdin", "stdout", "resize"]).await.unwrap();
        spdy.send(resize, &size(columns, rows), false).await.unwrap();
        // The size and the input take different ways.
        let seen = format!("{rows} {columns}");
        let until = format!("until [ \"$(stty size)\" = '{seen}' ]; do usleep 1000; done; echo size-$((1+1))\n");
        spdy.send(stdin, until.as_bytes(), false).await.unwrap();
        spdy.until(stdout, "size-2").await.unwrap();
        // Hanging up is no end of the container's input.
    }
    assert_eq!(client.status(&id).await.unwrap().state(), cri::ContainerState::ContainerRunning);
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn ports_of_a_pod_are_reached_and_a_port_without_a_listener_is_told() {
    let server = "nc -ll -p 7000 -e sh -c 'cat; echo over' & exec httpd -f -p 8080 -h /etc";
    let (client, pod, id, _logs) = running(container_config("busybox", &["sh", "-c", server])).await;
    client
        .exec(
            &id,
            &["sh", "-c", "until nc 127.0.0.1 8080 </dev/null && nc 127.0.0.1 7000 </dev/null; do usleep 10000; done"],
        )
        .await
        .unwrap();
    let mut spdy = Spdy::connect(&client.port_forward_url(&pod).await.unwrap(), "portforward.k8s.io").await.unwrap();
    let mut streams = Vec::new();
    for (request, port) in [("0", "7000"), ("1", "8080"), ("2", "9999")] {
        let headers = [("streamtype", "error"), ("port", port), ("requestid", request)];
        let error = spdy.open(&headers).await.unwrap();
        spdy.send(error, b"", true).await.unwrap();
        let headers = [("streamtype", "data"), ("port", port), ("requestid", request)];
        streams.push((error, spdy.open(&headers).await.unwrap()));
    }
    let [(echo_error, echo), (_, http), (refused_error, refused)] = streams[..] else { unreachable!() };
    spdy.send(echo, b"there and back", false).await.unwrap();
    spdy.until(echo, "there and back").await.unwrap();
    spdy.send(http, b"GET /passwd HTTP/1.0\r\n\r\n", false).await.unwrap();
    assert!(spdy.finish(http).await.unwrap().contains("root:"));
    let error = spdy.finish(refused_error).await.unwrap();
    assert!(error.contains("9999"), "{error}");
    assert_eq!(spdy.finish(refused).await.unwrap(), "");
    // The pod has more to say after we have ended.
    spdy.send(echo, b"", true).await.unwrap();
    assert_eq!(spdy.finish(echo).await.unwrap(), "there and backover\n");
    assert_eq!(spdy.finish(echo_error).await.unwrap(), "");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_command_with_it() {
    let (client, pod, id, _logs) = running(container_config("busybox", &["sleep", "1000"])).await;
    let script = "echo begun; exec sleep 4712";
    let url = client.exec_url(command(&id, &["sh", "-c", script])).await.unwrap();
    let mut spdy = Spdy::connect(&url, V4).await.unwrap();
    let [_, stdout] = spdy.open_all(["error", "stdout"]).await.unwrap();
    spdy.until(stdout, "begun").await.unwrap();
    drop(spdy);
    let deadline = tokio::time::Instant::now() + limit(30);
    while String::from_utf8_lossy(&client.exec(&id, &["ps"]).await.unwrap().stdout).contains("sleep 4712") {
        assert!(tokio::time::Instant::now() < deadline, "the command still runs");
    }
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_and_harms_nobody() {
    let (client, pod, id, _logs) = running(container_config("busybox", &["sleep", "1000"])).await;
    let refused = async |request: cri::ExecRequest| client.exec_url(request).await.unwrap_err();
    for (request, code, word) in [
        (cri::ExecRequest { stdout: true, ..command(&id, &[]) }, Code::InvalidArgument, "cmd"),
        (cri::ExecRequest { stdout: false, ..command(&id, &["true"]) }, Code::InvalidArgument, "stdout"),
        (cri::ExecRequest { tty: true, stderr: true, ..command(&id, &["true"]) }, Code::InvalidArgument, "stderr"),
        (command("", &["true"]), Code::InvalidArgument, "container_id"),
        (command("none", &["true"]), Code::NotFound, "none"),
    ] {
        let error = refused(request).await;
        assert!(error.code() == code && error.message().contains(word), "{error}");
    }
    assert_eq!(client.port_forward_url("none").await.unwrap_err().code(), Code::NotFound);

    // A token is good once, for its own kind, and only to upgrade.
    let url = client.exec_url(command(&id, &["true"])).await.unwrap();
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    assert_eq!(url.rsplit('/').next().unwrap().len(), 8);
    let mut spdy = Spdy::connect(&url, V4).await.unwrap();
    let [error, _] = spdy.open_all(["error", "stdout"]).await.unwrap();
    assert!(spdy.finish(error).await.unwrap().contains("Success"));
    let new = async || client.exec_url(command(&id, &["true"])).await.unwrap();
    for (url, headers, status) in [
        (url, upgrade(V4), "404"),
        (new().await.replace("/exec/", "/attach/"), upgrade(V4), "404"),
        (new().await, String::new(), "400"),
        (new().await, upgrade("v9.channel.k8s.io"), "403"),
        (new().await, format!("X-Long: {}\r\n", "x".repeat(100_000)), "431"),
        (new().await, "X-Many: x\r\n".repeat(200), "431"),
    ] {
        let (head, _) = request(&url, &headers).await.unwrap();
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "wanted {status}: {head}");
    }

    // Streams without end, a control frame that is too long, and noise.
    let mut spdy = Spdy::connect(&new().await, V4).await.unwrap();
    for _ in 0..50 {
        spdy.open(&[("streamtype", "nonsense")]).await.unwrap();
    }
    while spdy.accepted.len() + spdy.reset.len() < 50 {
        assert!(spdy.step().await.unwrap());
    }
    assert!(spdy.reset.len() >= 40, "{} streams were refused", spdy.reset.len());
    for noise in [&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff][..], &[0xff; 64]] {
        let mut spdy = Spdy::connect(&new().await, V4).await.unwrap();
        spdy.raw(noise).await.unwrap();
        while spdy.step().await.unwrap_or(false) {}
    }
    assert_eq!(client.exec(&id, &["true"]).await.unwrap().exit_code, 0);
    client.remove_pod(&pod).await.unwrap();
}
