//! The addresses a guest reaches devices at: I/O ports, and memory where there is no RAM.
//! Called on the processors' threads. What nobody answers reads as ones and swallows
//! writes.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};

use crate::console::Ring;
use crate::exit::{self, Exit};
use crate::layout;
use crate::pci::PciBus;

const SERIAL_PORTS: u16 = 8;
const KEYBOARD_RESET: u8 = 0xfe;

/// What became of a write to a port.
#[derive(Debug, PartialEq, Eq)]
pub enum PortWrite {
    /// The guest goes on.
    Done,
    /// It ended the machine.
    End(Exit),
}

/// The serial port's interrupt line: there is none. The kernel's messages, which are what
/// the port is for, are written by polling.
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// What the guest has set up on the bus itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BusState {
    /// The serial port's registers, in the order of [`SerialState`].
    serial: [u8; 9],
    pci_address: u32,
}

/// The whole of it.
pub struct Bus {
    serial: Mutex<Serial<NoInterrupt, NoEvents, Ring>>,
    pci: Arc<PciBus>,
}

impl Bus {
    /// A bus with a serial port that writes to `console`, and the devices of `pci`.
    pub fn new(console: Ring, pci: Arc<PciBus>) -> Self {
        Self { serial: Mutex::new(Serial::new(NoInterrupt, console)), pci }
    }

    /// What [`Bus::restore`] needs. What the guest was sent on its serial port, which is
    /// nothing, is not part of it.
    pub fn state(&self) -> BusState {
        let state = self.serial.lock().unwrap_or_else(PoisonError::into_inner).state();
        BusState {
            serial: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            pci_address: self.pci.address(),
        }
    }

    /// The same bus, as the guest of another has set it up; none if no guest can have.
    pub fn restore(console: Ring, pci: Arc<PciBus>, state: &BusState) -> Option<Self> {
        let [low, high, enable, identification, line_control, line_status, modem_control, modem_status, scratch] =
            state.serial;
        let serial = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: Vec::new(),
        };
        pci.set_address(&state.pci_address.to_le_bytes());
        let serial = Serial::from_state(&serial, NoInterrupt, NoEvents, console).ok()?;
        Some(Self { serial: Mutex::new(serial), pci })
    }

    /// The guest wrote `data` to `port`; several items of a string instruction follow
    /// each other in it.
    pub fn write_port(&self, port: u16, data: &[u8]) -> PortWrite {
        let first = data.first().copied().unwrap_or_default();
        match port {
            layout::PCI_CONFIG_DATA..=0xcff => self.pci.write_config(port - layout::PCI_CONFIG_DATA, data),
            layout::PCI_CONFIG_ADDRESS => self.pci.write_config_address(data),
            layout::PCI_PORTS.. => self.pci.write_port(port, data),
            layout::SERIAL_PORT..0x400 => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                for byte in data {
                    // The ring has no way to fail.
                    let _ = serial.write((port - layout::SERIAL_PORT) as u8, *byte);
                }
            }
            layout::KEYBOARD_PORT if first == KEYBOARD_RESET => return PortWrite::End(Exit::Reset),
            exit::POWER_PORT if first == exit::POWER_OFF => return PortWrite::End(Exit::PoweredOff),
            _ => {}
        }
        PortWrite::Done
    }

    /// The guest reads `data.len()` bytes from `port`.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            layout::PCI_CONFIG_DATA..=0xcff => self.pci.read_config(port - layout::PCI_CONFIG_DATA, data),
            layout::PCI_CONFIG_ADDRESS => self.pci.read_config_address(data),
            layout::PCI_PORTS.. => self.pci.read_port(port, data),
            layout::SERIAL_PORT..0x400 => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                for byte in data {
                    *byte = serial.read((port - layout::SERIAL_PORT) as u8);
                }
            }
            // An idle controller: ready for the next command, nothing to fetch.
            layout::KEYBOARD_PORT => data.fill(0),
            _ => {}
        }
    }

    /// The guest wrote to memory that is not RAM.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        self.pci.write_memory(address, data);
    }

    /// The guest reads memory that is not RAM.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.pci.read_memory(address, data);
    }
}

const _: () = assert!(layout::SERIAL_PORT + SERIAL_PORTS == 0x400);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console;
    use crate::interrupts::Routes;

    fn bus() -> (tempfile::TempDir, Bus) {
        let dir = tempfile::tempdir().unwrap();
        let ring = Ring::create(&dir.path().join("console"), console::SIZE).unwrap();
        let vm = Arc::new(crate::machine::create_vm().unwrap().1);
        let pci = Arc::new(PciBus::new(Arc::new(Routes::new(vm))));
        (dir, Bus::new(ring, pci))
    }

    #[test]
    fn the_serial_port_fills_the_console() {
        let (dir, bus) = bus();
        for byte in b"hello\n" {
            assert_eq!(bus.write_port(layout::SERIAL_PORT, &[*byte]), PortWrite::Done);
        }
        bus.write_port(layout::SERIAL_PORT, b"string instruction");
        assert_eq!(console::tail(&dir.path().join("console"), 5).unwrap(), ["hello", "string instruction"]);
    }

    #[test]
    fn the_guest_can_end_the_machine_in_two_ways() {
        let (_dir, bus) = bus();
        assert_eq!(bus.write_port(0x64, &[0xfe]), PortWrite::End(Exit::Reset));
        assert_eq!(bus.write_port(exit::POWER_PORT, &[exit::POWER_OFF]), PortWrite::End(Exit::PoweredOff));
        assert_eq!(bus.write_port(0x64, &[0xd1]), PortWrite::Done);
        assert_eq!(bus.write_port(exit::POWER_PORT, &[0]), PortWrite::Done);
        assert_eq!(bus.write_port(exit::POWER_PORT, &[]), PortWrite::Done);
    }

    #[test]
    fn nobody_home_reads_as_ones() {
        let (_dir, bus) = bus();
        let mut data = [0; 4];
        bus.read_port(0x1f0, &mut data);
        assert_eq!(data, [0xff; 4]);
        let mut data = [0; 8];
        bus.read_memory(0xdead_beef, &mut data);
        assert_eq!(data, [0xff; 8]);
        bus.write_memory(0xdead_beef, &data);
    }
}
