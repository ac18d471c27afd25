//! Streams as both sides use them.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering::Relaxed;
use std::thread;

use super::guest::{Guest, PATIENCE, Ports, connect, pattern, read_line, read_rest};
use crate::devices::virtio::vsock::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};

const MIB: usize = 1 << 20;

/// A guest's connection to the host, and the host's end of it.
fn accept(guest: &mut Guest, ports: Ports) -> UnixStream {
    let listener = UnixListener::bind(guest.listener_path(ports.1)).unwrap();
    guest.connect(ports);
    guest.until("the host accepts", |guest| guest.sockets[&ports].open);
    std::fs::remove_file(guest.listener_path(ports.1)).unwrap();
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn host_reaches_a_listening_port_and_hears_of_no_other() {
    let mut guest = Guest::new();
    guest.listening.insert(1024);
    let (mut stream, ports) = connect(&mut guest, 1024);
    stream.write_all(b"ping").unwrap();
    guest.until("data comes", |guest| guest.sockets[&ports].received.len() == 4);
    assert_eq!(guest.read(ports, 10), b"ping");
    assert_eq!(guest.write(ports, b"pong"), 4);
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");

    let mut refused = UnixStream::connect(guest.path()).unwrap();
    refused.write_all(b"CONNECT 99\n").unwrap();
    guest.settle();
    assert_eq!(read_rest(&refused), b"");
    assert_eq!(guest.vsock.metrics().opened.load(Relaxed), 1);
    assert_eq!(guest.vsock.metrics().refused.load(Relaxed), 1);
}

#[test]
fn data_sent_before_the_answer_arrives_after_it() {
    let mut guest = Guest::new();
    guest.listening.insert(7);
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    stream.write_all(b"CONNECT 7\nearly").unwrap();
    guest.until("data comes", |guest| guest.sockets.values().any(|socket| socket.received.len() == 5));
    assert!(read_line(&stream).starts_with("OK 10737418"));
}

#[test]
fn guest_reaches_a_listening_socket_and_is_reset_elsewhere() {
    let mut guest = Guest::new();
    let mut stream = accept(&mut guest, (5000, 10));
    assert_eq!(guest.write((5000, 10), b"hello"), 5);
    let mut data = [0; 5];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"hello");
    stream.write_all(b"there").unwrap();
    guest.until("data comes", |guest| guest.sockets[&(5000, 10)].received.len() == 5);

    guest.connect((5001, 11));
    guest.until("a reset comes", |guest| guest.sockets[&(5001, 11)].reset);
    assert!(!guest.sockets[&(5001, 11)].open);
}

#[test]
fn a_full_backlog_refuses_instead_of_waiting() {
    let mut guest = Guest::new();
    let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    let path = rustix::net::SocketAddrUnix::new(guest.listener_path(9)).unwrap();
    rustix::net::bind(&socket, &path).unwrap();
    rustix::net::listen(&socket, 1).unwrap();
    for port in 0..4 {
        guest.connect((port, 9));
    }
    guest.until("a reset comes", |guest| guest.sockets[&(3, 9)].reset);
    assert!(guest.sockets[&(0, 9)].open);
}

/// Both sides send `size` bytes at once and compare what they got.
fn exchange(guest: &mut Guest, stream: UnixStream, ports: Ports, size: usize, guest_reads: usize) {
    let down = pattern(size, 1);
    let up = pattern(size, 2);
    let (expected_up, sent_down) = (up.clone(), down.clone());
    let mut reader = stream.try_clone().unwrap();
    let writer = thread::spawn(move || {
        let mut stream = stream;
        // Uneven pieces, so that packets and writes do not line up.
        for piece in sent_down.chunks(40_009) {
            stream.write_all(piece).unwrap();
        }
        stream.shutdown(Shutdown::Write).unwrap();
    });
    let checker = thread::spawn(move || {
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert!(got == expected_up, "what the host got differs: {} bytes", got.len());
    });
    let mut sent = 0;
    let mut ended = false;
    let mut got = Vec::new();
    guest.until("everything is through", |guest| {
        sent += guest.write(ports, &up[sent..]);
        if sent == up.len() && !ended {
            ended = true;
            guest.shut_down(ports, SHUTDOWN_SEND);
        }
        got.extend(guest.read(ports, guest_reads));
        ended && got.len() == size && guest.sockets[&ports].shutdown == SHUTDOWN_BOTH
    });
    assert!(got == down, "what the guest got differs");
    writer.join().unwrap();
    checker.join().unwrap();
}

#[test]
fn ten_mebibytes_go_both_ways_over_a_connection_from_the_host() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (stream, ports) = connect(&mut guest, 80);
    exchange(&mut guest, stream, ports, 10 * MIB, usize::MAX);
    let metrics = guest.vsock.metrics();
    assert_eq!(metrics.to_guest.load(Relaxed), 10 * MIB as u64);
    assert_eq!(metrics.from_guest.load(Relaxed), 10 * MIB as u64);
    assert_eq!(metrics.bad_packets.load(Relaxed), 0);
}

#[test]
fn ten_mebibytes_go_both_ways_over_a_connection_from_the_guest() {
    let mut guest = Guest::new();
    let stream = accept(&mut guest, (7000, 80));
    // A guest that reads slowly runs out of room again and again.
    guest.sockets.get_mut(&(7000, 80)).unwrap().room = 8192;
    exchange(&mut guest, stream, (7000, 80), 10 * MIB, 5000);
}

#[test]
fn a_guest_that_does_not_read_holds_the_host_back_and_gets_all_later() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (mut stream, ports) = connect(&mut guest, 80);
    stream.set_nonblocking(true).unwrap();
    let data = pattern(4 * MIB, 3);
    let mut sent = 0;
    for _ in 0..200 {
        sent += stream.write(&data[sent..]).unwrap_or(0);
        guest.turn();
    }
    assert!(sent < 2 * MIB, "{sent} bytes went somewhere");
    assert_eq!(guest.sockets[&ports].received.len(), super::guest::ROOM as usize);
    assert_eq!(guest.sockets[&ports].credit_requests, 1, "asked once for room");
    let mut got = Vec::new();
    guest.until("all arrives", |guest| {
        sent += stream.write(&data[sent..]).unwrap_or(0);
        got.extend(guest.read(ports, usize::MAX));
        got.len() == data.len()
    });
    assert!(got == data);
}

#[test]
fn a_host_that_does_not_read_holds_the_guest_back_and_gets_all_later() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (mut stream, ports) = connect(&mut guest, 80);
    let data = pattern(4 * MIB, 4);
    let mut sent = 0;
    for _ in 0..50 {
        sent += guest.write(ports, &data[sent..]);
        guest.turn();
    }
    // The socket's own buffer, and the share of credit.
    assert!(sent < MIB, "{sent} bytes went somewhere");
    let expected = data.clone();
    let reader = thread::spawn(move || {
        let mut got = vec![0; 4 * MIB];
        stream.read_exact(&mut got).unwrap();
        assert!(got == expected);
    });
    guest.until("all is sent", |guest| {
        sent += guest.write(ports, &data[sent..]);
        sent == data.len() && reader.is_finished()
    });
    reader.join().unwrap();
}

#[test]
fn host_ends_its_half_and_still_gets_the_answer() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (mut stream, ports) = connect(&mut guest, 80);
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    guest.until("the half ends", |guest| guest.sockets[&ports].shutdown == SHUTDOWN_SEND);
    assert_eq!(guest.read(ports, 100), b"question");
    assert_eq!(guest.write(ports, b"answer"), 6);
    guest.shut_down(ports, SHUTDOWN_BOTH);
    assert_eq!(read_rest(&stream), b"answer");
    guest.until("the guest may forget it", |guest| guest.sockets[&ports].reset);
}

#[test]
fn guest_ends_its_half_and_still_gets_the_answer() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (mut stream, ports) = connect(&mut guest, 80);
    assert_eq!(guest.write(ports, b"question"), 8);
    guest.shut_down(ports, SHUTDOWN_SEND);
    assert_eq!(read_rest(&stream), b"question");
    stream.write_all(b"answer").unwrap();
    drop(stream);
    guest.until("both halves end", |guest| guest.sockets[&ports].shutdown == SHUTDOWN_BOTH);
    assert_eq!(guest.read(ports, 100), b"answer");
}

#[test]
fn a_guest_that_wants_no_more_fails_the_hosts_writes_and_may_go_on_sending() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (mut stream, ports) = connect(&mut guest, 80);
    guest.shut_down(ports, SHUTDOWN_RECEIVE);
    guest.settle();
    assert_eq!(stream.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    assert_eq!(guest.write(ports, b"more"), 4);
    let mut data = [0; 4];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"more");
}

#[test]
fn a_host_that_wants_no_more_stops_the_guest_and_may_go_on_sending() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (mut stream, ports) = connect(&mut guest, 80);
    stream.shutdown(Shutdown::Read).unwrap();
    assert_eq!(guest.write(ports, b"unheard"), 7);
    guest.until("the guest is told", |guest| guest.sockets[&ports].shutdown == SHUTDOWN_RECEIVE);
    stream.write_all(b"more").unwrap();
    guest.until("data comes", |guest| guest.sockets[&ports].received.len() == 4);
    drop(stream);
    guest.until("both halves end", |guest| guest.sockets[&ports].shutdown == SHUTDOWN_BOTH);
}

#[test]
fn a_host_that_leaves_closes_the_stream_after_its_last_byte() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (mut stream, ports) = connect(&mut guest, 80);
    guest.sockets.get_mut(&ports).unwrap().room = 4000;
    guest.send(ports, op::CREDIT_UPDATE, 0, &[]);
    let data = pattern(100_000, 5);
    stream.write_all(&data).unwrap();
    drop(stream);
    let mut got = Vec::new();
    guest.until("the stream ends", |guest| {
        got.extend(guest.read(ports, 3000));
        guest.sockets[&ports].shutdown == SHUTDOWN_BOTH && got.len() == data.len()
    });
    assert!(got == data);
}

#[test]
fn a_host_that_leaves_with_unread_data_resets_the_guest() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (stream, ports) = connect(&mut guest, 80);
    assert_eq!(guest.write(ports, b"never read"), 10);
    drop(stream);
    guest.until("a reset comes", |guest| guest.sockets[&ports].reset);
}

#[test]
fn a_guest_that_closes_leaves_all_its_data_to_a_slow_host() {
    for (size, flags) in [(350_000, Some(SHUTDOWN_BOTH)), (350_000, None), (100, Some(SHUTDOWN_BOTH)), (100, None)] {
        let mut guest = Guest::new();
        guest.listening.insert(80);
        let (mut stream, ports) = connect(&mut guest, 80);
        // What the guest never reads must not turn the host's end of file into an error.
        guest.sockets.get_mut(&ports).unwrap().room = 0;
        guest.send(ports, op::CREDIT_UPDATE, 0, &[]);
        stream.write_all(b"unread").unwrap();
        guest.settle();
        let data = pattern(size, 6);
        let mut sent = 0;
        guest.until("all is sent", |guest| {
            sent += guest.write(ports, &data[sent..]);
            sent == data.len()
        });
        match flags {
            Some(flags) => guest.shut_down(ports, flags),
            None => guest.send(ports, op::RST, 0, &[]),
        }
        guest.settle();
        assert_eq!(guest.reset_of(ports), flags.is_some(), "a reset answers a shutdown only");
        let reader = thread::spawn(move || read_rest(&stream));
        guest.until("the host has read", |_| reader.is_finished());
        assert!(reader.join().unwrap() == data);
    }
}

#[test]
fn a_hundred_connections_at_once_do_not_mix() {
    let mut guest = Guest::new();
    guest.listening.extend([80, 81]);
    let path = guest.path();
    let clients: Vec<_> = (0..100_u32)
        .map(|client| {
            let path = path.clone();
            thread::spawn(move || {
                let mut stream = UnixStream::connect(path).unwrap();
                writeln!(stream, "CONNECT {}", 80 + client % 2).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                assert!(read_line(&stream).starts_with("OK "));
                let data = pattern(50_000, client + 10);
                let mut writer = stream.try_clone().unwrap();
                let sent = data.clone();
                let writer = thread::spawn(move || {
                    writer.write_all(&sent).unwrap();
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                assert!(read_rest(&stream) == data, "client {client}");
                writer.join().unwrap();
            })
        })
        .collect();
    // The guest sends everything back.
    let mut echo: std::collections::BTreeMap<Ports, Vec<u8>> = Default::default();
    guest.until("every client is done", |guest| {
        let all: Vec<Ports> = guest.sockets.keys().copied().collect();
        for ports in all {
            let data = guest.read(ports, usize::MAX);
            let pending = echo.entry(ports).or_default();
            pending.extend(data);
            let written = guest.write(ports, pending);
            pending.drain(..written);
            let socket = guest.sockets.get_mut(&ports).unwrap();
            if socket.shutdown & SHUTDOWN_SEND != 0 && socket.open && !socket.reset && pending.is_empty() {
                socket.open = false;
                guest.shut_down(ports, SHUTDOWN_BOTH);
            }
        }
        clients.iter().all(|client| client.is_finished())
    });
    for client in clients {
        client.join().unwrap();
    }
    let ports: std::collections::BTreeSet<u32> = guest.sockets.keys().map(|ports| ports.1).collect();
    assert_eq!(ports.len(), 100, "every connection has a host port of its own");
}

#[test]
fn one_busy_stream_leaves_room_for_another() {
    let mut guest = Guest::new();
    guest.listening.extend([80, 81]);
    let (mut busy, busy_ports) = connect(&mut guest, 80);
    let (mut quiet, quiet_ports) = connect(&mut guest, 81);
    let flood = thread::spawn(move || {
        let data = vec![7; 64 * 1024];
        while busy.write_all(&data).is_ok() {}
    });
    guest.until("the flood runs", |guest| guest.sockets[&busy_ports].received.len() > 100_000);
    quiet.write_all(b"hello").unwrap();
    let mut flooded = 0;
    guest.until("the quiet one is heard", |guest| {
        flooded += guest.read(busy_ports, usize::MAX).len();
        guest.sockets[&quiet_ports].received.len() == 5
    });
    assert!(flooded < 4 * MIB, "{flooded} bytes went first");
    guest.send(busy_ports, op::RST, 0, &[]);
    guest.until("the flood ends", |_| flood.is_finished());
    flood.join().unwrap();
}
