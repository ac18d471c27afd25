//! The messages of the control socket.
//!
//! Both sides refuse fields and messages that they do not know. So what came later is left out where it says nothing, and
//! said only to a VMM that has named its feature ([`Request::Features`]).

use serde::{Deserialize, Serialize};

pub use crate::devices::virtio::fs::Access;

/// Longest message in bytes.
pub const MESSAGE_LIMIT: usize = 64 * 1024;
/// Most file descriptors beside one message.
pub const FD_LIMIT: usize = 250;

/// Feature: [`Request::AddDisk`], [`Request::AddNet`] and [`Request::RemoveDevice`] take an owner.
pub const FEATURE_OWNERS: &str = "owners";
/// Feature: [`Request::Devices`] is answered.
pub const FEATURE_DEVICES: &str = "devices";
/// Feature: [`Request::AddDisk`] may be told that a disk is volatile.
pub const FEATURE_VOLATILE: &str = "volatile";
/// Feature: [`Request::AddVolume`] tells of a volume that nothing is mounted below.
pub const FEATURE_PLAIN_VOLUMES: &str = "plain_volumes";
/// Longest name of an owner in bytes.
pub const OWNER_LIMIT: usize = 128;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields, tag = "op")]
pub enum Request {
    /// Is the machine running, and which version of the VMM drives it?
    Status,
    /// Puts a disk on the bus. The message carries its files, in order: the disk is
    /// their concatenation, each padded to a multiple of 4096 bytes with zeros. A
    /// writable disk has exactly one file, of a size that is a multiple of 512.
    AddDisk {
        /// Whether the guest is refused writes.
        read_only: bool,
        /// Whether nobody looks at the disk when the machine has ended: what the guest flushes need not reach the host's
        /// disk then.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        volatile: bool,
        /// Whose device it is, see [`check_owner`]. Empty: nobody's.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        owner: String,
    },
    /// Puts a network interface on the bus. The message carries its tap: a descriptor of
    /// `/dev/net/tun` attached to an interface with `IFF_TAP`, `IFF_NO_PI` and
    /// `IFF_VNET_HDR`.
    AddNet {
        /// Its Ethernet address.
        mac: [u8; 6],
        /// The longest packet in bytes, without the Ethernet header: 68 to 65535.
        mtu: u16,
        /// Whose device it is, see [`check_owner`]. Empty: nobody's.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        owner: String,
    },
    /// Puts the device that shows volumes on the bus, unless it is there.
    AddFs,
    /// Gives the guest a volume. The message carries its directory or file, which may be a
    /// descriptor opened with `O_PATH`.
    AddVolume {
        /// Its name below the device's root: 1 to 255 of `[A-Za-z0-9_.-]`.
        name: String,
        /// What the guest may do with it.
        access: Access,
        /// Whether nothing is mounted below it, now and later: volumes of which that is said, and which begin at the same
        /// directory, are one to the guest. Only to a VMM with [`FEATURE_PLAIN_VOLUMES`].
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        plain: bool,
    },
    /// Takes a volume away. One that is not there is fine.
    RemoveVolume {
        /// Its name.
        name: String,
    },
    /// Takes a device off the bus. The guest has let go of it before.
    RemoveDevice {
        /// Its device number, from [`Response::Device`].
        slot: u8,
        /// Whose device is meant. If there is none in the slot, or one of another owner, then this one has gone
        /// already, which is fine. Empty: whatever is in the slot, where an empty one is an error.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        owner: String,
    },
    /// What does this VMM know beyond the other requests' first form? One that does not know this request answers with an
    /// error.
    Features,
    /// Which devices and volumes are there?
    Devices,
    /// Saves the machine, which must be a template without devices of a pod, and ends it. The
    /// guest need not help; whoever is connected to it is cut off.
    Save,
    /// Ends the machine at once, without the guest's help. Answered before the process
    /// ends.
    Stop,
}

/// What the VMM answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields, tag = "result")]
pub enum Response {
    /// Done, nothing to say.
    Done,
    /// Answer to [`Request::Status`].
    Status {
        /// Version of the `nacelle` that drives the machine.
        version: String,
        /// Name of the sandbox.
        id: String,
    },
    /// Answer to [`Request::AddDisk`], [`Request::AddNet`] and [`Request::AddFs`].
    Device {
        /// Device number on PCI bus 0, 1 to 31.
        slot: u8,
    },
    /// Answer to [`Request::Features`].
    Features {
        /// Version of the `nacelle` that drives the machine.
        version: String,
        /// What it knows, of the features above and what later versions add.
        features: Vec<String>,
    },
    /// Answer to [`Request::Devices`].
    Devices {
        /// The devices, by slot.
        devices: Vec<DeviceInfo>,
        /// The names of the volumes, in the order of their bytes.
        volumes: Vec<String>,
        /// Whether there are more volumes than one message can name: these are the first.
        #[serde(default)]
        truncated: bool,
    },
    /// The request was refused; nothing changed.
    Error {
        /// Why.
        message: String,
    },
}

/// A device on the bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Device number on PCI bus 0, 1 to 31.
    pub slot: u8,
    /// `vsock`, `disk`, `net`, `fs` or `rng`; later versions may have others.
    pub kind: String,
    /// Whose it is; empty if nobody's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub owner: String,
}

/// A name that is none for an owner.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name for the owner of a device: 1 to {OWNER_LIMIT} of [A-Za-z0-9_./-]")]
pub struct OwnerError(String);

/// Checks the name of a device's owner: 1 to [`OWNER_LIMIT`] of `[A-Za-z0-9_./-]`, for example `scratch` or
/// `<container id>/rootfs`. An owner has one device at a time.
///
/// # Errors
/// If it is something else.
pub fn check_owner(owner: &str) -> Result<(), OwnerError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_./-".contains(&byte);
    if (1..=OWNER_LIMIT).contains(&owner.len()) && owner.bytes().all(allowed) {
        return Ok(());
    }
    Err(OwnerError(owner.chars().take(OWNER_LIMIT).collect()))
}

impl Response {
    /// The answer to [`Request::Devices`], with as many of `volumes` as one message holds.
    #[must_use]
    pub(crate) fn devices(devices: Vec<DeviceInfo>, volumes: Vec<String>) -> Self {
        let mut answer = Self::Devices { devices, volumes: Vec::new(), truncated: false };
        // A bus has 31 devices, so they fit. A name takes its quotes and a comma besides, for none needs an escape.
        let mut room =
            MESSAGE_LIMIT.saturating_sub(serde_json::to_vec(&answer).map_or(MESSAGE_LIMIT, |text| text.len()));
        if let Self::Devices { volumes: named, truncated, .. } = &mut answer {
            for name in volumes {
                let Some(left) = room.checked_sub(name.len() + 3) else {
                    *truncated = true;
                    break;
                };
                room = left;
                named.push(name);
            }
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(request: &Request) -> String {
        serde_json::to_string(request).unwrap()
    }

    #[test]
    fn without_an_owner_requests_are_those_of_versions_that_know_none() {
        let (owner, mac, mtu) = (String::new(), [2, 0, 0, 0, 0, 1], 1500);
        let disk = Request::AddDisk { read_only: true, volatile: false, owner: owner.clone() };
        let net = Request::AddNet { mac, mtu, owner: owner.clone() };
        let remove = Request::RemoveDevice { slot: 3, owner };
        for (request, old) in [
            (disk, r#"{"op":"add_disk","read_only":true}"#),
            (net, r#"{"op":"add_net","mac":[2,0,0,0,0,1],"mtu":1500}"#),
            (remove, r#"{"op":"remove_device","slot":3}"#),
        ] {
            assert_eq!(text(&request), old);
            assert_eq!(serde_json::from_str::<Request>(old).unwrap(), request);
        }
        let volatile = Request::AddDisk { read_only: false, volatile: true, owner: "scratch".into() };
        assert_eq!(text(&volatile), r#"{"op":"add_disk","read_only":false,"volatile":true,"owner":"scratch"}"#);
        assert_eq!(serde_json::from_str::<Request>(&text(&volatile)).unwrap(), volatile);
        let owned = Request::RemoveDevice { slot: 3, owner: "c1/rootfs".into() };
        assert_eq!(text(&owned), r#"{"op":"remove_device","slot":3,"owner":"c1/rootfs"}"#);
        assert_eq!(serde_json::from_str::<Request>(&text(&owned)).unwrap(), owned);
        let volume = |plain| Request::AddVolume { name: "v".into(), access: Access::Read, plain };
        assert_eq!(text(&volume(false)), r#"{"op":"add_volume","name":"v","access":"read"}"#);
        assert_eq!(serde_json::from_str::<Request>(&text(&volume(false))).unwrap(), volume(false));
        assert_eq!(serde_json::from_str::<Request>(&text(&volume(true))).unwrap(), volume(true));
        assert_eq!(text(&Request::Features), r#"{"op":"features"}"#);
        assert_eq!(text(&Request::Devices), r#"{"op":"devices"}"#);
        for unknown in [r#"{"op":"add_disk","read_only":true,"for":"x"}"#, r#"{"op":"shrink"}"#] {
            assert!(serde_json::from_str::<Request>(unknown).is_err(), "{unknown}");
        }
    }

    #[test]
    fn owners_have_names_that_need_no_escape_anywhere() {
        let longest = "a".repeat(OWNER_LIMIT);
        for owner in ["scratch", "0123abcd/rootfs", "A_b.c-d", &longest] {
            assert_eq!(check_owner(owner), Ok(()));
        }
        let longer = "a".repeat(OWNER_LIMIT + 1);
        for owner in ["", "a b", "a\n", "a\"b", "é", &longer] {
            assert!(check_owner(owner).unwrap_err().to_string().contains("no name for the owner"), "{owner:?}");
        }
    }

    #[test]
    fn the_list_of_devices_and_volumes_always_fits_into_a_message() {
        let devices: Vec<_> =
            (1..32).map(|slot| DeviceInfo { slot, kind: "disk".into(), owner: "o".repeat(OWNER_LIMIT) }).collect();
        for (count, length) in [(0, 0), (3, 20), (4096, 1), (4096, 9), (4096, 255)] {
            let volumes: Vec<_> = (0..count).map(|_| "v".repeat(length)).collect();
            let answer = Response::devices(devices.clone(), volumes);
            let bytes = serde_json::to_vec(&answer).unwrap();
            assert!(bytes.len() <= MESSAGE_LIMIT, "{} bytes", bytes.len());
            assert_eq!(serde_json::from_slice::<Response>(&bytes).unwrap(), answer);
            let Response::Devices { devices: told, volumes, truncated } = answer else { panic!("{answer:?}") };
            assert_eq!(told, devices);
            assert_eq!(truncated, volumes.len() < count);
            // What does not fit is more than what would have.
            assert!(!truncated || bytes.len() + length + 3 > MESSAGE_LIMIT - 8, "{} bytes", bytes.len());
        }
    }
}
