//! The process of a VMM, jailed as that of a pod is: what it puts on record, what it says, how it ends, and what of the
//! host somebody can reach who has broken out of its virtual machine.
//!
//! Such a process has one thread to begin with, which no test of the usual kind has: so this program is the VMM, too, when
//! it is called with the configuration of one.

#![allow(clippy::unwrap_used)]

#[path = "machine/prepared.rs"]
mod prepared;

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nacelle_vmm::config::{IDENTITY, MESSAGES, MachineConfig};
use nacelle_vmm::console::{self, MESSAGES_SIZE};
use nacelle_vmm::control::{Client, Request, Response};
use nacelle_vmm::{Exit, Identity};
use prepared::{Prepared, code};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

const TIMEOUT: Duration = Duration::from_secs(30);
/// Says to the VMM that one of its threads is to panic once its guest has ended.
const PANIC: &str = "NACELLE_TEST_PANIC";

/// The tests. Names on the command line choose among them.
const TESTS: &[(&str, fn())] = &[
    ("a_vmm_is_on_record_before_its_guest_runs", a_vmm_is_on_record_before_its_guest_runs),
    (
        "who_has_broken_out_changes_nothing_of_the_pods_directory",
        who_has_broken_out_changes_nothing_of_the_pods_directory,
    ),
    ("no_descriptor_of_a_jailed_vmm_makes_a_file_grow", no_descriptor_of_a_jailed_vmm_makes_a_file_grow),
    ("a_guest_that_breaks_its_device_for_ever_fills_nothing", a_guest_that_breaks_its_device_for_ever_fills_nothing),
    ("why_a_machine_ended_is_among_its_messages", why_a_machine_ended_is_among_its_messages),
    ("what_cannot_be_said_ends_nothing", what_cannot_be_said_ends_nothing),
    ("a_panic_on_any_thread_is_said_and_ends_the_process", a_panic_on_any_thread_is_said_and_ends_the_process),
];

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    if let [word, config] = &words[..]
        && word == "vmm"
    {
        return vmm(config.as_ref());
    }
    let names: Vec<_> = words.iter().filter(|word| !word.starts_with('-')).collect();
    for (name, test) in
        TESTS.iter().filter(|(name, _)| names.is_empty() || names.iter().any(|word| name.contains(*word)))
    {
        // A failure ends the program, and has said which it is.
        println!("test {name} ...");
        test();
    }
    ExitCode::SUCCESS
}

/// What `nacelle vmm` is.
fn vmm(config: &Path) -> ExitCode {
    nacelle_vmm::end_at_a_panic();
    let config: MachineConfig = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    let exit = match nacelle_vmm::run_jailed(&config) {
        Ok(exit) => exit,
        Err(error) => {
            nacelle_vmm::say(&nacelle_vmm::chain(&error));
            return ExitCode::FAILURE;
        }
    };
    if exit != Exit::PoweredOff {
        nacelle_vmm::say(&exit.to_string());
    } else if std::env::var_os(PANIC).is_some() {
        let _ = std::thread::spawn(|| panic!("as the test asks for")).join();
    }
    ExitCode::from(u8::try_from(exit.code()).unwrap())
}

/// A VMM's process. Killed when dropped.
struct Process {
    guest: Prepared,
    child: Child,
}

impl Process {
    /// Starts it with what was prepared, and with this for its standard error.
    fn start(guest: Prepared, errors: File, environment: &[&str]) -> Self {
        let config = guest.config.console.with_file_name("vmm.json");
        fs::write(&config, serde_json::to_vec(&guest.config).unwrap()).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("vmm").arg(config).envs(environment.iter().map(|name| (name, "1")));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn().unwrap();
        Self { guest, child }
    }

    /// Starts it, and waits until its guest runs.
    fn running(code: &[u8]) -> (Self, Client) {
        let guest = Prepared::new(code);
        let errors = File::create(guest.config.console.with_file_name("vmm.log")).unwrap();
        let mut process = Self::start(guest, errors, &[]);
        let mut client = process.connect();
        assert!(matches!(client.call(&Request::Status, &[], TIMEOUT).unwrap(), Response::Status { .. }));
        (process, client)
    }

    fn connect(&mut self) -> Client {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Ok(client) = Client::connect(&self.guest.config.control, Instant::now()) {
                return client;
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("{status}: {:?} {}", self.messages(), self.errors());
            }
            assert!(Instant::now() < deadline, "nobody listens");
            std::thread::yield_now();
        }
    }

    fn directory(&self) -> &Path {
        self.guest.directory.path()
    }

    /// The same directory as it is in the jail.
    fn jailed(&self) -> PathBuf {
        let inside = self.directory().strip_prefix("/").unwrap();
        Path::new("/proc").join(self.child.id().to_string()).join("root").join(inside)
    }

    fn messages(&self) -> Vec<String> {
        console::tail(&self.guest.config.messages(), 1000).unwrap_or_default()
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.directory().join("vmm.log")).unwrap_or_default()
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::yield_now();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn a_vmm_is_on_record_before_its_guest_runs() {
    let (process, _client) = Process::running(code!("2: hlt", "jmp 2b"));
    let record = process.directory().join(IDENTITY);
    let identity = Identity::parse(&fs::read(&record).unwrap()).unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.child.id())).unwrap();
    let start_time = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned();
    assert_eq!(identity, Identity { pid: process.child.id(), start_time, boot_id });
    assert_eq!(fs::metadata(&record).unwrap().permissions().mode() & 0o7777, 0o600);
    // Nor does it run without: here the record cannot be made.
    let guest = Prepared::new(code!("2: hlt", "jmp 2b"));
    fs::create_dir(guest.config.identity()).unwrap();
    let errors = File::create(guest.config.console.with_file_name("vmm.log")).unwrap();
    let mut process = Process::start(guest, errors, &[]);
    assert_eq!(process.wait().code(), Some(1));
    assert!(process.errors().contains("put its process on record"), "{}", process.errors());
    assert!(!process.guest.config.control.exists() && !process.guest.config.console.exists());
}

/// The tricks of somebody who has all that the VMM's process has, and capabilities that it has not: it acts by the root
/// directory of the process, and as the host's root.
fn who_has_broken_out_changes_nothing_of_the_pods_directory() {
    let (process, _client) = Process::running(code!("2: hlt", "jmp 2b"));
    let inside = process.jailed();
    let place = |name: &str| inside.join(name);
    let names = |directory: &Path| {
        let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<std::collections::BTreeSet<_>>()
    };
    let files = ["console", "control", MESSAGES, "vmm.json", "vmm.log", IDENTITY, "vsock"];
    let before = names(process.directory());
    assert!(files.iter().all(|name| before.contains(*name)), "{before:?}");
    assert_eq!(names(&inside), before, "it is that directory");

    let refused = |what: &str, result: Result<(), Errno>| assert_eq!(result, Err(Errno::ROFS), "{what}");
    let open = |name: &str, flags: OFlags| rustix::fs::open(place(name), flags, Mode::RUSR | Mode::WUSR).map(drop);
    refused("make a file", open("new", OFlags::CREATE | OFlags::WRONLY));
    refused("make a directory", rustix::fs::mkdir(place("new"), Mode::RWXU));
    refused("make a link", rustix::fs::symlink("/etc/shadow", place("new")));
    refused("make a pipe", rustix::fs::mknodat(CWD, place("new"), FileType::Fifo, Mode::RWXU, 0));
    let socket = UnixListener::bind(place("new")).unwrap_err();
    assert_eq!(socket.raw_os_error(), Some(libc::EROFS), "make a socket");
    for name in files {
        let path = place(name);
        refused(name, rustix::fs::rename(&path, place("new")));
        refused(name, rustix::fs::renameat_with(CWD, &path, CWD, place("vmm.log"), RenameFlags::EXCHANGE));
        refused(name, rustix::fs::link(&path, place("new")));
        refused(name, rustix::fs::unlinkat(CWD, &path, AtFlags::empty()));
        refused(name, rustix::fs::chmod(&path, Mode::RWXU));
        refused(name, rustix::fs::chownat(CWD, &path, None, None, AtFlags::empty()));
        if fs::symlink_metadata(&path).unwrap().is_file() {
            refused(name, open(name, OFlags::WRONLY));
            refused(name, open(name, OFlags::RDWR | OFlags::TRUNC));
            refused(name, open(name, OFlags::WRONLY | OFlags::APPEND));
            open(name, OFlags::RDONLY).unwrap();
        }
    }
    assert_eq!(names(process.directory()), before);
    // Nor anywhere else, and it is the directory of one pod.
    let root = Path::new("/proc").join(process.child.id().to_string()).join("root");
    assert_eq!(File::create(root.join("new")).unwrap_err().raw_os_error(), Some(libc::EROFS));

    // What the guest connects to is reached all the same.
    let listener = UnixListener::bind(MachineConfig::vsock_listener(&process.guest.config.vsock, 1234)).unwrap();
    UnixStream::connect(place("vsock_1234")).unwrap();
    listener.accept().unwrap();
}

fn no_descriptor_of_a_jailed_vmm_makes_a_file_grow() {
    let (process, _client) = Process::running(code!("2: hlt", "jmp 2b"));
    let directory = PathBuf::from(format!("/proc/{}", process.child.id()));
    let mut seen = 0;
    for entry in fs::read_dir(directory.join("fd")).unwrap() {
        let descriptor = entry.unwrap().path();
        let number = descriptor.file_name().unwrap().to_str().unwrap().to_owned();
        let target = fs::read_link(&descriptor).unwrap();
        if ["0", "1", "2"].contains(&number.as_str()) {
            assert_eq!(target, Path::new("/dev/null"), "{number}");
            seen += 1;
        }
        // Those without a name on a file system are of the kernel's.
        if let Ok(metadata) = fs::metadata(&descriptor)
            && target.is_absolute()
        {
            let is_device = metadata.file_type().is_char_device();
            assert!(is_device || metadata.file_type().is_socket(), "{number} is {}", target.display());
        }
    }
    assert_eq!(seen, 3);
    assert_eq!(fs::metadata(process.directory().join("vmm.log")).unwrap().len(), 0);
}

/// A driver that is ready before it has set up any queue, ten thousand times; each time the device needs a reset.
fn a_guest_that_breaks_its_device_for_ever_fills_nothing() {
    let guest = code!(
        // Let the device in slot 1 answer to ports, from 0x1200 on.
        "mov dx, 0xcf8",
        "mov eax, 0x80000804",
        "out dx, eax",
        "mov dx, 0xcfc",
        "mov eax, 3",
        "out dx, eax",
        "mov ecx, 10000",
        "2: mov dx, 0x1214",
        "xor eax, eax",
        "out dx, al",
        "mov dx, 0x1208",
        "mov eax, 1",
        "out dx, eax",
        "mov dx, 0x120c",
        "out dx, eax",
        "mov dx, 0x1214",
        "mov al, 0xf",
        "out dx, al",
        "dec ecx",
        "jnz 2b",
        "mov al, 0xfe",
        "out 0x64, al",
        "3: hlt",
        "jmp 3b"
    );
    let guest = Prepared::new(guest);
    let errors = File::create(guest.config.console.with_file_name("vmm.log")).unwrap();
    let mut process = Process::start(guest, errors, &[]);
    assert_eq!(process.wait().code(), Some(Exit::Reset.code()), "{:?}", process.messages());
    let messages = process.messages();
    assert!(messages[0].contains("the device in slot 1 needs a reset: vsock: queue 0"), "{messages:?}");
    assert!(messages[messages.len() - 2].ends_with("(10000 times)"), "{messages:?}");
    assert_eq!(messages.last().unwrap(), &Exit::Reset.to_string());
    assert!(messages.len() < 20, "{messages:?}");
    let size = |name: &str| fs::metadata(process.directory().join(name)).unwrap().len();
    assert_eq!((size(MESSAGES), size("vmm.log")), (MESSAGES_SIZE as u64, 0));
    assert_eq!(fs::metadata(process.guest.config.messages()).unwrap().permissions().mode() & 0o7777, 0o600);
}

fn why_a_machine_ended_is_among_its_messages() {
    for (code, missing, reason) in [
        (code!("ud2"), None, Exit::TripleFault.to_string()),
        (code!("hlt"), Some("kernel"), "cannot take hold of".to_owned()),
    ] {
        let guest = Prepared::new(code);
        if let Some(name) = missing {
            fs::remove_file(guest.config.console.with_file_name(name)).unwrap();
        }
        let errors = File::create(guest.config.console.with_file_name("vmm.log")).unwrap();
        let mut process = Process::start(guest, errors, &[]);
        assert_ne!(process.wait().code(), Some(0));
        let messages = process.messages();
        assert!(messages.last().is_some_and(|last| last.contains(&reason)), "{messages:?}");
        assert_eq!(process.errors(), "");
    }
}

fn what_cannot_be_said_ends_nothing() {
    // Nothing is open yet: it says so on standard error, which takes nothing.
    let mut guest = Prepared::new(code!("hlt"));
    guest.config.memory_mib = 1;
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let mut process = Process::start(guest, full(), &[]);
    assert_eq!((process.wait().code(), process.messages()), (Some(1), vec![]));
    // And in its jail.
    let mut process = Process::start(Prepared::new(code!("ud2")), full(), &[]);
    assert_eq!(process.wait().code(), Some(Exit::TripleFault.code()));
}

fn a_panic_on_any_thread_is_said_and_ends_the_process() {
    // A thread of the VMM's while it is jailed and filtered.
    let off = code!("mov dx, 0x510", "mov al, 1", "out dx, al", "2: hlt", "jmp 2b");
    let guest = Prepared::new(off);
    let errors = File::create(guest.config.console.with_file_name("vmm.log")).unwrap();
    let mut process = Process::start(guest, errors, &[PANIC]);
    assert_eq!(process.wait().signal(), Some(libc::SIGABRT), "{:?}", process.messages());
    let messages = process.messages();
    assert!(messages.last().is_some_and(|last| last.contains("as the test asks for")), "{messages:?}");
    assert!(messages.last().is_some_and(|last| last.contains("process.rs")), "it says where: {messages:?}");
    // And before all that: there is no such file.
    let guest = Prepared::new(off);
    let path = guest.config.console.with_file_name("vmm.log");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["vmm".as_ref(), std::ffi::OsStr::from_bytes(b"/nonexistent")]);
    let mut child = command.stderr(File::create(&path).unwrap()).spawn().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGABRT));
    let said = fs::read_to_string(path).unwrap();
    assert!(said.contains("nacelle vmm: ") && said.contains("No such file"), "{said}");
}
