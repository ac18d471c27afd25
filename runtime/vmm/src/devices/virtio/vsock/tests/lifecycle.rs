//! Streams that do not come about, those that wait, and the device's own life.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::Ordering::Relaxed;

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Resource, Rlimit};
use vm_memory::{Bytes, GuestAddress};

use super::guest::{Guest, connect, read_line, read_rest};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::testing::{Driver, writable};
use crate::devices::virtio::vsock::packet::op;
use crate::devices::virtio::vsock::{Vsock, VsockState};

#[test]
fn clients_that_come_before_the_driver_wait_for_it() {
    let mut guest = Guest::inactive(None);
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    stream.write_all(b"CONNECT 80\n").unwrap();
    guest.settle();
    // The transport resets a device before its driver takes it.
    guest.vsock.reset();
    guest.listening.insert(80);
    guest.activate().unwrap();
    guest.offer_buffers(128);
    guest.until("the guest accepts", |guest| !guest.sockets.is_empty());
    assert!(read_line(&stream).starts_with("OK "));

    // A reset closes what was open.
    guest.vsock.reset();
    assert_eq!(read_rest(&stream), b"");
}

#[test]
fn requests_without_an_answer_and_clients_without_a_word_time_out() {
    let mut guest = Guest::new();
    guest.ignored.insert(80);
    let silent = UnixStream::connect(guest.path()).unwrap();
    let mut unanswered = UnixStream::connect(guest.path()).unwrap();
    unanswered.write_all(b"CONNECT 80\n").unwrap();
    guest.until("both are ended", |guest| guest.vsock.metrics().timed_out.load(Relaxed) == 2);
    assert_eq!(read_rest(&silent), b"");
    assert_eq!(read_rest(&unanswered), b"");
}

#[test]
fn a_client_that_gives_up_takes_its_request_back() {
    let mut guest = Guest::new();
    guest.ignored.insert(80);
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    stream.write_all(b"CONNECT 80\n").unwrap();
    guest.settle();
    let request = *guest.packets.iter().find(|header| header.op == op::REQUEST).unwrap();
    drop(stream);
    let ports = (80, request.src_port);
    guest.until("a reset comes", |guest| guest.reset_of(ports));
    // The guest's answer comes too late.
    guest.packets.clear();
    guest.send(ports, op::RESPONSE, 0, &[]);
    guest.until("a reset comes", |guest| guest.reset_of(ports));
}

#[test]
fn more_connections_than_the_limit_are_refused_and_come_back_when_others_end() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let mut streams = Vec::new();
    for _ in 0..super::super::muxer::CONNECTIONS_LIMIT {
        let mut stream = UnixStream::connect(guest.path()).unwrap();
        stream.write_all(b"CONNECT 80\n").unwrap();
        streams.push(stream);
        if streams.len() % 64 == 0 {
            guest.settle();
        }
    }
    guest.settle();
    assert_eq!(guest.sockets.len(), streams.len());
    let refused = UnixStream::connect(guest.path()).unwrap();
    guest.settle();
    assert_eq!(read_rest(&refused), b"");
    guest.connect((9999, 1));
    guest.until("a reset comes", |guest| guest.sockets[&(9999, 1)].reset);
    guest.sockets.remove(&(9999, 1));

    streams.clear();
    guest.until("all end", |guest| guest.sockets.values().all(|socket| socket.reset));
    guest.settle();
    connect(&mut guest, 80);
}

#[test]
fn without_descriptors_clients_wait_and_the_loop_does_not_spin() {
    // The limit is the whole process's, so this runs in one of its own.
    if std::env::var_os("NACELLE_TEST_ALONE").is_none() {
        let name = "without_descriptors_clients_wait_and_the_loop_does_not_spin";
        let path = format!("{}::{name}", module_path!().split_once("::").unwrap().1);
        let mut child = Command::new(std::env::current_exe().unwrap());
        let output = child.args([&path, "--exact"]).env("NACELLE_TEST_ALONE", "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    stream.write_all(b"CONNECT 80\n").unwrap();
    let limit = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(1), maximum: limit.maximum }).unwrap();
    guest.vsock.poll_ready().unwrap();
    // Neither is the client accepted, nor is the device ready all the time.
    let mut ready = 0;
    for _ in 0..10 {
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        let fd = guest.vsock.poll_fd().unwrap();
        ready += rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap();
    }
    assert!(ready < 5, "ready {ready} times of 10");
    guest.turn();
    rustix::process::setrlimit(Resource::Nofile, limit).unwrap();
    guest.until("the guest accepts", |guest| !guest.sockets.is_empty());
    assert!(read_line(&stream).starts_with("OK "));
}

#[test]
fn a_restored_guest_is_told_to_forget_its_connections() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (_stream, ports) = connect(&mut guest, 80);
    let state = guest.vsock.own_state();
    let state: VsockState = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();

    let mut guest = Guest::inactive(Some(&state));
    guest.listening.insert(80);
    guest.events.add(&[writable(0x8000, 4)]);
    guest.memory.write_slice(&[0xff; 4], GuestAddress(0x8000)).unwrap();
    guest.activate().unwrap();
    guest.offer_buffers(128);
    assert_eq!(guest.events.take().map(|used| used.1), Some(4));
    assert_eq!(guest.memory.read_obj::<u32>(GuestAddress(0x8000)).unwrap(), 0);
    assert_eq!(guest.interrupts.take(2), 1);
    let (_, after) = connect(&mut guest, 80);
    assert!(after.1 > ports.1, "a host port was used again");
    // Once is enough.
    guest.events.add(&[writable(0x8000, 4)]);
    guest.vsock.queue_notified(2).unwrap();
    assert_eq!(guest.events.take(), None);
}

#[test]
fn packets_wait_for_buffers_and_come_with_few_interrupts() {
    let mut guest = Guest::inactive(None);
    guest.activate().unwrap();
    guest.listening.insert(80);
    let mut streams: Vec<_> = (0..20).map(|_| UnixStream::connect(guest.path()).unwrap()).collect();
    for stream in &mut streams {
        stream.write_all(b"CONNECT 80\n").unwrap();
    }
    guest.settle();
    assert_eq!(guest.packets, []);
    guest.interrupts.take(0);
    guest.offer_buffers(128);
    assert_eq!(guest.interrupts.take(0), 1);
    guest.until("all are accepted", |guest| guest.sockets.len() == 20);
    for stream in &streams {
        assert!(read_line(stream).starts_with("OK "));
    }
}

#[test]
fn an_idle_device_is_small() {
    assert!(size_of::<Vsock>() < 1024);
    let directory = tempfile::tempdir().unwrap();
    let vsock = Vsock::new(super::super::Listener::new(&directory.path().join("v")).unwrap()).unwrap();
    assert_eq!(vsock.queue_sizes().len(), 3);
    assert!(vsock.poll_fd().is_some());
    let span: u64 = vsock.queue_sizes().iter().map(|size| Driver::span(*size)).sum();
    assert!(span < 8192);
}
