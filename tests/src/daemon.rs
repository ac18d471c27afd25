//! A daemon of a test's own, to be broken.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nacelle_proto::runtime::v1 as cri;
use tempfile::TempDir;

use crate::client::{Client, limit};
use crate::host;

/// A daemon with directories of its own. Everything is killed and removed when it is dropped.
pub struct Daemon {
    child: Option<Child>,
    directory: TempDir,
    program: PathBuf,
    /// Its configuration but for what another release needs.
    config: String,
}

impl Daemon {
    /// Starts one with these lines at the end of its configuration.
    pub async fn start(extra: &str) -> Result<Self> {
        let mut daemon = Self::configured(extra)?;
        daemon.restart().await?;
        Ok(daemon)
    }

    /// One that is not started yet, whose pods have no network.
    pub fn configured(extra: &str) -> Result<Self> {
        Self::with(|_| format!("network.cni = \"off\"\n{extra}"))
    }

    /// One that is not started yet, whose pods join the networks in its directory `cni`. It
    /// looks for plugins in its directory `plugins`, and then where they are installed.
    pub fn networked(extra: &str) -> Result<Self> {
        let daemon = Self::with(|path| {
            format!(
                "network.conf_directory = \"{path}/cni\"\nnetwork.netns_directory = \"{path}/netns\"\n\
                 network.plugin_directories = [\"{path}/plugins\", \"/usr/lib/cni\"]\n{extra}"
            )
        })?;
        for name in ["cni", "plugins"] {
            std::fs::create_dir(daemon.path().join(name))?;
        }
        Ok(daemon)
    }

    fn with(keys: impl FnOnce(std::path::Display<'_>) -> String) -> Result<Self> {
        // Unix sockets want short paths.
        let directory = tempfile::Builder::new().prefix("n").rand_bytes(4).tempdir_in("/tmp")?;
        let path = directory.path().display();
        let own = format!("socket = \"{path}/cri.sock\"\nroot = \"{path}/root\"\nrun = \"{path}/r\"\n");
        let config = format!("{own}{}\n", keys(directory.path().display()));
        std::fs::write(directory.path().join("config.toml"), &config)?;
        Ok(Self { child: None, directory, program: "nacelle".into(), config })
    }

    /// Has another release start from now on, from the `nacelle` and `initramfs.cpio` of a directory; none is the one
    /// that is installed.
    pub fn use_release(&mut self, release: Option<&Path>) -> Result<()> {
        let keys = release.map(|directory| format!("guest.initramfs = {:?}\n", directory.join("initramfs.cpio")));
        self.program = release.map_or("nacelle".into(), |directory| directory.join("nacelle"));
        let config = format!("{}{}", keys.unwrap_or_default(), self.config);
        Ok(std::fs::write(self.directory.path().join("config.toml"), config)?)
    }

    /// Starts the daemon (again) and waits until it answers.
    pub async fn restart(&mut self) -> Result<()> {
        self.launch(&self.program.clone(), &[])?;
        self.answered().await
    }

    /// The same, with so many file descriptors until it is given more.
    pub async fn restart_with_descriptors(&mut self, descriptors: u32) -> Result<()> {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={descriptors}:4096")).arg("nacelle");
        self.launch_by(command, &[])?;
        self.answered().await
    }

    /// Starts this program as the daemon (again), with these variables; does not wait for it.
    pub fn launch(&mut self, program: &Path, variables: &[(&str, &str)]) -> Result<()> {
        self.launch_by(Command::new(program), variables)
    }

    fn launch_by(&mut self, mut command: Command, variables: &[(&str, &str)]) -> Result<()> {
        let log = std::fs::File::options().append(true).create(true).open(self.log_path())?;
        let child = command
            .arg("--config")
            .arg(self.directory.path().join("config.toml"))
            .arg("daemon")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.child = Some(child);
        Ok(())
    }

    /// Waits until the daemon that was launched answers.
    pub async fn answered(&mut self) -> Result<()> {
        let deadline = tokio::time::Instant::now() + limit(30);
        // A connection alone says little: what a daemon that was killed was about to start may have its socket still.
        while !self.answers().await {
            if let Some(status) = self.status() {
                bail!("the daemon ended with {status}: {}", self.log());
            }
            if tokio::time::Instant::now() > deadline {
                bail!("the daemon does not answer: {}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Whether it answers.
    pub async fn answers(&self) -> bool {
        let asked = async {
            let client = Client::connect(&self.socket()).await.ok()?;
            client.runtime.clone().version(cri::VersionRequest::default()).await.ok()
        };
        // A daemon that stands still accepts, and does not answer.
        tokio::time::timeout(limit(2), asked).await.is_ok_and(|answer| answer.is_some())
    }

    /// How it ended, if it has.
    pub fn status(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().ok().flatten())
    }

    /// Its process; none if it was not started, or killed.
    pub fn pid(&self) -> Option<rustix::process::Pid> {
        let pid = self.child.as_ref().and_then(|child| i32::try_from(child.id()).ok());
        pid.and_then(rustix::process::Pid::from_raw)
    }

    /// Runs it until it ends by itself; returns its log. For daemons that must not start.
    pub async fn expect_failure(&mut self) -> Result<String> {
        match self.restart().await {
            Ok(()) => bail!("the daemon started"),
            Err(error) => Ok(format!("{error:#}")),
        }
    }

    /// Kills the daemon with SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Ends the daemon with SIGTERM and waits for it.
    pub fn terminate(&mut self) -> Result<()> {
        let mut child = self.child.take().context("a running daemon")?;
        let pid = rustix::process::Pid::from_raw(i32::try_from(child.id())?).context("a pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = child.wait()?;
        if !status.success() {
            bail!("the daemon ended with {status}: {}", self.log());
        }
        Ok(())
    }

    /// Its CRI.
    pub async fn client(&self) -> Client {
        Client::connect(&self.socket()).await.expect("connect to the test's own daemon")
    }

    /// Its directory: `root`, `r` (run), `config.toml`, `log`.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("cri.sock")
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// What it said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// What is left of pods under its directories, once it had time to remove it: a daemon that starts does so in the
    /// background. Nothing else of the test runs meanwhile, not even its calls: where they are to go on, look with
    /// [`Daemon::there`].
    pub fn leftovers(&self) -> Vec<String> {
        let deadline = std::time::Instant::now() + limit(5);
        loop {
            let found = self.there();
            if found.is_empty() || std::time::Instant::now() > deadline {
                return found;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What there is of pods under its directories now.
    pub fn there(&self) -> Vec<String> {
        let mut found = host::leftovers(&self.directory.path().join("root"), &self.directory.path().join("r"));
        found.extend(self.netns().into_iter().map(|path| path.display().to_string()));
        found
    }

    /// The network namespaces of its pods.
    pub fn netns(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.directory.path().join("netns")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        for (pid, _) in host::vmm_processes(&self.directory.path().join("r")) {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        for netns in self.netns() {
            let _ = rustix::mount::unmount(netns, rustix::mount::UnmountFlags::DETACH);
        }
    }
}
