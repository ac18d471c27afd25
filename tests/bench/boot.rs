//! From exec of the VMM to a ready agent: `nacelle vmm` against QEMU's microvm machine,
//! with the same kernel, initramfs, memory and number of processors.
//!
//! Ours says it is ready through its vsock device, QEMU's guest by a line on the serial
//! console, for which it needs no device at all: that is in the peer's favour.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nacelle_vmm::config::{MachineConfig, Start};

use crate::Setting;
use crate::report::Report;

/// Memory of the guests in MiB, and their processors.
pub const MEMORY_MIB: u64 = 256;
pub const VCPUS: u8 = 1;
/// What the agent writes to the console when asked to.
const READY: &str = "nacelle-agent: ready";

/// Alternates both, after one round each that does not count.
pub fn run(setting: &Setting) -> Result<Report> {
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for round in 0..=setting.rounds {
        let a = Guest::nacelle(setting)?.ready_after;
        let b = Guest::qemu(setting)?.ready_after;
        if round > 0 {
            ours.push(a);
            peer.push(b);
        }
    }
    Ok(Report { name: "boot".into(), unit: "ms".into(), ours, peer, peer_name: "QEMU microvm".into() })
}

/// A guest whose agent is ready. Killed when dropped.
pub struct Guest {
    /// Its VMM.
    pub process: Child,
    /// Milliseconds from exec to ready.
    pub ready_after: f64,
    pub(crate) _directory: tempfile::TempDir,
}

impl Guest {
    /// Ours.
    pub fn nacelle(setting: &Setting) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("b").tempdir_in("/tmp")?;
        let (config, mut command) = ours(setting, directory.path(), Start::Boot)?;
        let port = nacelle_proto::stdio::READY_PORT;
        let listener = UnixListener::bind(MachineConfig::vsock_listener(&config.vsock, port))?;
        let begun = Instant::now();
        let mut process = command.spawn().with_context(|| format!("start {}", setting.nacelle.display()))?;
        let ready = accept(&listener, &mut process, &config.console);
        let ready_after = begun.elapsed().as_secs_f64() * 1e3;
        let guest = Self { process, ready_after, _directory: directory };
        ready?;
        Ok(guest)
    }

    /// QEMU's.
    pub fn qemu(setting: &Setting) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let begun = Instant::now();
        let machine = "microvm,x-option-roms=off,pit=off,pic=off,isa-serial=on,rtc=off,acpi=off";
        let mut process = peer(setting, machine, "console=ttyS0 nacelle.announce=console")
            .args(["-serial", "stdio"])
            .stdout(Stdio::piped())
            .spawn()
            .context("start qemu-system-x86_64")?;
        let console = process.stdout.take().context("the console")?;
        let mut lines = BufReader::new(console);
        let (mut line, mut said) = (Vec::new(), String::new());
        loop {
            line.clear();
            if lines.by_ref().take(4096).read_until(b'\n', &mut line)? == 0 {
                let _ = process.kill();
                bail!("QEMU's guest ended before it was ready: {said}");
            }
            let text = String::from_utf8_lossy(&line);
            if text.contains(READY) {
                break;
            }
            said.push_str(&text);
        }
        Ok(Self { process, ready_after: begun.elapsed().as_secs_f64() * 1e3, _directory: directory })
    }
}

/// A guest of ours with its files in `directory`, and the command that starts it.
pub fn ours(setting: &Setting, directory: &Path, start: Start) -> Result<(MachineConfig, Command)> {
    let path = |name: &str| directory.join(name);
    let config = MachineConfig {
        id: "bench".into(),
        kernel: setting.kernel.clone(),
        initramfs: setting.initramfs.clone(),
        cmdline: String::new(),
        memory_mib: MEMORY_MIB,
        vcpus: VCPUS,
        vsock: path("vsock"),
        control: path("control"),
        console: path("console"),
        start,
    };
    std::fs::write(path("vmm.json"), serde_json::to_vec(&config)?)?;
    let mut command = Command::new(&setting.nacelle);
    command.args(["vmm", "--config"]).arg(path("vmm.json")).stdin(Stdio::null());
    Ok((config, command))
}

/// What starts a guest of QEMU's with the same kernel, initramfs, memory and processors, and
/// `words` more on the kernel's command line. Its devices are the caller's to name.
pub fn peer(setting: &Setting, machine: &str, words: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", machine, "-enable-kvm", "-cpu", "host", "-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-smp", &VCPUS.to_string(), "-m", &MEMORY_MIB.to_string(), "-display", "none"])
        .arg("-kernel")
        .arg(&setting.kernel)
        .arg("-initrd")
        .arg(&setting.initramfs)
        .args(["-append", &format!("quiet reboot=t panic=-1 tsc=reliable {words}")])
        .stdin(Stdio::null());
    command
}

/// Waits for the agent's connection, or for the end of the VMM.
pub fn accept(listener: &UnixListener, process: &mut Child, console: &Path) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(process.id())?).context("a pid")?;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let mut fds = [
        rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN),
        rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN),
    ];
    rustix::event::poll(&mut fds, None)?;
    if fds[0].revents().is_empty() {
        let status = process.wait()?;
        let lines = nacelle_vmm::console::tail(console, 20).unwrap_or_default();
        bail!("the guest ended before it was ready ({status}): {}", lines.join("\n"));
    }
    let (mut stream, _) = listener.accept()?;
    let mut line = [0; 6];
    stream.read_exact(&mut line)?;
    if &line != b"ready " {
        bail!("the agent said {:?}", String::from_utf8_lossy(&line));
    }
    Ok(())
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
