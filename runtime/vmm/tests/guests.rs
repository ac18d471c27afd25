//! Whole machines with guests of a few instructions, which any /dev/kvm can run.

#![allow(clippy::unwrap_used)]

mod machine;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use machine::{Guest, code};
use nacelle_vmm::Exit;
use nacelle_vmm::control::{Access, Client, ClientError, Request, Response};

const TIMEOUT: Duration = Duration::from_secs(10);

/// Asks for a disk that is nobody's.
fn add_disk() -> Request {
    Request::AddDisk { read_only: true, volatile: false, owner: String::new() }
}

fn connect(guest: &Guest) -> Client {
    Client::connect(&guest.config.control, Instant::now() + TIMEOUT).unwrap()
}

#[test]
fn a_guest_writes_to_its_console_and_powers_off() {
    let guest = Guest::start(code!(
        "lea rsi, [rip + 3f]",
        "mov dx, 0x3f8",
        "2: lodsb",
        "test al, al",
        "jz 4f",
        "out dx, al",
        "jmp 2b",
        "3: .asciz \"hello from the guest\\n\"",
        "4: mov dx, 0x510",
        "mov al, 1",
        "out dx, al",
        "5: hlt",
        "jmp 5b"
    ));
    let (exit, console, guest) = guest.wait();
    assert_eq!(exit, Exit::PoweredOff);
    assert_eq!(console, ["hello from the guest"]);
    assert!(!guest.config.control.exists(), "the control socket is left behind");
    assert!(!guest.config.vsock.exists(), "the vsock socket is left behind");
}

#[test]
fn a_reset_is_told_apart_from_a_power_off() {
    let guest = Guest::start(code!("mov al, 0xfe", "out 0x64, al", "2: hlt", "jmp 2b"));
    assert_eq!(guest.wait().0, Exit::Reset);
}

#[test]
fn a_triple_fault_is_reported() {
    let guest = Guest::start(code!("ud2"));
    assert_eq!(guest.wait().0, Exit::TripleFault);
}

#[test]
fn the_kernel_is_entered_with_its_parameters() {
    // Prints the signature of the setup header, and whether interrupts are off.
    let guest = Guest::start(code!(
        "mov dx, 0x3f8",
        "mov ecx, 4",
        "lea rsi, [rsi + 0x202]",
        "rep outsb",
        "pushfq",
        "pop rax",
        "shr eax, 9",
        "and eax, 1",
        "add al, 0x30",
        "out dx, al",
        "mov dx, 0x510",
        "mov al, 1",
        "out dx, al"
    ));
    assert_eq!(guest.wait().1, ["HdrS0"]);
}

#[test]
fn a_halted_guest_is_stopped_by_the_control_socket() {
    let guest = Guest::start(code!("2: hlt", "jmp 2b"));
    let mut client = connect(&guest);
    let status = client.call(&Request::Status, &[], TIMEOUT).unwrap();
    assert_eq!(status, Response::Status { version: env!("CARGO_PKG_VERSION").into(), id: "test".into() });
    assert_eq!(client.call(&Request::Stop, &[], TIMEOUT).unwrap(), Response::Done);
    assert_eq!(guest.wait().0, Exit::Stopped);
}

#[test]
fn a_guest_that_never_exits_is_stopped_too() {
    let guest = Guest::start(code!("2: jmp 2b"));
    connect(&guest).call(&Request::Stop, &[], TIMEOUT).unwrap();
    assert_eq!(guest.wait().0, Exit::Stopped);
}

#[test]
fn disks_come_and_go_while_the_guest_runs() {
    let guest = Guest::start(code!("2: hlt", "jmp 2b"));
    let mut client = connect(&guest);
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mut add = |read_only| {
        client.call(&Request::AddDisk { read_only, volatile: false, owner: String::new() }, &[file.as_fd()], TIMEOUT)
    };
    let Response::Device { slot: first } = add(true).unwrap() else { panic!("not a device") };
    let Response::Device { slot: second } = add(false).unwrap() else { panic!("not a device") };
    assert_ne!(first, second);
    let remove =
        |client: &mut Client, slot| client.call(&Request::RemoveDevice { slot, owner: String::new() }, &[], TIMEOUT);
    assert_eq!(remove(&mut client, first).unwrap(), Response::Done);
    assert!(matches!(remove(&mut client, first), Err(ClientError::Refused(_))), "it is gone");
    assert!(matches!(remove(&mut client, 0), Err(ClientError::Refused(_))), "the bridge stays");
    let again = client.call(&add_disk(), &[file.as_fd()], TIMEOUT).unwrap();
    assert_eq!(again, Response::Device { slot: first }, "a free slot is used again");
    let none = client.call(&add_disk(), &[], TIMEOUT);
    assert!(matches!(none, Err(ClientError::Refused(_))), "a disk without files");
    client.call(&Request::Stop, &[], TIMEOUT).unwrap();
    guest.wait();
}

#[test]
fn a_device_is_added_and_removed_once_by_its_owner_whatever_is_asked_again() {
    let guest = Guest::start(code!("2: hlt", "jmp 2b"));
    let mut client = connect(&guest);
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let add = |owner: &str| Request::AddDisk { read_only: true, volatile: false, owner: owner.into() };
    let remove = |slot: u8, owner: &str| Request::RemoveDevice { slot, owner: owner.into() };
    let list = |client: &mut Client| match client.call(&Request::Devices, &[], TIMEOUT).unwrap() {
        Response::Devices { devices, volumes, truncated: false } => {
            let devices = devices.into_iter().map(|device| (device.slot, device.kind, device.owner));
            (devices.collect::<Vec<_>>(), volumes)
        }
        other => panic!("{other:?}"),
    };
    let device = |slot: u8, kind: &str, owner: &str| (slot, kind.to_owned(), owner.to_owned());
    let Response::Features { version, features } = client.call(&Request::Features, &[], TIMEOUT).unwrap() else {
        panic!("no features")
    };
    let known = ["owners", "devices", "volatile", "plain_volumes"].map(String::from);
    assert_eq!((version.as_str(), features.as_slice()), (env!("CARGO_PKG_VERSION"), known.as_slice()));
    assert_eq!(list(&mut client), (vec![device(1, "vsock", "")], vec![]));

    assert_eq!(client.call(&add("c1/rootfs"), &[file.as_fd()], TIMEOUT).unwrap(), Response::Device { slot: 2 });
    match client.call(&add("c1/rootfs"), &[file.as_fd()], TIMEOUT) {
        Err(ClientError::Refused(reason)) => {
            assert!(reason.contains("c1/rootfs") && reason.contains("slot 2"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    for request in [add("a b"), remove(2, "a b")] {
        let files = if matches!(request, Request::AddDisk { .. }) { vec![file.as_fd()] } else { vec![] };
        assert!(matches!(client.call(&request, &files, TIMEOUT), Err(ClientError::Refused(_))), "{request:?}");
    }
    let present = vec![device(1, "vsock", ""), device(2, "disk", "c1/rootfs"), device(3, "rng", "")];
    // Not the one that is there, nothing in the slot, and no slot.
    for (slot, owner) in [(2, "c2/rootfs"), (2, "c1"), (3, "c1/rootfs"), (9, "c1/rootfs"), (200, "c1/rootfs")] {
        assert_eq!(client.call(&remove(slot, owner), &[], TIMEOUT).unwrap(), Response::Done);
        assert_eq!(list(&mut client).0, present, "{slot} of {owner}");
    }
    // Twice, and the second time another's is there.
    assert_eq!(client.call(&remove(2, "c1/rootfs"), &[], TIMEOUT).unwrap(), Response::Done);
    assert_eq!(client.call(&remove(2, "c1/rootfs"), &[], TIMEOUT).unwrap(), Response::Done);
    assert_eq!(client.call(&add("c2/rootfs"), &[file.as_fd()], TIMEOUT).unwrap(), Response::Device { slot: 2 });
    assert_eq!(client.call(&remove(2, "c1/rootfs"), &[], TIMEOUT).unwrap(), Response::Done);

    let Response::Device { slot } = client.call(&Request::AddFs, &[], TIMEOUT).unwrap() else { panic!("no device") };
    let directory = std::fs::File::open("/").unwrap();
    for name in ["b", "a"] {
        let request = Request::AddVolume { name: name.into(), access: Access::Read, plain: true };
        client.call(&request, &[directory.as_fd()], TIMEOUT).unwrap();
    }
    let (devices, volumes) = list(&mut client);
    assert_eq!(devices[1..], [device(2, "disk", "c2/rootfs"), device(3, "rng", ""), device(slot, "fs", "")]);
    assert_eq!(volumes, ["a", "b"]);
    client.call(&Request::Stop, &[], TIMEOUT).unwrap();
    guest.wait();
}

#[test]
fn the_random_number_device_comes_back_after_it_was_removed() {
    let guest = Guest::start(code!("2: hlt", "jmp 2b"));
    let mut client = connect(&guest);
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let random = |client: &mut Client| match client.call(&Request::Devices, &[], TIMEOUT).unwrap() {
        Response::Devices { devices, .. } => devices.into_iter().find(|device| device.kind == "rng"),
        other => panic!("{other:?}"),
    };
    client.call(&add_disk(), &[file.as_fd()], TIMEOUT).unwrap();
    let slot = random(&mut client).unwrap().slot;
    let remove = Request::RemoveDevice { slot, owner: String::new() };
    client.call(&remove, &[], TIMEOUT).unwrap();
    assert!(random(&mut client).is_none());
    client.call(&add_disk(), &[file.as_fd()], TIMEOUT).unwrap();
    assert!(random(&mut client).is_some(), "it comes with the next disk");
    client.call(&Request::Stop, &[], TIMEOUT).unwrap();
    guest.wait();
}

#[test]
fn volumes_come_and_go_while_the_guest_runs() {
    let guest = Guest::start(code!("2: hlt", "jmp 2b"));
    let mut client = connect(&guest);
    let directory = std::fs::File::open("/").unwrap();
    let add = |name: &str| Request::AddVolume { name: name.into(), access: Access::Read, plain: true };
    let refused = |client: &mut Client, request: &Request, files: usize| {
        let files = vec![directory.as_fd(); files];
        match client.call(request, &files, TIMEOUT) {
            Err(ClientError::Refused(reason)) => reason,
            other => panic!("{request:?}: {other:?}"),
        }
    };
    assert!(refused(&mut client, &add("data"), 1).contains("no device for volumes"));
    let first = client.call(&Request::AddFs, &[], TIMEOUT).unwrap();
    assert!(matches!(first, Response::Device { .. }));
    assert_eq!(client.call(&Request::AddFs, &[], TIMEOUT).unwrap(), first, "there is one");
    assert_eq!(client.call(&add("data"), &[directory.as_fd()], TIMEOUT).unwrap(), Response::Done);
    assert!(refused(&mut client, &add("data"), 1).contains("there is a volume"));
    assert!(refused(&mut client, &add("a/b"), 1).contains("no name"));
    assert!(refused(&mut client, &add("two"), 2).contains("one directory or file"));
    assert!(refused(&mut client, &add("none"), 0).contains("one directory or file"));
    for _ in 0..2 {
        let remove = Request::RemoveVolume { name: "data".into() };
        assert_eq!(client.call(&remove, &[], TIMEOUT).unwrap(), Response::Done);
    }
    assert_eq!(client.call(&add("data"), &[directory.as_fd()], TIMEOUT).unwrap(), Response::Done);
    let Response::Device { slot } = first else { panic!("not a device") };
    assert_eq!(
        client.call(&Request::RemoveDevice { slot, owner: String::new() }, &[], TIMEOUT).unwrap(),
        Response::Done
    );
    assert!(refused(&mut client, &add("data"), 1).contains("no device for volumes"));
    client.call(&Request::Stop, &[], TIMEOUT).unwrap();
    guest.wait();
}

#[test]
fn a_missing_kernel_is_named_before_anything_starts() {
    let guest = Guest::prepare(code!("hlt"));
    std::fs::remove_file(&guest.config.kernel).unwrap();
    let error = nacelle_vmm::run(&guest.config).unwrap_err();
    assert!(error.to_string().contains(guest.config.kernel.to_str().unwrap()), "{error}");
    assert!(!guest.config.control.exists() && !guest.config.console.exists());
}

#[test]
fn a_socket_in_use_is_named() {
    let guest = Guest::prepare(code!("hlt"));
    let _other = std::os::unix::net::UnixListener::bind(&guest.config.control).unwrap();
    let error = nacelle_vmm::run(&guest.config).unwrap_err();
    assert!(error.to_string().contains(guest.config.control.to_str().unwrap()), "{error}");
    assert!(guest.config.control.exists(), "another's socket must stay");
}

/// Drives the random number device, which comes with the first disk, as a kernel does:
/// finds it on the bus, moves both of its ranges, negotiates, sets up a queue with an
/// interrupt, moves the port range again, notifies, and waits for the interrupt.
#[test]
fn a_virtio_device_answers_by_interrupt_from_where_the_guest_put_it() {
    let guest = Guest::start(code!(
        // Page table entries for the memory range at 0xd0000000 and the local APIC.
        "mov rax, 0xc003",
        "mov [0xa018], rax",
        "mov eax, 0xd0000083",
        "mov [0xc400], rax",
        "mov eax, 0xfee00083",
        "mov [0xcfb8], rax",
        // An interrupt gate for vector 0x41 in a table at 0x3000.
        "lea rax, [rip + 8f]",
        "mov [0x3410], ax",
        "mov word ptr [0x3412], 0x10",
        "mov word ptr [0x3414], 0x8e00",
        "shr rax, 16",
        "mov [0x3416], ax",
        "shr rax, 16",
        "mov [0x3418], eax",
        "mov word ptr [0x2ff0], 0xfff",
        "mov qword ptr [0x2ff2], 0x3000",
        "lidt [0x2ff0]",
        // The local APIC on.
        "mov ebx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        // Wait until the random number device is in slot 3.
        "4: mov ecx, 0x80001800",
        "call 6f",
        "cmp eax, 0x10441af4",
        "jne 4b",
        // Answer to ports and memory, then move both ranges.
        "mov ecx, 0x80001804",
        "mov eax, 7",
        "call 7f",
        "mov ecx, 0x80001810",
        "mov eax, 0x2000",
        "call 7f",
        "mov ecx, 0x80001814",
        "mov eax, 0xd0000000",
        "call 7f",
        // MSI-X: vector 1 delivers 0x41; the capability is the first.
        "mov ebx, 0xd0000000",
        "mov dword ptr [rbx + 0x10], 0xfee00000",
        "mov dword ptr [rbx + 0x14], 0",
        "mov dword ptr [rbx + 0x18], 0x41",
        "mov dword ptr [rbx + 0x1c], 0",
        "mov ecx, 0x80001840",
        "mov eax, 0x80000000",
        "call 7f",
        // Negotiate VIRTIO_F_VERSION_1.
        "mov dx, 0x2014",
        "mov al, 3",
        "out dx, al",
        "mov dx, 0x2008",
        "mov eax, 1",
        "out dx, eax",
        "mov dx, 0x200c",
        "out dx, eax",
        "mov dx, 0x2014",
        "mov al, 0xb",
        "out dx, al",
        // Queue 0: eight entries at 0x300000, interrupt vector 1.
        "mov dx, 0x2018",
        "mov ax, 8",
        "out dx, ax",
        "mov dx, 0x201a",
        "mov ax, 1",
        "out dx, ax",
        "mov dx, 0x2020",
        "mov eax, 0x300000",
        "out dx, eax",
        "mov dx, 0x2028",
        "mov eax, 0x301000",
        "out dx, eax",
        "mov dx, 0x2030",
        "mov eax, 0x302000",
        "out dx, eax",
        "mov dx, 0x201c",
        "mov ax, 1",
        "out dx, ax",
        "mov dx, 0x2014",
        "mov al, 0xf",
        "out dx, al",
        // One writable buffer of 16 bytes.
        "mov qword ptr [0x300000], 0x303000",
        "mov dword ptr [0x300008], 16",
        "mov dword ptr [0x30000c], 2",
        "mov word ptr [0x301004], 0",
        "mov word ptr [0x301002], 1",
        // The ports move once more while the device is active.
        "mov ecx, 0x80001810",
        "mov eax, 0x3000",
        "call 7f",
        "mov dx, 0x3080",
        "xor eax, eax",
        "out dx, ax",
        "sti",
        "5: hlt",
        "jmp 5b",
        // Configuration: read register ecx to eax; write eax to register ecx.
        "6: mov dx, 0xcf8",
        "mov eax, ecx",
        "out dx, eax",
        "mov dx, 0xcfc",
        "in eax, dx",
        "ret",
        "7: mov dx, 0xcf8",
        "xchg eax, ecx",
        "out dx, eax",
        "mov dx, 0xcfc",
        "mov eax, ecx",
        "out dx, eax",
        "ret",
        // The interrupt: prints how many buffers came back, and how long the first is.
        "8: mov dx, 0x3f8",
        "mov al, [0x302002]",
        "add al, 0x30",
        "out dx, al",
        "mov al, [0x302008]",
        "add al, 0x30",
        "out dx, al",
        "9: mov dx, 0x510",
        "mov al, 1",
        "out dx, al"
    ));
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    connect(&guest).call(&add_disk(), &[file.as_fd()], TIMEOUT).unwrap();
    let (exit, console, _) = guest.wait();
    assert_eq!(exit, Exit::PoweredOff);
    assert_eq!(console, ["1@"], "one buffer of 16 bytes ('0' + 16)");
}

#[test]
fn a_flood_of_writes_to_the_address_port_loses_none() {
    let guest = Guest::start(code!(
        "mov rsp, 0x200000",
        // More writes to the address port than KVM has room for; what is not a whole word does not count. Prints 'a'
        // if the last is what the port holds then.
        "mov dx, 0xcf8",
        "mov ecx, 1000",
        "2: mov eax, ecx",
        "shl eax, 8",
        "out dx, eax",
        "loop 2b",
        "mov al, 0x55",
        "out dx, al",
        "mov ax, 0x5555",
        "out dx, ax",
        "in eax, dx",
        "mov bl, 0x61",
        "cmp eax, 0x100",
        "call 7f",
        "mov dx, 0x510",
        "mov al, 1",
        "out dx, al",
        "5: hlt",
        "jmp 5b",
        // Prints bl, or '-' if the flags say "differs".
        "7: je 8f",
        "mov bl, 0x2d",
        "8: mov dx, 0x3f8",
        "mov al, bl",
        "out dx, al",
        "ret"
    ));
    let (exit, console, _) = guest.wait();
    assert_eq!(exit, Exit::PoweredOff);
    assert_eq!(console, ["a"]);
}
