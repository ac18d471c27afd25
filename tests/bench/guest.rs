//! A guest that takes orders: the program of tests/bench-guest on the kernel that all share,
//! with one tap as its network and, where files are measured, a directory of the host.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nacelle_tests::client::limit;
use nacelle_vmm::config::Start;
use nacelle_vmm::control::{Access, Client, ClientError, Request, Response};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tempfile::TempDir;

use crate::Setting;
use crate::boot::{self, MEMORY_MIB};

/// The tap that all share, and the host's address on it.
const TAP: &str = "bench0";
const HOST: &str = "10.9.0.1/24";
/// Where the guest takes orders, see tests/bench-guest.
const GUEST: ([u8; 4], u16) = ([10, 9, 0, 2], 7);
const MAC: [u8; 6] = [2, 0, 0, 9, 0, 2];
/// What the guest mounts the host's directory by, and where it is below that.
const TAG: &str = "nacelle";
const SHARE: &str = "share";

/// Who serves the guest's devices.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Our VMM.
    Ours,
    /// QEMU, and Debian's virtiofsd.
    Qemu,
    /// QEMU, with the host kernel's help for the network.
    Vhost,
}

/// The tap, while there is one.
pub struct Tap;

impl Tap {
    /// Makes it.
    pub fn new() -> Result<Self> {
        ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
        let tap = Self;
        ip(&["address", "add", HOST, "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", TAP]);
    }
}

/// The setting with the kernel of all and the program that takes orders.
pub fn setting(setting: &Setting) -> Result<Setting> {
    let initramfs = std::env::var("NACELLE_BENCH_INITRAMFS").context("NACELLE_BENCH_INITRAMFS is set by hack/bench")?;
    Ok(Setting { initramfs: PathBuf::from(initramfs), ..setting.clone() })
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status().context("run ip: install iproute2")?;
    if !status.success() {
        bail!("ip {} ended with {status}", arguments.join(" "));
    }
    Ok(())
}

/// A guest that takes orders. Killed when dropped.
pub struct Guest {
    /// Where it takes them. It ends with the guest.
    pub stream: TcpStream,
    _processes: Processes,
}

impl Guest {
    /// Starts one, with the directory `share` of the host if there is one, waits until it
    /// takes orders, and gives it some.
    ///
    /// # Errors
    /// With the guest's last words, if there are any.
    pub fn with<T>(
        setting: &Setting,
        side: Side,
        share: Option<&Path>,
        orders: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let directory = tempfile::Builder::new().prefix("b").tempdir_in("/tmp")?;
        let done = Self::start(setting, side, share, &directory).and_then(|mut guest| orders(&mut guest));
        done.map_err(|error| {
            let lines = nacelle_vmm::console::tail(&directory.path().join("console"), 20).unwrap_or_default();
            error.context(lines.join("\n"))
        })
    }

    fn start(setting: &Setting, side: Side, share: Option<&Path>, directory: &TempDir) -> Result<Self> {
        let mut processes = Processes(Vec::new());
        if side == Side::Ours {
            nacelle(setting, directory, share, &mut processes)?;
        } else {
            let socket = share.map(|share| virtiofsd(share, directory, &mut processes)).transpose()?;
            let vhost = if side == Side::Vhost { "on" } else { "off" };
            qemu(setting, vhost, socket.as_deref(), &mut processes)?;
        }
        let stream = connect(&mut processes.0)?;
        end_with(&processes.0, stream.try_clone()?)?;
        Ok(Self { stream, _processes: processes })
    }

    /// Gives an order: its letter and its count.
    pub fn order(&mut self, letter: u8, count: u64) -> Result<Instant> {
        let mut order = vec![letter];
        order.extend(count.to_le_bytes());
        let begun = Instant::now();
        self.stream.write_all(&order)?;
        Ok(begun)
    }

    /// Gives an order that is answered by a byte when it is done, and returns the milliseconds
    /// until then.
    pub fn done(&mut self, letter: u8, count: u64) -> Result<f64> {
        let begun = self.order(letter, count)?;
        self.stream.read_exact(&mut [0])?;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }
}

/// Processes that are killed when dropped, the last first.
struct Processes(Vec<Child>);

impl Drop for Processes {
    fn drop(&mut self) {
        for process in self.0.iter_mut().rev() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Connects to the guest, once it listens.
fn connect(processes: &mut [Child]) -> Result<TcpStream> {
    let deadline = Instant::now() + limit(60);
    loop {
        match TcpStream::connect_timeout(&SocketAddr::from(GUEST), limit(1)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(limit(60)))?;
                return Ok(stream);
            }
            Err(error) if Instant::now() > deadline => return Err(error).context("the guest does not listen"),
            Err(_) => {}
        }
        for process in processes.iter_mut() {
            if let Some(status) = process.try_wait()? {
                bail!("process {} of the guest ended with {status}", process.id());
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ends the connection when the first of the processes does: what is gone will not answer, and
/// an emulated host's clock may take hours to the end of a deadline.
fn end_with(processes: &[Child], stream: TcpStream) -> Result<()> {
    let mut watched = Vec::new();
    for process in processes {
        let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw).context("a process id")?;
        watched.push(pidfd_open(pid, PidfdFlags::empty())?);
    }
    std::thread::spawn(move || {
        let mut ended: Vec<_> = watched.iter().map(|process| PollFd::new(process, PollFlags::IN)).collect();
        while matches!(poll(&mut ended, None), Err(rustix::io::Errno::INTR)) {}
        let _ = stream.shutdown(Shutdown::Both);
    });
    Ok(())
}

fn nacelle(setting: &Setting, directory: &TempDir, share: Option<&Path>, processes: &mut Processes) -> Result<()> {
    let (config, mut command) = boot::ours(setting, directory.path(), Start::Boot)?;
    processes.0.push(command.spawn().with_context(|| format!("start {}", setting.nacelle.display()))?);
    let mut client = Client::connect(&config.control, Instant::now() + limit(20))?;
    let mut call = |request: Request, files: &[File]| -> Result<Response, ClientError> {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        client.call(&request, &files, limit(20))
    };
    if let Some(share) = share {
        call(Request::AddFs, &[]).context("give the guest the device of volumes")?;
        let request = Request::AddVolume { name: SHARE.into(), access: Access::Write, plain: false };
        call(request, &[File::open(share.join(SHARE))?]).context("give the guest its volume")?;
    }
    call(Request::AddNet { mac: MAC, mtu: 1500, owner: String::new() }, &[tap()?])
        .context("give the guest its interface")?;
    Ok(())
}

/// Debian's virtiofsd with its own defaults, on `share`; returns its socket.
fn virtiofsd(share: &Path, directory: &TempDir, processes: &mut Processes) -> Result<PathBuf> {
    let socket = directory.path().join("fs");
    let process = Command::new("/usr/lib/qemu/virtiofsd")
        .arg(format!("--socket-path={}", socket.display()))
        .arg("-o")
        .arg(format!("source={}", share.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start virtiofsd: install qemu-system-common")?;
    processes.0.push(process);
    let deadline = Instant::now() + limit(20);
    while !socket.exists() {
        if Instant::now() > deadline {
            bail!("virtiofsd makes no socket");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(socket)
}

fn qemu(setting: &Setting, vhost: &str, fs: Option<&Path>, processes: &mut Processes) -> Result<()> {
    let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
    // Its microvm has no PCI without ACPI, which the kernel has not. Nor has the kernel legacy
    // interrupts: a serial port's would be a device's.
    let mut command = boot::peer(setting, "pc,usb=off", "");
    if let Some(socket) = fs {
        // What serves the files reads and writes the guest's memory.
        command
            .args(["-object", &format!("memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on")])
            .args(["-numa", "node,memdev=memory", "-chardev"])
            .arg(format!("socket,id=fs,path={}", socket.display()))
            .args(["-device", &format!("vhost-user-fs-pci,chardev=fs,tag={TAG},queue-size=1024")]);
    }
    command
        .args(["-serial", "none"])
        .arg("-netdev")
        .arg(format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}"))
        .arg("-device")
        .arg(format!("virtio-net-pci,netdev=net,disable-legacy=on,romfile=,mac={mac}"));
    processes.0.push(command.spawn().context("start qemu-system-x86_64")?);
    Ok(())
}

/// A descriptor of the tap.
fn tap() -> std::io::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // struct ifreq: 16 bytes of name, 2 of flags, the rest unused.
    let mut request = [0u8; 40];
    request[..TAP.len()].copy_from_slice(TAP.as_bytes());
    let flags: u16 = 0x0002 | 0x1000 | 0x4000; // IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: see SetInterface.
    unsafe { rustix::ioctl::ioctl(&file, SetInterface(request))? };
    Ok(file)
}

/// TUNSETIFF with its argument.
struct SetInterface([u8; 40]);

// SAFETY: TUNSETIFF is _IOW('T', 202, int), and reads and writes one `struct ifreq`, which is 40 bytes on
// 64-bit Linux, whatever its number says of the size.
unsafe impl rustix::ioctl::Ioctl for SetInterface {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> rustix::ioctl::Opcode {
        rustix::ioctl::opcode::write::<std::ffi::c_int>(b'T', 202)
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        self.0.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(
        _: rustix::ioctl::IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<Self::Output> {
        Ok(())
    }
}
