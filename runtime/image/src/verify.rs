//! Programs that are asked whether an image may be pulled, as containerd asks its verifiers.
//!
//! Each file in a directory is such a program. It gets `-name REFERENCE -digest DIGEST -stdin-media-type TYPE`, and
//! the descriptor of what the reference means on its standard input. It lets the image be pulled by exit code 0, and
//! says why or why not on its standard output. All that are asked must allow it. Without a directory, or with an empty
//! one, everything is allowed; one that cannot be listed allows nothing.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::digest::Digest;
use crate::error::{Error, Result};

const MEDIA_TYPE: &str = "application/vnd.oci.descriptor.v1+json";
/// Bytes of what a program says that are passed on.
const MAX_WORDS: u64 = 4 << 10;

/// Where the verifiers are, and how they are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verifiers {
    /// Directory of the programs.
    pub bin_dir: PathBuf,
    /// How many of them are asked, the first by name; None for all.
    pub max_verifiers: Option<usize>,
    /// How long each may take; one that takes longer does not allow the image.
    pub per_verifier_timeout: Duration,
}

/// What a reference means: the content to be judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Subject {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

impl Verifiers {
    /// Asks whether the image `name` may be pulled. Waits for the programs.
    ///
    /// # Errors
    /// [`Error::Refused`] with the first program that does not allow it, and its reason.
    pub(crate) fn judge(&self, name: &str, subject: &Subject) -> Result<()> {
        let listed = self.programs();
        let programs = listed.map_err(|error| {
            let reason = format!("the verifiers in {} cannot be listed: {error}", self.bin_dir.display());
            Error::refused(name, reason)
        })?;
        for program in programs {
            let refused = |reason: String| Error::refused(name, format!("verifier {}: {reason}", program.display()));
            let (status, said) = self.ask(&program, name, subject).map_err(|error| refused(error.to_string()))?;
            if !status.success() {
                return Err(refused(if said.is_empty() { status.to_string() } else { said }));
            }
            tracing::debug!(image = name, verifier = %program.display(), reason = said, "allowed");
        }
        Ok(())
    }

    fn programs(&self) -> io::Result<Vec<PathBuf>> {
        let entries = match std::fs::read_dir(&self.bin_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut programs = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        programs.sort();
        programs.truncate(self.max_verifiers.unwrap_or(usize::MAX));
        Ok(programs)
    }

    fn ask(&self, program: &Path, name: &str, subject: &Subject) -> io::Result<(ExitStatus, String)> {
        let Subject { media_type, digest, size } = subject;
        let descriptor = serde_json::json!({ "mediaType": media_type, "digest": digest, "size": size }).to_string();
        // Files, for a pipe may be held open by whatever the program has left behind.
        let (mut input, said, mut complaints) = (tempfile::tempfile()?, tempfile::tempfile()?, tempfile::tempfile()?);
        input.write_all(descriptor.as_bytes())?;
        input.rewind()?;
        let child = Command::new(program)
            .args(["-name", name, "-digest", &digest.to_string(), "-stdin-media-type", MEDIA_TYPE])
            .stdin(input)
            .stdout(Stdio::from(said.try_clone()?))
            .stderr(Stdio::from(complaints.try_clone()?))
            .current_dir("/")
            .process_group(0)
            .spawn()?;
        // The daemon's own protection is not for what it starts.
        let _ = std::fs::write(format!("/proc/{}/oom_score_adj", child.id()), "0");
        let status = wait(child, self.per_verifier_timeout)?;
        if let Ok(text) = words(&mut complaints)
            && !text.is_empty()
        {
            tracing::debug!(image = name, verifier = %program.display(), text, "said on its standard error");
        }
        Ok((status, words(&mut { said })?))
    }
}

/// Waits until a program ends, or ends it with all that it has started.
fn wait(mut child: Child, patience: Duration) -> io::Result<ExitStatus> {
    let process = Pid::from_child(&child);
    if let Err(error) = until_end(process, patience) {
        let _ = kill_process_group(process, Signal::KILL);
        child.wait()?;
        return Err(error);
    }
    child.wait()
}

/// Waits until a child of this process has ended, and can be waited for.
fn until_end(process: Pid, patience: Duration) -> io::Result<()> {
    let (end, deadline) = (pidfd_open(process, PidfdFlags::empty())?, Instant::now() + patience);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&end, PollFlags::IN)], Some(&limit)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, format!("it took longer than {patience:?}"))),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The beginning of what a program has said, in one line.
fn words(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(MAX_WORDS).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(line.chars().filter(|c| !c.is_control()).collect())
}
