//! The device as a guest's driver sees it.

use std::fs::File;
use std::io::{IoSliceMut, Read, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::io::{ReadWriteFlags, preadv2};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{Block, Disk};
use crate::devices::virtio::device::{DeviceError, VirtioDevice};
use crate::devices::virtio::testing::{Buffer, Driver, FEATURES, Interrupts, activation, memory, readable, writable};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the status byte holds before the device writes it.
const UNTOUCHED: u8 = 0xaa;

const MEMORY: usize = 0x40_0000;
const RINGS: u64 = 0x1000;
const HEADER: u64 = 0x10_000;
const STATUS: u64 = 0x10_400;
const DATA: u64 = 0x20_000;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

struct Guest {
    block: Block,
    notification: EventFd,
    driver: Driver,
    memory: GuestMemoryMmap,
    interrupts: Arc<Interrupts>,
}

impl Guest {
    fn new(disk: Disk) -> Self {
        Self::with_features(disk, FEATURES | 1 << VIRTIO_BLK_F_FLUSH)
    }

    fn with_features(disk: Disk, features: u64) -> Self {
        let memory = memory(MEMORY);
        let driver = Driver::new(&memory, RINGS, 128);
        let interrupts = Arc::new(Interrupts::default());
        let (mut block, notification) = device(disk);
        block.activate(activation(&memory, &[&driver], features, &interrupts)).unwrap();
        Self { block, notification, driver, memory, interrupts }
    }

    /// Notifies the device, and waits until it has given back all that is available.
    fn notify(&mut self) -> Result<(), DeviceError> {
        self.notification.write(1).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while self.driver.used_index() != self.driver.available_index() {
            self.block.poll_ready()?;
            assert!(Instant::now() < deadline, "the device does not answer");
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// The interrupts for what was given back, of which there is one at least.
    fn interrupts(&self) -> u32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.interrupts.take(0) {
                0 => assert!(Instant::now() < deadline, "no interrupt"),
                count => return count,
            }
            std::thread::yield_now();
        }
    }

    /// Waits until the device wants to be notified of the last `added` chains.
    fn wanted(&self, added: u16) {
        let deadline = Instant::now() + PATIENCE;
        while !self.driver.wants_notification(added) {
            assert!(Instant::now() < deadline, "the device does not ask for a notification");
            std::thread::yield_now();
        }
    }

    /// Writes a header, makes header, `data` and status available, and returns the status.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
        self.header(kind, sector);
        let mut chain = vec![readable(HEADER, 16)];
        chain.extend(data);
        chain.push(writable(STATUS, 1));
        self.submit(&chain).unwrap().0
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
    }

    /// Makes a chain available and returns the status byte and how much was written.
    fn submit(&mut self, chain: &[Buffer]) -> Result<(u8, u32), DeviceError> {
        self.memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
        let head = self.driver.add(chain);
        self.notify()?;
        let (used, written) = self.driver.take().unwrap();
        assert_eq!(used, head);
        Ok((self.memory.read_obj(GuestAddress(STATUS)).unwrap(), written))
    }

    fn fill(&self, at: u64, value: u8, length: usize) {
        self.memory.write_slice(&vec![value; length], GuestAddress(at)).unwrap();
    }

    fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn ranges(&self, ranges: &[(u64, u32, u32)]) -> Buffer {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        readable(DATA, bytes.len() as u32)
    }
}

/// A device, and what its driver notifies it by.
fn device(disk: Disk) -> (Block, EventFd) {
    let mut block = Block::new(disk).unwrap();
    let notification = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let notifications = [notification.try_clone().unwrap()];
    assert!(block.take_notifications(&notifications).unwrap());
    (block, notification)
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut file = file.try_clone().unwrap();
    let mut content = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut content).unwrap();
    content
}

/// A writable disk of `sectors` sectors, each filled with its number, and its file.
fn scratch(sectors: u8) -> (Guest, File) {
    let file = file(&(0..sectors).flat_map(|sector| [sector; 512]).collect::<Vec<_>>());
    (Guest::new(Disk::new(vec![file.try_clone().unwrap()], false).unwrap()), file)
}

#[test]
fn what_is_written_is_read_back_and_in_the_file() {
    let (mut guest, file) = scratch(16);
    guest.fill(DATA, 0xee, 512);
    guest.fill(DATA + 0x8000, 0xdd, 512);
    assert_eq!(guest.request(OUT, 3, &[readable(DATA, 512), readable(DATA + 0x8000, 512)]), OK);
    assert_eq!(guest.request(FLUSH, 0, &[]), OK);
    assert_eq!(content(&file)[3 * 512..5 * 512], [[0xee; 512], [0xdd; 512]].concat());

    // In uneven pieces, with an empty one among them, across the hole in the guest's memory.
    let pieces = [writable(DATA, 1), writable(1 << 32, 1000), writable(DATA, 0), writable(DATA + 1, 1559)];
    guest.header(IN, 2);
    let mut chain = vec![readable(HEADER, 16)];
    chain.extend(pieces);
    chain.push(writable(STATUS, 1));
    assert_eq!(guest.submit(&chain).unwrap(), (OK, 2561));
    let read = [guest.bytes(DATA, 1), guest.bytes(1 << 32, 1000), guest.bytes(DATA + 1, 1559)].concat();
    assert_eq!(read[..512], [2; 512]);
    assert_eq!(read[512..1024], [0xee; 512]);
    assert_eq!(read[1024..1536], [0xdd; 512]);
    assert_eq!(read[1536..2048], [5; 512]);
    let metrics = guest.block.metrics();
    assert_eq!(metrics.write_bytes.load(Ordering::Relaxed), 1024);
    assert_eq!(metrics.flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn what_is_flushed_has_to_last_unless_nobody_looks_at_it_later() {
    let disk = |read_only, volatile| Disk::new(vec![file(&[0; 4096])], read_only).unwrap().volatile(volatile);
    assert!(disk(false, false).has_to_last());
    assert!(!disk(false, true).has_to_last());
    assert!(!disk(true, false).has_to_last());
    // The guest reads back what it wrote, and is told that it is flushed.
    let mut guest = Guest::new(disk(false, true));
    guest.fill(DATA, 0xee, 512);
    assert_eq!(guest.request(OUT, 3, &[readable(DATA, 512)]), OK);
    assert_eq!(guest.request(FLUSH, 0, &[]), OK);
    assert_eq!(guest.request(IN, 3, &[writable(DATA + 512, 512)]), OK);
    assert_eq!(guest.bytes(DATA + 512, 512), [0xee; 512]);
}

#[test]
fn a_read_only_disk_is_its_files_with_zeros_between() {
    let files = vec![file(&[1; 4096]), file(&[2; 5000]), file(&[]), file(&[3; 100])];
    let mut guest = Guest::new(Disk::new(files, true).unwrap());
    guest.fill(DATA, 0xff, 16384);
    assert_eq!(guest.request(IN, 0, &[writable(DATA, 10000), writable(DATA + 10000, 6384)]), OK);
    let expected = [vec![1; 4096], vec![2; 5000], vec![0; 3192], vec![3; 100], vec![0; 3996]].concat();
    assert_eq!(guest.bytes(DATA, 16384), expected);
    // A read within the padding alone.
    guest.fill(DATA, 0xff, 512);
    assert_eq!(guest.request(IN, 23, &[writable(DATA, 512)]), OK);
    assert_eq!(guest.bytes(DATA, 512), [0; 512]);
    assert_eq!(guest.request(IN, 31, &[writable(DATA, 1024)]), IOERR);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let disk = file(&[7; 8192]);
    let mut guest = Guest::new(Disk::new(vec![disk.try_clone().unwrap()], true).unwrap());
    assert_ne!(guest.block.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(guest.block.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    assert_eq!(guest.request(OUT, 0, &[readable(DATA, 512)]), IOERR);
    for kind in [DISCARD, WRITE_ZEROES] {
        let ranges = guest.ranges(&[(0, 8, 0)]);
        assert_eq!(guest.request(kind, 0, &[ranges]), IOERR);
    }
    assert_eq!(guest.request(FLUSH, 0, &[]), OK);
    assert_eq!(content(&disk), [7; 8192]);
}

#[test]
fn requests_beyond_the_disk_or_not_in_sectors_fail() {
    let (mut guest, file) = scratch(8);
    let before = content(&file);
    for sector in [8, 7, 1 << 40, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1] {
        assert_eq!(guest.request(IN, sector, &[writable(DATA, 1024)]), IOERR, "{sector}");
        assert_eq!(guest.request(OUT, sector, &[readable(DATA, 1024)]), IOERR, "{sector}");
    }
    assert_eq!(guest.request(OUT, 0, &[readable(DATA, 511)]), IOERR);
    assert_eq!(guest.request(IN, 0, &[writable(DATA, 513)]), IOERR);
    assert_eq!(content(&file), before);
    assert_eq!(guest.block.metrics().errors.load(Ordering::Relaxed), 14);
}

#[test]
fn the_id_is_cut_to_what_the_guest_gives_room_for() {
    let disk = Disk::new(vec![file(&[0; 4096])], true).unwrap().with_id("a-name-longer-than-20-bytes");
    let mut guest = Guest::new(disk);
    assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 20)]), OK);
    assert_eq!(guest.bytes(DATA, 21), b"a-name-longer-than-2\0");
    guest.fill(DATA, 9, 20);
    assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 4)]), OK);
    assert_eq!(guest.bytes(DATA, 5), b"a-na\x09");
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_free_their_space() {
    let disk = file(&vec![0xcc; 1 << 20]);
    let mut guest = Guest::new(Disk::new(vec![disk.try_clone().unwrap()], false).unwrap());
    let before = disk.metadata().unwrap().blocks();
    let ranges = guest.ranges(&[(0, 512, 0), (1024, 8, 0)]);
    assert_eq!(guest.request(DISCARD, 0, &[ranges]), OK);
    assert!(disk.metadata().unwrap().blocks() < before, "no space came back");
    let ranges = guest.ranges(&[(513, 2, 0)]);
    assert_eq!(guest.request(WRITE_ZEROES, 0, &[ranges]), OK);
    let ranges = guest.ranges(&[(1040, 8, 1)]);
    assert_eq!(guest.request(WRITE_ZEROES, 0, &[ranges]), OK);
    let ranges = guest.ranges(&[(9, 0, 0)]);
    assert_eq!(guest.request(WRITE_ZEROES, 0, &[ranges]), OK);

    let mut expected = vec![0xcc; 1 << 20];
    for (sector, sectors) in [(0, 512), (1024, 8), (513, 2), (1040, 8)] {
        expected[sector * 512..(sector + sectors) * 512].fill(0);
    }
    assert_eq!(content(&disk), expected);
    assert_eq!(disk.metadata().unwrap().len(), 1 << 20);
}

#[test]
fn bad_ranges_are_refused() {
    let (mut guest, file) = scratch(8);
    let before = content(&file);
    for (kind, ranges, status) in [
        (DISCARD, vec![(0, 1, 1)], UNSUPP),
        (DISCARD, vec![(0, 1, 2)], UNSUPP),
        (WRITE_ZEROES, vec![(0, 1, 0x8000_0000)], UNSUPP),
        (WRITE_ZEROES, vec![(0, 1, 0), (1, 1, 0)], IOERR),
        (WRITE_ZEROES, vec![(7, 2, 0)], IOERR),
        (WRITE_ZEROES, vec![(u64::MAX, 1, 0)], IOERR),
        (WRITE_ZEROES, vec![(0, u32::MAX, 0)], IOERR),
        (DISCARD, vec![(8, 1, 0)], IOERR),
        (DISCARD, vec![], IOERR),
        (DISCARD, vec![(0, 0, 0); 33], IOERR),
    ] {
        let buffer = guest.ranges(&ranges);
        assert_eq!(guest.request(kind, 0, &[buffer]), status, "{kind} {ranges:?}");
    }
    guest.ranges(&[(0, 1, 0)]);
    assert_eq!(guest.request(DISCARD, 0, &[readable(DATA, 15)]), IOERR);
    assert_eq!(content(&file), before);
}

#[test]
fn unknown_requests_are_unsupported_and_truncated_ones_fail() {
    let (mut guest, _) = scratch(8);
    assert_eq!(guest.request(2, 0, &[]), UNSUPP);
    assert_eq!(guest.request(u32::MAX, 0, &[writable(DATA, 64)]), UNSUPP);
    assert_eq!(guest.submit(&[readable(HEADER, 15), writable(STATUS, 1)]).unwrap(), (IOERR, 1));
    assert_eq!(guest.submit(&[writable(STATUS, 1)]).unwrap(), (IOERR, 1));
}

#[test]
fn a_header_may_come_in_pieces_and_the_status_with_the_data() {
    let (mut guest, _) = scratch(8);
    guest.header(IN, 6);
    let header: Vec<_> = (0..16).map(|byte| readable(HEADER + byte, 1)).collect();
    let chain = [header, vec![writable(STATUS - 512, 513)]].concat();
    assert_eq!(guest.submit(&chain).unwrap(), (OK, 513));
    assert_eq!(guest.bytes(STATUS - 512, 512), [6; 512]);
    // A trailing empty descriptor does not hide the status byte.
    let chain = [readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1), writable(STATUS + 1, 0)];
    assert_eq!(guest.submit(&chain).unwrap().0, OK);
}

#[test]
fn buffers_outside_of_memory_or_out_of_order_fail_the_request_only() {
    let (mut guest, _) = scratch(8);
    guest.header(IN, 0);
    let header = readable(HEADER, 16);
    let status = writable(STATUS, 1);
    for data in [
        writable(MEMORY as u64, 512),
        writable(MEMORY as u64 - 256, 512),
        writable(u64::MAX - 100, 512),
        writable((1 << 32) + MEMORY as u64 - 511, 512),
    ] {
        assert_eq!(guest.submit(&[header, data, status]).unwrap(), (IOERR, 1), "{data:?}");
    }
    assert_eq!(guest.submit(&[header, writable(DATA, 512), readable(DATA, 512), status]).unwrap(), (IOERR, 1));
    assert_eq!(guest.request(IN, 0, &[writable(DATA, 512)]), OK);
}

#[test]
fn a_chain_without_a_status_or_an_end_needs_a_reset() {
    let header = readable(HEADER, 16);
    for chain in [vec![header], vec![header, readable(DATA, 512)], vec![header, writable(1 << 40, 1)]] {
        let (mut guest, _) = scratch(8);
        guest.header(OUT, 0);
        assert!(guest.submit(&chain).is_err(), "{chain:?}");
    }
    // A loop, a link out of the table, an indirect table within an indirect table, one that
    // is not in memory, and one that is longer than any request.
    let (next, indirect) = (1, 4);
    let table = 0x18_0000;
    for (flags, link, address, length) in [
        (next, 0, HEADER, 16),
        (next, 128, HEADER, 16),
        (next, 65535, HEADER, 16),
        (indirect, 0, table, 16),
        (indirect, 0, 1 << 40, 16),
        (indirect, 0, table, 15),
        (indirect, 0, table, 0),
        (indirect, 0, table, !15),
        (indirect, 0, table + 0x1000, 16 * 1000),
    ] {
        let (mut guest, _) = scratch(8);
        Driver::descriptor_at(&guest.memory, table, table, 16, indirect, 0);
        for entry in 0..1000_u16 {
            let at = table + 0x1000 + 16 * u64::from(entry);
            Driver::descriptor_at(&guest.memory, at, DATA, 1, next, entry + 1);
        }
        guest.driver.descriptor(0, address, length, flags, link);
        guest.driver.push(0);
        let error = guest.notify().unwrap_err();
        assert!(error.to_string().starts_with("block: queue 0"), "{error}");
    }
}

#[test]
fn an_indirect_table_is_a_request_like_any_other() {
    let (mut guest, _) = scratch(8);
    guest.header(IN, 4);
    let table = 0x18_0000;
    Driver::descriptor_at(&guest.memory, table, HEADER, 16, 1, 1);
    Driver::descriptor_at(&guest.memory, table + 16, DATA, 512, 3, 2);
    Driver::descriptor_at(&guest.memory, table + 32, STATUS, 1, 2, 0);
    guest.driver.descriptor(9, table, 48, 4, 0);
    guest.driver.push(9);
    guest.notify().unwrap();
    assert_eq!(guest.driver.take(), Some((9, 513)));
    assert_eq!(guest.bytes(DATA, 512), [4; 512]);
}

#[test]
fn a_batch_from_memory_is_one_interrupt_and_the_rings_wrap() {
    let (mut guest, file) = scratch(8);
    // Where the file system cannot tell what is in memory, each request makes way for the next.
    let mut byte = [0; 1];
    let told = preadv2(&file, &mut [IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::NOWAIT).is_ok();
    guest.header(IN, 1);
    for round in 0..100 {
        for _ in 0..42 {
            guest.driver.add(&[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
        }
        guest.wanted(42);
        guest.notify().unwrap();
        let interrupts = guest.interrupts();
        assert!(interrupts == 1 || !told && interrupts <= 42, "round {round}: {interrupts}");
        assert_eq!(std::iter::from_fn(|| guest.driver.take()).count(), 42);
    }
}

#[test]
fn without_event_indices_every_batch_interrupts() {
    let memory = memory(MEMORY);
    let driver = Driver::new(&memory, RINGS, 128).without_event_index();
    let interrupts = Arc::new(Interrupts::default());
    let (mut block, notification) = device(Disk::new(vec![file(&[5; 4096])], true).unwrap());
    block.activate(activation(&memory, &[&driver], 1 << 32, &interrupts)).unwrap();
    let mut guest = Guest { block, notification, driver, memory, interrupts };
    guest.memory.write_slice(&[0; 16], GuestAddress(HEADER)).unwrap();
    for _ in 0..3 {
        guest.driver.add(&[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
        guest.wanted(1);
        guest.notify().unwrap();
        assert_eq!(guest.interrupts(), 1);
    }
}

#[test]
fn a_file_that_shrank_fails_the_read() {
    let disk = file(&[1; 8192]);
    let mut guest = Guest::new(Disk::new(vec![disk.try_clone().unwrap()], true).unwrap());
    disk.set_len(4096).unwrap();
    assert_eq!(guest.request(IN, 7, &[writable(DATA, 1024)]), IOERR);
    assert_eq!(guest.request(IN, 0, &[writable(DATA, 4096)]), OK);
}

#[test]
fn reset_forgets_the_queue_and_a_new_driver_starts_over() {
    let (mut guest, _) = scratch(8);
    assert_eq!(guest.request(FLUSH, 0, &[]), OK);
    guest.block.reset();
    guest.driver.add(&[readable(HEADER, 16), writable(STATUS, 1)]);
    guest.notification.write(1).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !guest.block.is_reset() {
        assert!(Instant::now() < deadline, "the threads do not end");
        std::thread::yield_now();
    }
    assert_eq!(guest.driver.take(), None);
    guest.driver = Driver::new(&guest.memory, RINGS + 0x4000, 128);
    let queues = activation(&guest.memory, &[&guest.driver], FEATURES, &guest.interrupts);
    guest.block.activate(queues).unwrap();
    assert_eq!(guest.request(FLUSH, 0, &[]), OK);
}

#[test]
fn rings_outside_of_memory_are_refused() {
    let memory = memory(MEMORY);
    let driver = Driver::new(&memory, MEMORY as u64 - Driver::span(128), 128);
    let interrupts = Arc::new(Interrupts::default());
    let activate = |driver: &Driver| {
        let (mut block, _) = device(Disk::new(vec![file(&[5; 4096])], true).unwrap());
        block.activate(activation(&memory, &[driver], FEATURES, &interrupts))
    };
    activate(&driver).unwrap();
    for base in [MEMORY as u64 - 1024, MEMORY as u64 - 16, 1 << 40, u64::MAX - 4095] {
        let (low, high) = (Some(base as u32), Some((base >> 32) as u32));
        let mut queues = activation(&memory, &[&driver], FEATURES, &interrupts);
        virtio_queue::QueueT::set_used_ring_address(&mut queues.queues[0], low, high);
        virtio_queue::QueueT::set_desc_table_address(&mut queues.queues[0], low, high);
        let mut block = Block::new(Disk::new(vec![file(&[5; 4096])], true).unwrap()).unwrap();
        assert!(block.activate(queues).is_err(), "{base:#x}");
    }
    let mut queues = activation(&memory, &[&driver], FEATURES, &interrupts);
    virtio_queue::QueueT::set_ready(&mut queues.queues[0], false);
    let mut block = Block::new(Disk::new(vec![file(&[5; 4096])], true).unwrap()).unwrap();
    assert!(block.activate(queues).is_err());
}

#[test]
fn a_driver_without_flush_gets_durable_writes() {
    let disk = file(&[0; 4096]);
    let mut guest = Guest::with_features(Disk::new(vec![disk.try_clone().unwrap()], false).unwrap(), FEATURES);
    guest.fill(DATA, 1, 512);
    assert_eq!(guest.request(OUT, 0, &[readable(DATA, 512)]), OK);
    let mut read = [0; 512];
    disk.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(read, [1; 512]);
}

/// Descriptors that are wrong now and then.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        4 => Just(HEADER), 2 => Just(STATUS), 4 => DATA..DATA + 0x8000,
        1 => Just((1_u64 << 32) - 64), 1 => any::<u64>(), 1 => Just(MEMORY as u64 - 100), 1 => RINGS..RINGS + 4096,
    ];
    let length = prop_oneof![3 => Just(16_u32), 3 => Just(1), 4 => Just(512), 2 => 0_u32..5000, 1 => any::<u32>()];
    (address, length, 0_u16..8, prop_oneof![9 => 0_u16..16, 1 => any::<u16>()])
}

proptest! {
    #[test]
    fn random_chains_never_panic_nor_change_what_lies_around_the_disk(
        descriptors in proptest::collection::vec(descriptor(), 16),
        kind in prop_oneof![Just(IN), Just(OUT), Just(FLUSH), Just(GET_ID), Just(DISCARD), Just(WRITE_ZEROES), any::<u32>()],
        sector in prop_oneof![0_u64..20, any::<u64>()],
        heads in proptest::collection::vec(prop_oneof![9 => 0_u16..16, 1 => any::<u16>()], 1..8),
        available in prop_oneof![4 => Just(None), 1 => any::<u16>().prop_map(Some)],
        read_only in any::<bool>(),
    ) {
        let disk = file(&[0x11; 8192]);
        let mut guest = Guest::new(Disk::new(vec![disk.try_clone().unwrap()], read_only).unwrap());
        guest.header(kind, sector);
        for (index, (address, length, flags, next)) in (0..).zip(descriptors) {
            guest.driver.descriptor(index, address, length, flags, next);
        }
        for head in heads {
            guest.driver.push(head);
        }
        if let Some(index) = available {
            guest.driver.set_available_index(index);
        }
        let _ = guest.notify();
        prop_assert_eq!(disk.metadata().unwrap().len(), 8192);
        if read_only {
            prop_assert_eq!(content(&disk), vec![0x11; 8192]);
        }
    }
}
