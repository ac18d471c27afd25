//! From exec of the VMM to an answer of the agent of a guest that goes on where a saved one
//! stopped, as the daemon starts pods; against QEMU's microvm machine, which boots.
//!
//! The agent has been ready before, so it is asked: what answers the first bytes of an HTTP/2
//! connection is the agent itself, for the kernel knows nothing of those.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nacelle_proto::stdio::{AGENT_PORT, READY_PORT};
use nacelle_vmm::config::{MachineConfig, SavedFiles, Start};
use nacelle_vmm::control::{Client, Request};

use crate::Setting;
use crate::boot::{self, Guest};
use crate::report::Report;

/// More than anything takes, on any clock.
const PATIENCE: Duration = Duration::from_secs(60);
/// The client's preface of RFC 9113, section 3.4, with an empty frame of settings.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Alternates both, after one round each that does not count.
pub fn run(setting: &Setting) -> Result<Report> {
    let template = Template::make(setting)?;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for round in 0..=setting.rounds {
        let a = template.start(setting)?.ready_after;
        let b = Guest::qemu(setting)?.ready_after;
        if round > 0 {
            ours.push(a);
            peer.push(b);
        }
    }
    Ok(Report { name: "clone".into(), unit: "ms".into(), ours, peer, peer_name: "QEMU microvm".into() })
}

/// A guest that was saved when its agent was ready.
pub struct Template {
    files: SavedFiles,
    _directory: tempfile::TempDir,
}

impl Template {
    /// Boots and saves one.
    pub fn make(setting: &Setting) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("t").tempdir_in("/tmp")?;
        let path = |name: &str| directory.path().join(name);
        let files = SavedFiles { memory: path("memory"), state: path("state") };
        let (config, mut command) = boot::ours(setting, directory.path(), Start::Template(files.clone()))?;
        let listener = UnixListener::bind(MachineConfig::vsock_listener(&config.vsock, READY_PORT))?;
        let mut process = command.spawn().with_context(|| format!("start {}", setting.nacelle.display()))?;
        boot::accept(&listener, &mut process, &config.console)?;
        // As the daemon does: what it takes to answer is in memory from then on.
        ask(&config, &mut process)?;
        Client::connect(&config.control, Instant::now() + PATIENCE)?.call(&Request::Save, &[], PATIENCE)?;
        let status = process.wait()?;
        if !status.success() {
            bail!("the guest was not saved: {status}");
        }
        Ok(Self { files, _directory: directory })
    }

    /// Starts a guest from it.
    pub fn start(&self, setting: &Setting) -> Result<Guest> {
        let directory = tempfile::Builder::new().prefix("c").tempdir_in("/tmp")?;
        let (config, mut command) = boot::ours(setting, directory.path(), Start::Clone(self.files.clone()))?;
        let begun = Instant::now();
        let mut process = command.spawn().with_context(|| format!("start {}", setting.nacelle.display()))?;
        let answered = ask(&config, &mut process);
        let ready_after = begun.elapsed().as_secs_f64() * 1e3;
        let guest = Guest { process, ready_after, _directory: directory };
        answered?;
        Ok(guest)
    }
}

/// Returns when the agent has answered.
fn ask(config: &MachineConfig, process: &mut Child) -> Result<()> {
    let answered = || {
        Client::connect(&config.control, Instant::now() + PATIENCE)?.call(&Request::Status, &[], PATIENCE)?;
        let mut stream = UnixStream::connect(&config.vsock)?;
        stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes())?;
        let mut answers = BufReader::new(&stream);
        let mut line = String::new();
        answers.read_line(&mut line)?;
        if !line.starts_with("OK ") {
            bail!("the agent's port is not open");
        }
        (&stream).write_all(PREFACE)?;
        answers.read_exact(&mut [0; 9]).context("the agent does not answer")
    };
    answered().with_context(|| match process.try_wait() {
        Ok(Some(status)) => format!("the VMM ended with {status}"),
        _ => "the VMM runs".to_owned(),
    })
}
