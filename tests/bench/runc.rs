//! Debian's runc on the host: what a container costs where there is no guest.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// The programs of the container's root file system.
const PROGRAMS: [&str; 3] = ["busybox", "true", "sleep"];

/// A place for containers of runc's, with a root file system of busybox. They end when it is dropped.
pub struct Runc {
    directory: TempDir,
    started: Vec<String>,
}

impl Runc {
    /// Makes the place; its containers sleep.
    pub fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let bundle = directory.path().join("bundle");
        let binaries = bundle.join("rootfs/bin");
        std::fs::create_dir_all(&binaries)?;
        for name in PROGRAMS {
            std::fs::copy("/bin/busybox", binaries.join(name)).context("copy busybox: install busybox-static")?;
        }
        let runc = Self { directory, started: Vec::new() };
        runc.run(Command::new("runc").arg("spec").current_dir(&bundle))?;
        let path = bundle.join("config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = serde_json::json!(["sleep", "100000"]);
        std::fs::write(&path, serde_json::to_vec(&spec)?)?;
        Ok(runc)
    }

    /// Creates and starts a container.
    pub fn start(&mut self, name: &str) -> Result<()> {
        self.started.push(name.to_owned());
        self.run(
            self.command().args(["run", "--detach", "--bundle"]).arg(self.directory.path().join("bundle")).arg(name),
        )
    }

    /// Kills and removes one.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        self.started.retain(|started| started != name);
        self.run(self.command().args(["delete", "--force", name]))
    }

    /// Runs a further process in one.
    pub fn exec(&self, name: &str, command: &[&str]) -> Result<()> {
        self.run(self.command().args(["exec", name]).args(command))
    }

    fn command(&self) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.root());
        command
    }

    fn root(&self) -> PathBuf {
        Path::new(self.directory.path()).join("state")
    }

    fn run(&self, command: &mut Command) -> Result<()> {
        // Not piped: a detached container would hold the pipe.
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().context("run runc")?;
        if !status.success() {
            bail!("{command:?} ended with {status}");
        }
        Ok(())
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        for name in std::mem::take(&mut self.started) {
            let _ = self.remove(&name);
        }
    }
}
