//! One run of one plugin's program (specification, section 2).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde_json::{Map, Value};

use crate::cancel::Cancel;
use crate::{Error, Result};

/// The most bytes of a plugin's output that are looked at.
const OUTPUT_LIMIT: u64 = 4 << 20;
/// The most characters of what it says on standard error that are passed on.
const WORDS_LIMIT: usize = 1000;
/// The longest name of a plugin: as long as a file's can be.
const NAME_LIMIT: usize = 255;
/// How long a plugin that was killed may take to go. One that waits inside the kernel goes when that lets it.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Where plugins are, and how long they may take.
#[derive(Debug, Clone)]
pub struct Plugins {
    /// Directories, the first of which that has a program wins.
    pub directories: Vec<PathBuf>,
    /// Time for one command.
    pub limit: Duration,
    /// When all commands have to have ended, if they have a limit in common.
    pub until: Option<Instant>,
    /// Ends the commands, if anything can.
    pub cancel: Option<Arc<Cancel>>,
}

/// What a plugin is asked.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// ADD, CHECK, DEL, GC or STATUS.
    pub command: &'static str,
    /// The network's name, for messages.
    pub network: &'a str,
    /// Variables beside the command and the directories.
    pub variables: &'a [(&'static str, &'a str)],
}

/// Whether this is a name of a program in a directory of plugins, and of nothing else.
pub(super) fn is_plain(plugin: &str) -> bool {
    !plugin.is_empty() && plugin.len() <= NAME_LIMIT && !plugin.contains(['/', '\0']) && plugin != "." && plugin != ".."
}

impl Plugins {
    /// The program of a plugin.
    pub(super) fn find(&self, plugin: &str, network: &str) -> Result<PathBuf> {
        if !is_plain(plugin) {
            return Err(Error::Invalid(format!(
                "CNI plugin {plugin:?} of the network {network:?}: a type is the plain name of a program"
            )));
        }
        self.directories.iter().map(|directory| directory.join(plugin)).find(|path| path.is_file()).ok_or_else(|| {
            let directories: Vec<_> = self.directories.iter().map(|path| path.display().to_string()).collect();
            Error::PluginMissing {
                plugin: plugin.into(),
                network: network.into(),
                directories: directories.join(" or "),
            }
        })
    }

    /// Runs a plugin to its end and returns what it printed, if anything.
    ///
    /// The program gets the plugin's configuration, and dies with this process, so that
    /// nothing goes on being made for a daemon that is gone. Blocks.
    pub(super) fn run(&self, plugin: &str, call: &Call<'_>, config: &Map<String, Value>) -> Result<Option<Value>> {
        let program = self.find(plugin, call.network)?;
        let failed = |message: String, code: Option<u64>| Error::Plugin {
            plugin: plugin.into(),
            network: call.network.into(),
            command: call.command,
            message,
            code,
        };
        let text = serde_json::to_vec(config).map_err(|error| failed(error.to_string(), None))?;
        // Files in memory, not pipes: nobody has to read or write while the other does, and
        // what a plugin leaves running in the background holds nothing up.
        let mut input = memory_file()?;
        input
            .write_all(&text)
            .and_then(|()| input.rewind())
            .map_err(Error::system("hand a plugin its configuration"))?;
        let (mut output, mut words) = (memory_file()?, memory_file()?);
        let handle = |file: &File| file.try_clone().map(Stdio::from).map_err(Error::system("start a plugin"));
        let directories = std::env::join_paths(&self.directories).map_err(|error| failed(error.to_string(), None))?;
        let mut command = Command::new(&program);
        command
            .env("CNI_COMMAND", call.command)
            .env("CNI_PATH", directories)
            .envs(call.variables.iter().copied())
            .current_dir("/")
            .stdin(handle(&input)?)
            .stdout(handle(&output)?)
            .stderr(handle(&words)?)
            .process_group(0);
        // SAFETY: between fork and exec there are four system calls, and nothing is allocated.
        unsafe {
            command.pre_exec(|| {
                // The kernel spares the daemon when memory is short, and a plugin not for its sake.
                let _ = std::fs::write("/proc/self/oom_score_adj", "0");
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into)
            });
        }
        let child = command.spawn().map_err(Error::path("start the CNI plugin", &program))?;
        let limit = match self.until {
            Some(until) => self.limit.min(until.saturating_duration_since(Instant::now())),
            None => self.limit,
        };
        let status = match wait(child, limit, self.cancel.as_deref()).map_err(Error::system("wait for a plugin"))? {
            Ended::ByItself(status) => status,
            Ended::Late => {
                return Err(Error::Timeout {
                    plugin: plugin.into(),
                    network: call.network.into(),
                    command: call.command,
                    limit,
                });
            }
            Ended::Cancelled => return Err(Error::Cancelled),
        };
        let said = read(&mut output)?;
        if status.success() {
            if said.trim_ascii().is_empty() {
                return Ok(None);
            }
            return serde_json::from_slice(&said)
                .map(Some)
                .map_err(|error| failed(format!("its output is no JSON ({error})"), None));
        }
        let (message, code) = complaint(status, &said, &read(&mut words)?);
        Err(failed(message, code))
    }
}

/// A plugin's failure in words, and its code: its own, by the specification on standard output.
fn complaint(status: ExitStatus, said: &[u8], words: &[u8]) -> (String, Option<u64>) {
    if let Ok(Value::Object(error)) = serde_json::from_slice(said) {
        let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default().trim().to_owned();
        let (message, details) = (text("msg"), text("details"));
        let code = error.get("code").and_then(Value::as_u64);
        if !message.is_empty() || code.is_some() {
            let details = if details.is_empty() { details } else { format!("; {details}") };
            let number = code.map(|code| format!(" (code {code})")).unwrap_or_default();
            return (cut(&format!("{message}{details}{number}")).to_owned(), code);
        }
    }
    let words = String::from_utf8_lossy(if words.trim_ascii().is_empty() { said } else { words });
    let said = match cut(words.trim()) {
        "" => format!("it said nothing ({status})"),
        words => format!("{words} ({status})"),
    };
    (said, None)
}

/// The end of what was said, if it is too long: there it says what went wrong.
fn cut(words: &str) -> &str {
    let start = words.char_indices().rev().nth(WORDS_LIMIT - 1).map_or(0, |(at, _)| at);
    words.get(start..).unwrap_or_default()
}

fn memory_file() -> Result<File> {
    memfd_create("cni", MemfdFlags::CLOEXEC).map(File::from).map_err(Error::system("make a file in memory"))
}

fn read(file: &mut File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.take(OUTPUT_LIMIT).read_to_end(&mut bytes))
        .map_err(Error::system("read what a plugin said"))?;
    Ok(bytes)
}

/// How a command ended.
enum Ended {
    ByItself(ExitStatus),
    Late,
    Cancelled,
}

/// Waits for a child, and kills it and its own after `limit`, or when that is asked for.
fn wait(mut child: Child, limit: Duration, cancel: Option<&Cancel>) -> std::io::Result<Ended> {
    // A child that is not waited for keeps its number.
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(std::io::ErrorKind::InvalidInput)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now() + limit;
    let ended = loop {
        let mut events = vec![PollFd::new(&pidfd, PollFlags::IN)];
        events.extend(cancel.map(|cancel| PollFd::new(cancel, PollFlags::IN)));
        match poll(&mut events, Some(&rest(deadline))) {
            Ok(0) => break Ended::Late,
            Ok(_) if events.first().is_some_and(|event| !event.revents().is_empty()) => {
                return child.wait().map(Ended::ByItself);
            }
            Ok(_) => break Ended::Cancelled,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let _ = kill_process_group(pid, Signal::KILL);
    let deadline = Instant::now() + KILL_LIMIT;
    while let Err(rustix::io::Errno::INTR) = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&rest(deadline))) {}
    if !matches!(child.try_wait(), Ok(Some(_))) {
        tracing::warn!(pid = child.id(), "a CNI plugin that was killed hangs in the kernel: it is not waited for");
        // Somebody has to take its status when it goes at last.
        std::thread::Builder::new().name("network-reaper".into()).spawn(move || drop(child.wait()))?;
    }
    Ok(ended)
}

fn rest(deadline: Instant) -> Timespec {
    let rest = deadline.saturating_duration_since(Instant::now());
    Timespec { tv_sec: i64::try_from(rest.as_secs()).unwrap_or(i64::MAX), tv_nsec: rest.subsec_nanos().into() }
}
