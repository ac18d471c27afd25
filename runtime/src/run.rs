//! `nacelle run IMAGE [-- COMMAND]`: one container in a guest of its own, no daemon needed.
//!
//! Every run has a directory of its own for its pod, locked while it lives; a run that was
//! killed is cleaned up by the next. Images are kept in a store that all runs share.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nacelle_image::{Image, ImageStore, Progress};
use nacelle_sandbox::{ContainerConfig, ExitInfo, ExitReason, Manager, NamespaceMode, NetworkMode, SandboxConfig};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::logging;

/// How long a container that was interrupted may take to end.
const GRACE: Duration = Duration::from_secs(10);
/// How often its log is looked at.
const FOLLOW: Duration = Duration::from_millis(10);
/// Exit code after an interrupt, as shells count it.
const INTERRUPTED: u8 = 130;

/// What to run.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// Image, for example docker.io/library/busybox:latest or 127.0.0.1:5000/busybox.
    image: String,
    /// Command instead of the image's own.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Runs the container and passes its exit code on.
pub fn main(config: Config, arguments: RunArguments) -> anyhow::Result<ExitCode> {
    logging::start("warn")?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the async runtime")?;
    let code = runtime.block_on(run(config, arguments))?;
    Ok(ExitCode::from(code))
}

async fn run(config: Config, arguments: RunArguments) -> anyhow::Result<u8> {
    crate::check::guests_can_run(&config.default_guest()).map_err(anyhow::Error::msg)?;
    let base = config.root.join("run");
    let image = pull(&config, &base, &arguments.image).await?;
    sweep(&config, &base).await;
    let name = format!("{}", std::process::id());
    let own = own_config(&config, &base, &name);
    let logs = own.root.join("logs");
    let manager = Manager::open(own.manager(program()?)).await?;
    let result = in_pod(&manager, &logs, image, arguments).await;
    // Whatever happened, nothing of the pod stays.
    for sandbox in manager.sandboxes() {
        manager.remove_sandbox(&sandbox.id).await?;
    }
    drop(manager);
    remove(&own);
    result
}

/// The configuration of one run: its own directories, guests as those of the default handler.
fn own_config(config: &Config, base: &Path, name: &str) -> Config {
    let mut network = config.network.clone();
    if network.cni == NetworkMode::Required {
        // A command for trying things works without a cluster's network, too.
        network.cni = NetworkMode::Optional;
    }
    Config {
        root: base.join("pods").join(name),
        run: config.run.join("r").join(name),
        network,
        guest: config.default_guest(),
        handlers: BTreeMap::new(),
        ..config.clone()
    }
}

fn program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("find this program")
}

fn remove(own: &Config) {
    for directory in [&own.root, &own.run] {
        if let Err(error) = std::fs::remove_dir_all(directory) {
            tracing::warn!(path = %directory.display(), %error, "not removed");
        }
    }
}

/// Cleans up after runs that were killed.
async fn sweep(config: &Config, base: &Path) {
    let Ok(entries) = std::fs::read_dir(base.join("pods")) else { return };
    for name in entries.filter_map(Result::ok).filter_map(|entry| entry.file_name().into_string().ok()) {
        let own = own_config(config, base, &name);
        let Ok(program) = program() else { return };
        // Fails while its owner lives: the directory is locked.
        let Ok(manager) = Manager::open(own.manager(program)).await else { continue };
        if manager.read_records().await.is_err() {
            continue;
        }
        manager.recover().await;
        let mut clean = true;
        for sandbox in manager.sandboxes() {
            clean &= manager.remove_sandbox(&sandbox.id).await.is_ok();
        }
        // What network plugins did not undo is on record there.
        clean &= manager.network().settle().await.is_ok_and(|left| left == 0);
        drop(manager);
        if clean {
            remove(&own);
        }
    }
}

/// Pulls the image, with a progress bar on a terminal.
async fn pull(config: &Config, base: &Path, reference: &str) -> anyhow::Result<Image> {
    let store = ImageStore::open_with(&base.join("images"), config.image_options())?;
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}")?);
    bar.set_message(format!("pulling {reference}"));
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let shown = bar.clone();
    let image = store
        .pull(reference, None, move |progress: Progress| {
            shown.set_length(progress.total);
            shown.set_position(progress.done);
        })
        .await?;
    bar.finish_and_clear();
    Ok(image)
}

async fn in_pod(manager: &Manager, logs: &Path, image: Image, arguments: RunArguments) -> anyhow::Result<u8> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let name = "run".to_owned();
    let sandbox = SandboxConfig {
        name: name.clone(),
        namespace: "nacelle".into(),
        uid: std::process::id().to_string(),
        log_directory: logs.to_string_lossy().into_owned(),
        pid: NamespaceMode::Container,
        ..SandboxConfig::default()
    };
    let container = ContainerConfig {
        name,
        image: arguments.image,
        command: arguments.command,
        log_path: "output".into(),
        ..ContainerConfig::default()
    };
    let work = async {
        let pod = manager.run_sandbox(sandbox).await?;
        let id = manager.create_container(&pod, container, image).await?;
        manager.start_container(&id).await?;
        let exit = follow(manager, &id).await?;
        anyhow::Ok(u8::try_from(exit.code).unwrap_or(u8::MAX))
    };
    tokio::select! {
        code = work => return code,
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    for container in manager.containers() {
        manager.stop_container(&container.id, GRACE).await?;
    }
    Ok(INTERRUPTED)
}

/// Prints what the container says until it has ended and all of it is printed.
async fn follow(manager: &Manager, id: &str) -> anyhow::Result<ExitInfo> {
    let path = manager.container(id)?.log_path;
    let file = std::fs::File::open(&path).with_context(|| format!("read log {path}"))?;
    let mut log = BufReader::new(file);
    let mut line = Vec::new();
    loop {
        // The end is visible only when the log is complete: look at it before the log.
        let exit = manager.container(id)?.exit;
        while log.read_until(b'\n', &mut line)? > 0 {
            if line.ends_with(b"\n") {
                print(&line)?;
                line.clear();
            }
        }
        if let Some(exit) = exit {
            if exit.reason == ExitReason::SandboxDied {
                anyhow::bail!("{}", exit.message);
            }
            return Ok(exit);
        }
        tokio::select! {
            ended = manager.wait_container(id) => ended?,
            () = tokio::time::sleep(FOLLOW) => {}
        }
    }
}

/// Prints one line of the log where it was said.
fn print(line: &[u8]) -> std::io::Result<()> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let (_, stream, tag, content) = (parts.next(), parts.next(), parts.next(), parts.next());
    let content = content.unwrap_or_default();
    let content = if tag == Some(b"P") { content.strip_suffix(b"\n").unwrap_or(content) } else { content };
    if stream == Some(b"stderr") {
        let mut out = std::io::stderr().lock();
        out.write_all(content)?;
        out.flush()
    } else {
        let mut out = std::io::stdout().lock();
        out.write_all(content)?;
        out.flush()
    }
}
