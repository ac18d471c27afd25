//! Machines that are saved, and machines that start from them, with guests of a few
//! instructions, which any /dev/kvm can run.

#![allow(clippy::unwrap_used)]

mod machine;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use machine::{Guest, code};
use nacelle_vmm::config::{SavedFiles, Start};
use nacelle_vmm::control::{Client, ClientError, Request, Response};
use nacelle_vmm::{Exit, console};

const TIMEOUT: Duration = Duration::from_secs(10);

/// Asks for a disk that is nobody's.
fn add_disk() -> Request {
    Request::AddDisk { read_only: true, volatile: false, owner: String::new() }
}

fn connect(guest: &Guest) -> Client {
    Client::connect(&guest.config.control, Instant::now() + TIMEOUT).unwrap()
}

/// Where a machine is saved to, if it is a template.
fn saved(guest: &Guest) -> SavedFiles {
    let path = |name: &str| guest.config.console.with_file_name(name);
    SavedFiles { memory: path("memory"), state: path("state") }
}

/// A guest that has something in a register of each kind and in memory, says "A", and waits for a disk. Then it says
/// whether all of that is still there, how often it has been there (in memory), and ends.
fn guest() -> &'static [u8] {
    code!(
        "mov r15, 0x1234567890abcdef",
        "mov dr0, r15",
        // The base of the kernel's GS, which is machine-specific.
        "mov ecx, 0xc0000102",
        "mov eax, 0x00abcdef",
        "mov edx, 0x00001234",
        "wrmsr",
        "mov qword ptr [0x300000], 0",
        "mov dx, 0x3f8",
        "mov al, 0x41",
        "out dx, al",
        // Slot 2 of the bus: slot 1 is the vsock device's.
        "2: mov dx, 0xcf8",
        "mov eax, 0x80001000",
        "out dx, eax",
        "mov dx, 0xcfc",
        "in eax, dx",
        "cmp eax, 0x10421af4",
        "jne 2b",
        "inc qword ptr [0x300000]",
        "mov bl, 0x42",
        "mov rax, dr0",
        "cmp rax, r15",
        "jne 3f",
        "mov rcx, 0x1234567890abcdef",
        "cmp rax, rcx",
        "jne 3f",
        "mov ecx, 0xc0000102",
        "rdmsr",
        "cmp eax, 0x00abcdef",
        "jne 3f",
        "cmp edx, 0x1234",
        "jne 3f",
        "mov bl, 0x59",
        "3: mov dx, 0x3f8",
        "mov al, bl",
        "out dx, al",
        "mov al, [0x300000]",
        "add al, 0x30",
        "out dx, al",
        "mov dx, 0x510",
        "mov al, 1",
        "out dx, al",
        "4: hlt",
        "jmp 4b"
    )
}

/// A template whose guest waits, and where it will be saved to.
fn template() -> Guest {
    let mut guest = Guest::prepare(guest());
    guest.config.start = Start::Template(saved(&guest));
    let guest = guest.run();
    let deadline = Instant::now() + TIMEOUT;
    while console::tail(&guest.config.console, 1).unwrap_or_default() != ["A"] {
        assert!(Instant::now() < deadline, "the guest says nothing");
        std::thread::yield_now();
    }
    guest
}

#[test]
fn clones_go_on_where_their_template_stopped_and_do_not_see_each_other() {
    let template = template();
    let files = saved(&template);
    assert_eq!(connect(&template).call(&Request::Save, &[], TIMEOUT).unwrap(), Response::Done);
    let (exit, _, _template) = template.wait();
    assert_eq!(exit, Exit::Saved);
    for file in [&files.memory, &files.state] {
        let mode = fs::metadata(file).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode, 0o600, "{}: it is the memory of every clone", file.display());
    }
    let before = fs::read(&files.memory).unwrap();
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(4096).unwrap();
    for _ in 0..2 {
        let mut clone = Guest::prepare(&[]);
        clone.config.start = Start::Clone(files.clone());
        fs::remove_file(&clone.config.kernel).unwrap();
        fs::remove_file(&clone.config.initramfs).unwrap();
        let clone = clone.run();
        connect(&clone).call(&add_disk(), &[disk.as_fd()], TIMEOUT).unwrap();
        let (exit, console, _) = clone.wait();
        assert_eq!((exit, console), (Exit::PoweredOff, vec!["Y1".to_owned()]));
    }
    assert!(fs::read(&files.memory).unwrap() == before, "a clone wrote to its template's memory");
}

#[test]
fn only_a_template_without_devices_of_a_pod_is_saved() {
    let refused = |guest: &Guest| match connect(guest).call(&Request::Save, &[], TIMEOUT) {
        Err(ClientError::Refused(reason)) => reason,
        other => panic!("{other:?}"),
    };
    let stop = |guest: Guest| {
        connect(&guest).call(&Request::Stop, &[], TIMEOUT).unwrap();
        guest.wait();
    };
    let other = Guest::start(code!("2: jmp 2b"));
    assert!(refused(&other).contains("only a template"));
    stop(other);
    let mut template = Guest::prepare(code!("2: jmp 2b"));
    template.config.start = Start::Template(saved(&template));
    let template = template.run();
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(4096).unwrap();
    connect(&template).call(&add_disk(), &[disk.as_fd()], TIMEOUT).unwrap();
    assert!(refused(&template).contains("without devices"));
    assert!(!saved(&template).state.exists());
    stop(template);
}

#[test]
fn what_is_no_saved_machine_of_that_size_is_refused_before_anything_starts() {
    let template = template();
    let files = saved(&template);
    connect(&template).call(&Request::Save, &[], TIMEOUT).unwrap();
    let (_, _, _template) = template.wait();
    let clone = || {
        let mut clone = Guest::prepare(&[]);
        clone.config.start = Start::Clone(files.clone());
        clone
    };
    let refused = |clone: &Guest| nacelle_vmm::run(&clone.config).unwrap_err().to_string();

    let mut larger = clone();
    larger.config.memory_mib = 64;
    assert!(refused(&larger).contains("32 MiB"), "{}", refused(&larger));
    let mut wider = clone();
    wider.config.vcpus = 2;
    assert!(refused(&wider).contains("1 processors"), "{}", refused(&wider));
    let cut = fs::File::options().write(true).open(&files.memory).unwrap();
    cut.set_len(4096).unwrap();
    assert!(refused(&clone()).contains("4096 bytes"), "{}", refused(&clone()));
    cut.set_len(32 << 20).unwrap();
    fs::write(&files.state, "something else").unwrap();
    assert!(refused(&clone()).contains(files.state.to_str().unwrap()), "{}", refused(&clone()));
    fs::remove_file(&files.memory).unwrap();
    let clone = clone();
    nacelle_vmm::run(&clone.config).unwrap_err();
    assert!(!clone.config.control.exists() && !clone.config.console.exists());
}
