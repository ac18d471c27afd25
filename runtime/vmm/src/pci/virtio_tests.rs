use super::*;
use crate::devices::virtio::device::DeviceError;
use crate::memory;
use crate::pci::{BusError, PciBus};
use std::sync::atomic::{AtomicBool, AtomicUsize};

const SELECT_QUEUE: u16 = 22;
const STATUS: u16 = 20;

/// Counts what the transport asks of it, and fails when told to.
#[derive(Default)]
struct Calls {
    activated: AtomicUsize,
    reset: AtomicUsize,
    notified: AtomicUsize,
    fail: AtomicBool,
    /// Requests are under way that write to the driver's buffers.
    busy: AtomicBool,
}

struct Fake(Arc<Calls>);

impl VirtioDevice for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn device_type(&self) -> u16 {
        2
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }
    fn features(&self) -> u64 {
        1 << 32 | 1 << 5
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill((offset as u8).wrapping_add(0x10));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        assert_eq!(activation.queues.len(), 2);
        self.0.activated.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn reset(&mut self) {
        self.0.reset.fetch_add(1, Ordering::Relaxed);
    }
    fn is_reset(&mut self) -> bool {
        !self.0.busy.load(Ordering::Relaxed)
    }
    fn queue_notified(&mut self, _: u16) -> Result<(), DeviceError> {
        self.0.notified.fetch_add(1, Ordering::Relaxed);
        if self.0.fail.load(Ordering::Relaxed) {
            return Err(DeviceError { device: "fake", reason: "told to fail".into() });
        }
        Ok(())
    }
}

struct Setup {
    bus: PciBus,
    function: Arc<VirtioPci>,
    calls: Arc<Calls>,
}

fn setup() -> Setup {
    let vm = crate::machine::create_vm().unwrap().1;
    let bus = PciBus::new(Arc::new(Routes::new(Arc::new(vm))));
    let calls = Arc::new(Calls::default());
    let function = bus.add(Box::new(Fake(Arc::clone(&calls))), &memory::map(32).unwrap()).unwrap();
    Setup { bus, function, calls }
}

impl Setup {
    fn config(&self, register: u32) -> u32 {
        self.bus.write_config_address(&(1 << 31 | 1 << 11 | register & 0xfc).to_le_bytes());
        let mut data = [0xff; 4];
        self.bus.read_config(0, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_config(&self, register: u32, value: u32) {
        self.bus.write_config_address(&(1 << 31 | 1 << 11 | register & 0xfc).to_le_bytes());
        self.bus.write_config(0, &value.to_le_bytes());
    }

    fn status(&self) -> u8 {
        let mut data = [0];
        self.function.read_port(STATUS, &mut data);
        data[0]
    }

    fn put(&self, offset: u16, data: &[u8]) {
        self.function.write_port(offset, data);
    }

    /// What a driver does, up to DRIVER_OK, with queue 0 at `areas`.
    fn drive(&self, areas: u64) {
        self.set_config(4, 7);
        self.put(STATUS, &[0]);
        self.put(STATUS, &[3]);
        self.put(8, &1_u32.to_le_bytes());
        self.put(12, &1_u32.to_le_bytes());
        self.put(STATUS, &[0xb]);
        assert_eq!(self.status(), 0xb);
        self.put(SELECT_QUEUE, &0_u16.to_le_bytes());
        self.put(24, &32_u16.to_le_bytes());
        for (offset, area) in [(32, areas), (40, areas + 0x1000), (48, areas + 0x2000)] {
            self.put(offset, &(area as u32).to_le_bytes());
            self.put(offset + 4, &((area >> 32) as u32).to_le_bytes());
        }
        self.put(28, &1_u16.to_le_bytes());
        self.put(STATUS, &[0xf]);
    }

    fn calls(&self) -> (usize, usize) {
        (self.calls.activated.load(Ordering::Relaxed), self.calls.reset.load(Ordering::Relaxed))
    }
}

#[test]
fn a_scan_finds_the_bridge_and_the_device() {
    let setup = setup();
    assert_eq!(setup.config(0), 0x1042_1af4);
    assert_eq!(setup.config(0x10), 0x1201);
    assert_eq!(setup.config(0x14), 0xc000_1000);
    let find = |address: u32| {
        setup.bus.write_config_address(&address.to_le_bytes());
        let mut data = [0xff; 4];
        setup.bus.read_config(0, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(find(1 << 31) & 0xffff, 0x1af4, "the bridge");
    assert_eq!(find(1 << 31 | 8) >> 16, 0x0600);
    for nobody in [1 << 31 | 2 << 11, 1 << 31 | 1 << 11 | 1 << 8, 1 << 31 | 1 << 16 | 1 << 11, 1 << 11] {
        assert_eq!(find(nobody), u32::MAX, "{nobody:#x}");
    }
}

#[test]
fn a_driver_activates_and_resets() {
    let setup = setup();
    setup.drive(0x10_0000);
    assert_eq!(setup.calls(), (1, 0));
    assert_eq!(setup.function.connected_ports(), Some(0x1200));
    setup.function.queue_notified(0);
    assert_eq!(setup.calls.notified.load(Ordering::Relaxed), 1);
    setup.put(STATUS, &[0]);
    assert_eq!(setup.calls(), (1, 1));
    assert_eq!((setup.status(), setup.function.connected_ports()), (0, None));
    setup.function.queue_notified(0);
    assert_eq!(setup.calls.notified.load(Ordering::Relaxed), 1, "a notification after the reset is stale");
    setup.drive(0x10_0000);
    assert_eq!(setup.calls(), (2, 1));
}

#[test]
fn a_driver_sees_its_reset_done_when_nothing_writes_to_its_buffers() {
    let setup = setup();
    setup.drive(0x10_0000);
    setup.calls.busy.store(true, Ordering::Relaxed);
    setup.put(STATUS, &[0]);
    assert_eq!(setup.status(), 0xf);
    // One that does not wait for that is not heard.
    setup.put(STATUS, &[0xf]);
    setup.put(STATUS, &[0]);
    assert_eq!((setup.status(), setup.calls()), (0xf, (1, 1)));
    setup.calls.busy.store(false, Ordering::Relaxed);
    assert_eq!(setup.status(), 0);
    setup.drive(0x10_0000);
    assert_eq!(setup.calls(), (2, 1));
    // Taken off the bus, it is not waited for.
    setup.calls.busy.store(true, Ordering::Relaxed);
    setup.bus.remove(1).unwrap();
    assert_eq!(setup.calls(), (2, 2));
}

#[test]
fn notifications_follow_the_range() {
    let setup = setup();
    setup.drive(0x10_0000);
    setup.set_config(0x10, 0x4000);
    assert_eq!(setup.function.connected_ports(), Some(0x4000));
    assert_eq!(setup.function.port_offset(0x4080), Some(0x80));
    assert_eq!(setup.function.port_offset(0x1280), None);
    setup.set_config(4, 6);
    assert_eq!(setup.function.connected_ports(), None, "the function does not answer to ports now");
    setup.set_config(0x14, 0xd000_0000);
    assert_eq!(setup.function.memory_offset(0xd000_0ffc), Some(0xffc));
    assert_eq!(setup.function.memory_offset(0xd000_1000), None);
    setup.set_config(4, 7);
    assert_eq!(setup.function.connected_ports(), Some(0x4000));
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let setup = setup();
    setup.put(STATUS, &[3]);
    setup.put(8, &1_u32.to_le_bytes());
    setup.put(12, &1_u32.to_le_bytes());
    setup.put(8, &0_u32.to_le_bytes());
    setup.put(12, &0x60_u32.to_le_bytes());
    setup.put(STATUS, &[0xb]);
    assert_eq!(setup.status(), 3, "FEATURES_OK does not stick");
    setup.put(STATUS, &[0xf]);
    assert_eq!(setup.calls(), (0, 0), "and the device does not start");
}

#[test]
fn a_senseless_queue_marks_the_device() {
    for areas in [0x7fff_0000_0000, 0x200_0000 - 0x1000, 1] {
        let setup = setup();
        setup.drive(areas);
        assert_eq!(setup.calls.activated.load(Ordering::Relaxed), 0);
        assert_eq!(setup.status() & 0x40, 0x40, "areas at {areas:#x}");
    }
}

#[test]
fn a_failed_handler_marks_the_device_until_its_reset() {
    let setup = setup();
    setup.drive(0x10_0000);
    setup.calls.fail.store(true, Ordering::Relaxed);
    setup.function.queue_notified(0);
    assert_eq!(setup.status(), 0x4f);
    assert_eq!(setup.calls(), (1, 1));
    setup.function.queue_notified(0);
    assert_eq!(setup.calls.notified.load(Ordering::Relaxed), 1);
    setup.calls.fail.store(false, Ordering::Relaxed);
    setup.drive(0x10_0000);
    assert_eq!((setup.status(), setup.calls().0), (0xf, 2));
}

#[test]
fn the_window_reaches_the_registers() {
    let setup = setup();
    let mut capability = setup.config(0x34) & 0xff;
    while setup.config(capability) >> 24 != u32::from(STRUCTURE_WINDOW) || setup.config(capability) & 0xff != 9 {
        capability = setup.config(capability) >> 8 & 0xff;
        assert_ne!(capability, 0);
    }
    setup.set_config(capability + 8, u32::from(DEVICE_OFFSET) + 4);
    setup.set_config(capability + 12, 1);
    assert_eq!(setup.config(capability + 16) & 0xff, 0x14);
    setup.set_config(capability + 8, u32::from(STATUS));
    setup.set_config(capability + 16, 3);
    assert_eq!(setup.status(), 3);
    setup.set_config(capability + 12, 3);
    assert_eq!(setup.config(capability + 16), u32::MAX, "no access of three bytes");
}

#[test]
fn a_removed_device_is_gone_and_its_slot_free() {
    let Setup { bus, function, calls } = setup();
    let setup = Setup { bus, function, calls };
    setup.drive(0x10_0000);
    assert!(matches!(setup.bus.remove(9), Err(BusError::Empty(9))));
    assert!(matches!(setup.bus.remove(200), Err(BusError::Empty(200))));
    assert!(setup.bus.remove(0).is_err(), "the bridge stays");
    setup.bus.remove(1).unwrap();
    assert_eq!(setup.calls(), (1, 1));
    assert_eq!(setup.config(0), u32::MAX);
    assert_eq!(setup.function.port_offset(0x1200), None);
    let again = setup.bus.add(Box::new(Fake(Arc::default())), &memory::map(32).unwrap()).unwrap();
    assert_eq!(again.slot(), 1);
}

/// A processor that looked the function up before it was removed, and goes on writing to its registers afterwards.
#[test]
fn a_removed_device_is_not_activated_and_leaves_no_notifications_behind() {
    let Setup { bus, function, calls } = setup();
    let setup = Setup { bus, function, calls };
    setup.drive(0x10_0000);
    setup.bus.remove(1).unwrap();
    let late = Arc::clone(&setup.function);
    for (offset, data) in [
        (STATUS, &[0_u8][..]),
        (STATUS, &[3]),
        (8, &1_u32.to_le_bytes()),
        (12, &1_u32.to_le_bytes()),
        (STATUS, &[0xb]),
        (SELECT_QUEUE, &0_u16.to_le_bytes()),
        (24, &32_u16.to_le_bytes()),
        (32, &0x10_0000_u32.to_le_bytes()),
        (40, &0x10_1000_u32.to_le_bytes()),
        (48, &0x10_2000_u32.to_le_bytes()),
        (28, &1_u16.to_le_bytes()),
        (STATUS, &[0xf]),
    ] {
        late.write_port(offset, data);
    }
    late.write_config(0x10, &0x4000_u32.to_le_bytes());
    late.write_config(4, &7_u32.to_le_bytes());
    assert_eq!((setup.calls(), late.connected_ports()), ((1, 1), None));
    // The ports are free for the next in its slot, wherever the late one was moved to.
    for ports in [0x1200, 0x4000] {
        let event = EventFd::new(0).unwrap();
        for address in notification_ports(ports).take(2) {
            setup.bus.vm().register_ioevent(&event, &IoEventAddress::Pio(address), NoDatamatch).unwrap();
        }
    }
}

#[test]
fn the_bus_holds_31_devices() {
    let setup = setup();
    let memory = memory::map(32).unwrap();
    for slot in 2..32 {
        assert_eq!(setup.bus.add(Box::new(Fake(Arc::default())), &memory).unwrap().slot(), slot);
    }
    assert!(matches!(setup.bus.add(Box::new(Fake(Arc::default())), &memory), Err(BusError::Full)));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn no_access_panics(accesses in proptest::collection::vec((0_u8..6, 0_u16..0x300, 0_usize..9, proptest::prelude::any::<u64>()), 0..60)) {
        let setup = setup();
        setup.set_config(4, 7);
        for (kind, place, length, value) in accesses {
            let mut data = value.to_le_bytes().to_vec();
            data.truncate(length);
            match kind {
                0 => setup.function.write_port(place, &data),
                1 => setup.function.read_port(place, &mut data),
                2 => setup.function.write_memory(u64::from(place) * 8, &data),
                3 => setup.function.read_memory(u64::from(place) * 8, &mut data),
                4 => setup.function.write_config(usize::from(place), &data),
                _ => setup.function.read_config(usize::from(place), &mut data),
            }
        }
    }
}
