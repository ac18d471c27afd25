//! Devices the host puts on, and takes off, PCI bus 0 while the guest runs.
//!
//! There is no hot-plug interrupt: the agent rescans the bus as part of the call that
//! needs a device, and removes it as part of the call that is done with it.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::patience::scaled;

/// How long a device may take from the rescan to what its driver makes of it.
const PROBE: Duration = Duration::from_secs(5);

/// The guest's PCI bus, as `sysfs` shows it.
#[derive(Debug)]
pub struct PciBus {
    root: PathBuf,
    // The kernel would serialise rescans anyway; this way one serves all who wait.
    scan: Mutex<()>,
}

impl PciBus {
    /// The bus below the given `sysfs`.
    pub fn new(sysfs: PathBuf) -> Self {
        Self { root: sysfs.join("bus/pci"), scan: Mutex::new(()) }
    }

    /// The device file of the disk in `slot`, looking for new devices if need be.
    /// Blocks, up to seconds.
    pub fn block_device(&self, slot: u32) -> Result<PathBuf> {
        self.find(slot, "virtio disk", "block").map(|name| PathBuf::from("/dev").join(name))
    }

    /// The name of the network interface in `slot`, looking for new devices if need be.
    /// Blocks, up to seconds.
    pub fn network_interface(&self, slot: u32) -> Result<String> {
        self.find(slot, "virtio network interface", "net")
    }

    /// Waits for the virtio-fs device in `slot`, looking for new devices if need be. Blocks,
    /// up to seconds.
    pub fn file_system(&self, slot: u32) -> Result<()> {
        self.find(slot, "virtio-fs device", "driver").map(drop)
    }

    /// What the driver of the device in `slot` made of it, by the name of its class.
    fn find(&self, slot: u32, kind: &'static str, class: &str) -> Result<String> {
        let device = self.device(slot)?;
        {
            let _scan = self.scan.lock().unwrap_or_else(PoisonError::into_inner);
            if !device.exists() {
                let rescan = self.root.join("rescan");
                fs::write(&rescan, "1").map_err(Error::path("rescan the PCI bus by", &rescan))?;
            }
        }
        let deadline = Instant::now() + scaled(PROBE);
        let mut pause = Duration::from_micros(200);
        loop {
            if let Some(name) = class_name(&device, class) {
                return Ok(name);
            }
            if Instant::now() >= deadline {
                let reason = if device.exists() {
                    "the device there is another, or has no driver"
                } else {
                    "the slot is empty after a rescan"
                };
                return Err(Error::Device { kind, slot, reason: reason.into() });
            }
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// Makes the kernel let go of the device in `slot`. A slot that is empty is fine.
    pub fn remove(&self, slot: u32) -> Result<()> {
        let remove = self.device(slot)?.join("remove");
        match fs::write(&remove, "1") {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::path("remove a device by", remove)(error)),
            _ => Ok(()),
        }
    }

    fn device(&self, slot: u32) -> Result<PathBuf> {
        if !(1..=31).contains(&slot) {
            return Err(Error::invalid("slot", format!("{slot} is not a device number of the bus; it has 1 to 31")));
        }
        Ok(self.root.join(format!("devices/0000:00:{slot:02x}.0")))
    }
}

/// The name of what a driver made of a PCI device: `virtio<N>/<class>/<name>`.
fn class_name(device: &std::path::Path, class: &str) -> Option<String> {
    let virtio = fs::read_dir(device)
        .ok()?
        .flatten()
        .find(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with("virtio")))?;
    if class == "driver" {
        let driver = fs::read_link(virtio.path().join(class)).ok()?;
        return driver.file_name().is_some_and(|name| name == "virtiofs").then(|| "virtiofs".to_owned());
    }
    let found = fs::read_dir(virtio.path().join(class)).ok()?.flatten().next()?;
    found.file_name().into_string().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus() -> (tempfile::TempDir, PciBus) {
        let sysfs = tempfile::tempdir().unwrap();
        fs::create_dir_all(sysfs.path().join("bus/pci/devices")).unwrap();
        fs::write(sysfs.path().join("bus/pci/rescan"), "").unwrap();
        let bus = PciBus::new(sysfs.path().to_owned());
        (sysfs, bus)
    }

    #[test]
    fn finds_the_disk_of_a_slot_by_its_hexadecimal_address() {
        let (sysfs, bus) = bus();
        fs::create_dir_all(sysfs.path().join("bus/pci/devices/0000:00:1e.0/virtio7/block/vdc")).unwrap();
        assert_eq!(bus.block_device(30).unwrap(), PathBuf::from("/dev/vdc"));
        assert_eq!(fs::read(sysfs.path().join("bus/pci/rescan")).unwrap(), b"", "no scan for what is there");
    }

    #[test]
    fn scans_for_a_device_that_is_not_there_yet() {
        let (sysfs, bus) = bus();
        let path = sysfs.path().to_owned();
        let host = std::thread::spawn(move || {
            while fs::read(path.join("bus/pci/rescan")).unwrap() != b"1" {
                sleep(Duration::from_millis(1));
            }
            fs::create_dir_all(path.join("bus/pci/devices/0000:00:05.0/virtio0/block/vda")).unwrap();
        });
        assert_eq!(bus.block_device(5).unwrap(), PathBuf::from("/dev/vda"));
        host.join().unwrap();
    }

    #[test]
    fn refuses_slots_that_no_bus_has() {
        let (_sysfs, bus) = bus();
        for slot in [0, 32, u32::MAX] {
            assert!(matches!(bus.block_device(slot), Err(Error::Invalid { .. })));
            assert!(matches!(bus.remove(slot), Err(Error::Invalid { .. })));
        }
    }

    #[test]
    fn removing_twice_is_fine() {
        let (sysfs, bus) = bus();
        let device = sysfs.path().join("bus/pci/devices/0000:00:05.0");
        fs::create_dir_all(&device).unwrap();
        bus.remove(5).unwrap();
        assert_eq!(fs::read(device.join("remove")).unwrap(), b"1");
        fs::remove_dir_all(&device).unwrap();
        bus.remove(5).unwrap();
    }
}
