//! Packets and queues that no honest driver sends.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{Guest, PATIENCE, Ports, RX_BUFFER, connect, read_rest};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::testing::{Driver, readable, writable};
use crate::devices::virtio::vsock::device::BATCH;
use crate::devices::virtio::vsock::muxer::RESETS_LIMIT;
use crate::devices::virtio::vsock::packet::{HEADER_SIZE, Header, SHUTDOWN_SEND, op};

const PORTS: Ports = (80, 1234);

#[test]
fn packets_of_unknown_streams_are_reset_and_resets_are_not() {
    let mut guest = Guest::new();
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 77] {
        guest.packets.clear();
        guest.send_raw(Guest::header(PORTS, op), &[]).unwrap();
        guest.settle();
        assert!(guest.reset_of(PORTS), "{op}");
        assert_eq!(guest.packets.len(), 1);
    }
    guest.packets.clear();
    guest.send_raw(Guest::header(PORTS, op::RST), &[]).unwrap();
    guest.settle();
    assert_eq!(guest.packets, []);
}

#[test]
fn other_addresses_and_types_lead_nowhere() {
    let mut guest = Guest::new();
    let _listener = UnixListener::bind(guest.listener_path(PORTS.1)).unwrap();
    let request = Guest::header(PORTS, op::REQUEST);
    // From somebody else: no answer.
    guest.send_raw(Header { src_cid: 4, ..request }, &[]).unwrap();
    guest.settle();
    assert_eq!(guest.packets, []);
    // To somebody else: a reset in their name.
    guest.send_raw(Header { dst_cid: 9, ..request }, &[]).unwrap();
    guest.settle();
    assert_eq!((guest.packets[0].op, guest.packets[0].src_cid), (op::RST, 9));
    assert_eq!(guest.vsock.metrics().bad_packets.load(Relaxed), 2);
    assert_eq!(guest.vsock.metrics().opened.load(Relaxed), 0);
}

#[test]
fn a_packet_that_does_not_fit_the_streams_state_ends_it() {
    for (op, flags) in [(op::RESPONSE, 0), (0, 0), (99, 0)] {
        let mut guest = Guest::new();
        guest.listening.insert(80);
        let (stream, ports) = connect(&mut guest, 80);
        guest.send(ports, op, flags, &[]);
        guest.until("a reset comes", |guest| guest.sockets[&ports].reset);
        assert_eq!(read_rest(&stream), b"", "{op}");
    }
    // Data after the end of data.
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (stream, ports) = connect(&mut guest, 80);
    guest.shut_down(ports, SHUTDOWN_SEND);
    guest.send(ports, op::RW, 0, b"late");
    guest.until("a reset comes", |guest| guest.sockets[&ports].reset);
    assert_eq!(read_rest(&stream), b"");
}

#[test]
fn a_second_request_replaces_the_first() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.listener_path(9)).unwrap();
    guest.connect((80, 9));
    guest.until("the host accepts", |guest| guest.sockets[&(80, 9)].open);
    let (first, _) = listener.accept().unwrap();
    guest.connect((80, 9));
    guest.until("the host accepts", |guest| guest.sockets[&(80, 9)].open);
    let (mut second, _) = listener.accept().unwrap();
    assert_eq!(read_rest(&first), b"");
    guest.write((80, 9), b"x");
    second.read_exact(&mut [0]).unwrap();
}

#[test]
fn a_guest_that_ignores_its_credit_is_cut_off_at_its_share() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (_stream, ports) = connect(&mut guest, 80);
    let data = vec![1; 64 * 1024];
    let mut sent = 0;
    while !guest.sockets[&ports].reset {
        guest.send(ports, op::RW, 0, &data);
        sent += data.len();
        guest.take_packets();
        assert!(sent < 4 << 20, "{sent} bytes were taken");
    }
}

#[test]
fn credit_that_cannot_be_gives_the_guest_nothing() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (mut stream, ports) = connect(&mut guest, 80);
    // What it answers when it is asked.
    guest.sockets.get_mut(&ports).unwrap().room = 0;
    for (buf_alloc, fwd_cnt) in [(0, 0), (100, 1), (u32::MAX - 1, 1), (0, u32::MAX)] {
        guest.send_raw(Header { buf_alloc, fwd_cnt, ..Guest::header(ports, op::CREDIT_UPDATE) }, &[]).unwrap();
    }
    stream.write_all(b"data").unwrap();
    guest.settle();
    assert_eq!(guest.sockets[&ports].received.len(), 0);
}

#[test]
fn lengths_that_lie_are_dropped() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (mut stream, ports) = connect(&mut guest, 80);
    for len in [5, 64 * 1024, u32::MAX] {
        guest.send_raw(Header { len, ..Guest::header(ports, op::RW) }, b"four").unwrap();
    }
    assert_eq!(guest.vsock.metrics().bad_packets.load(Relaxed), 3);
    // A length that says less is what counts.
    guest.send_raw(Header { len: 2, ..Guest::header(ports, op::RW) }, b"four").unwrap();
    let mut data = [0; 2];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"fo");
}

#[test]
fn useless_buffers_are_given_back_and_headers_may_come_in_pieces() {
    let mut guest = Guest::inactive(None);
    guest.activate().unwrap();
    let at = 0x48_0000;
    let small = guest.to_guest.add(&[writable(at, HEADER_SIZE as u32)]);
    let foreign = guest.to_guest.add(&[writable(1 << 40, RX_BUFFER)]);
    let wrong = guest.to_guest.add(&[readable(at, RX_BUFFER)]);
    let pieces: Vec<_> = (0..8).map(|piece| writable(at + piece * 7, 7)).collect();
    let good = guest.to_guest.add(&pieces);
    guest.send_raw(Guest::header(PORTS, op::RW), &[]).unwrap();
    for useless in [small, foreign, wrong] {
        assert_eq!(guest.to_guest.take(), Some((useless, 0)));
    }
    assert_eq!(guest.to_guest.take(), Some((good, HEADER_SIZE as u32)));
    let mut bytes = [0; HEADER_SIZE];
    guest.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    assert_eq!(Header::from_bytes(&bytes).op, op::RST);

    // From the guest as well.
    let header = Guest::header((81, 9), op::RW);
    guest.memory.write_slice(&header.to_bytes(), GuestAddress(at + 0x1000)).unwrap();
    let pieces: Vec<_> = (0..11).map(|piece| readable(at + 0x1000 + piece * 4, 4)).collect();
    guest.from_guest.add(&pieces);
    guest.from_guest.add(&[readable(at + 0x1000, 43)]);
    guest.vsock.queue_notified(1).unwrap();
    assert_eq!(guest.vsock.metrics().bad_packets.load(Relaxed), 1);
}

#[test]
fn resets_that_nobody_fetches_do_not_pile_up() {
    let mut guest = Guest::inactive(None);
    guest.activate().unwrap();
    for port in 0..RESETS_LIMIT as u32 + 50 {
        guest.send_raw(Guest::header((port, 1), op::RW), &[]).unwrap();
    }
    assert_eq!(guest.vsock.metrics().dropped_resets.load(Relaxed), 50);
}

#[test]
fn a_guest_that_fetches_nothing_does_not_make_the_queue_grow() {
    let mut guest = Guest::inactive(None);
    guest.activate().unwrap();
    let listener = UnixListener::bind(guest.listener_path(9)).unwrap();
    for _ in 0..300 {
        guest.send_raw(Guest::header((80, 9), op::REQUEST), &[]).unwrap();
        drop(listener.accept().unwrap());
    }
    assert_eq!(guest.vsock.metrics().opened.load(Relaxed), 300);
    assert_eq!(guest.vsock.muxer().ready_count(), 1);
}

#[test]
fn an_endless_chain_ends_all_streams_and_asks_for_a_reset() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let (stream, _) = connect(&mut guest, 80);
    guest.from_guest.descriptor(5, 0x8000, 44, 1, 5);
    guest.from_guest.push(5);
    let error = guest.vsock.queue_notified(1).unwrap_err();
    assert!(error.to_string().starts_with("vsock: queue 1"), "{error}");
    assert_eq!(read_rest(&stream), b"");
}

/// What a guest may do, sensible or not.
#[derive(Debug, Clone)]
enum Step {
    Packet { stream: u8, op: u16, flags: u32, data: usize, lie: Option<u32>, buf_alloc: u32, fwd_cnt: u32 },
    Connect(u8),
    HostConnects,
    HostWrites(u8, usize),
    HostReads(u8),
    HostCloses(u8),
    HostShutsDown(u8, bool),
    GuestReads(u8),
    Turn,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let credit = prop_oneof![Just(super::guest::ROOM), Just(0), any::<u32>()];
    let packet = (
        any::<u8>(),
        prop_oneof![Just(op::RW), Just(op::SHUTDOWN), Just(op::RST), Just(op::RESPONSE), 0_u16..9, any::<u16>()],
        prop_oneof![0_u32..4, any::<u32>()],
        prop_oneof![0_usize..100, Just(60_000)],
        prop_oneof![4 => Just(None), 1 => any::<u32>().prop_map(Some)],
        credit,
        prop_oneof![Just(0), any::<u32>()],
    );
    prop_oneof![
        6 => packet.prop_map(|(stream, op, flags, data, lie, buf_alloc, fwd_cnt)| {
            Step::Packet { stream, op, flags, data, lie, buf_alloc, fwd_cnt }
        }),
        2 => any::<u8>().prop_map(Step::Connect),
        2 => Just(Step::HostConnects),
        2 => (any::<u8>(), 0_usize..100_000).prop_map(|(stream, size)| Step::HostWrites(stream, size)),
        2 => any::<u8>().prop_map(Step::HostReads),
        1 => any::<u8>().prop_map(Step::HostCloses),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(stream, write)| Step::HostShutsDown(stream, write)),
        2 => any::<u8>().prop_map(Step::GuestReads),
        3 => Just(Step::Turn),
        1 => Just(Step::Reset),
    ]
}

fn run(steps: Vec<Step>) {
    let mut guest = Guest::new();
    guest.lenient = true;
    guest.listening.insert(80);
    let listener = UnixListener::bind(guest.listener_path(9)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut streams: Vec<UnixStream> = Vec::new();
    for step in steps {
        let pick = |which: u8, count: usize| (count > 0).then(|| usize::from(which) % count.max(1));
        match step {
            Step::Packet { stream, op, flags, data, lie, buf_alloc, fwd_cnt } => {
                let known: Vec<Ports> = guest.sockets.keys().copied().collect();
                let ports = pick(stream, known.len()).map_or(PORTS, |index| known[index]);
                let len = lie.unwrap_or(data as u32);
                let header = Header { flags, len, buf_alloc, fwd_cnt, ..Guest::header(ports, op) };
                guest.send_raw(header, &vec![3; data]).unwrap();
            }
            Step::Connect(port) => guest.connect((u32::from(port), 9)),
            Step::HostConnects => {
                let mut stream = UnixStream::connect(guest.path()).unwrap();
                stream.set_nonblocking(true).unwrap();
                stream.write_all(b"CONNECT 80\n").unwrap();
                streams.push(stream);
            }
            Step::HostWrites(which, size) => {
                if let Some(index) = pick(which, streams.len()) {
                    let _ = streams[index].write(&vec![5; size]);
                }
            }
            Step::HostReads(which) => {
                if let Some(index) = pick(which, streams.len()) {
                    let _ = streams[index].read(&mut vec![0; 100_000]);
                }
            }
            Step::HostCloses(which) => {
                if let Some(index) = pick(which, streams.len()) {
                    streams.swap_remove(index);
                }
            }
            Step::HostShutsDown(which, write) => {
                if let Some(index) = pick(which, streams.len()) {
                    let half = if write { std::net::Shutdown::Write } else { std::net::Shutdown::Read };
                    let _ = streams[index].shutdown(half);
                }
            }
            Step::GuestReads(which) => {
                let known: Vec<Ports> = guest.sockets.keys().copied().collect();
                if let Some(index) = pick(which, known.len()) {
                    guest.read(known[index], 50_000);
                }
            }
            Step::Turn => {
                guest.turn();
            }
            Step::Reset => guest.restart(),
        }
        while let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(true).unwrap();
            streams.push(stream);
        }
    }
    // Whatever happened, nothing of it is left, and the device still works.
    streams.clear();
    guest.restart();
    guest.settle();
    guest.until("nothing is left", |guest| guest.vsock.muxer().is_idle());
    let (mut stream, ports) = connect(&mut guest, 80);
    stream.write_all(b"still").unwrap();
    guest.until("data comes", |guest| guest.sockets[&ports].received.len() == 5);
}

#[test]
fn buffers_too_small_for_an_event_keep_nobody_for_longer_than_a_go() {
    let state = Guest::new().vsock.own_state();
    let mut guest = Guest::inactive(Some(&state));
    guest.events = Driver::new(&guest.memory, 0x4f_0000, 256);
    guest.activate().unwrap();
    let _feeder = guest.events.feed();
    let (mut all, begun) = (0, Instant::now());
    while all < 20_000 {
        let before = guest.events.used_index();
        guest.vsock.queue_notified(2).unwrap();
        let given_back = usize::from(guest.events.used_index().wrapping_sub(before));
        assert!(given_back <= BATCH, "{given_back} in one go");
        all += given_back;
        assert!(begun.elapsed() < PATIENCE, "the guest's other processor does nothing");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_order_of_events_leaves_a_working_device(steps in proptest::collection::vec(step(), 1..60)) {
        run(steps);
    }

    #[test]
    fn garbage_in_the_queues_never_panics(
        garbage in proptest::collection::vec(any::<u8>(), 2048),
        queue in 0_u64..3,
        heads in proptest::collection::vec(prop_oneof![3 => 0_u16..128, 1 => any::<u16>()], 1..20),
        index in prop_oneof![3 => Just(None), 1 => any::<u16>().prop_map(Some)],
    ) {
        let mut guest = Guest::inactive(None);
        guest.activate().unwrap();
        guest.memory.write_slice(&garbage, GuestAddress(0x1000 + 0x2000 * queue)).unwrap();
        let driver = match queue {
            0 => &mut guest.to_guest,
            1 => &mut guest.from_guest,
            _ => &mut guest.events,
        };
        for head in heads {
            driver.push(head);
        }
        if let Some(index) = index {
            driver.set_available_index(index);
        }
        let mut stream = UnixStream::connect(guest.path()).unwrap();
        stream.write_all(b"CONNECT 80\n").unwrap();
        for queue in 0..3 {
            let _ = guest.vsock.queue_notified(queue);
            let _ = guest.vsock.poll_ready();
        }
    }
}
