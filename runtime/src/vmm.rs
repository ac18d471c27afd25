//! `nacelle vmm --config FILE`: one guest, in this process, until it ends.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use nacelle_vmm::config::MachineConfig;

/// Runs the machine; `words` are what follows `vmm`.
pub fn main(words: impl Iterator<Item = OsString>) -> ExitCode {
    nacelle_vmm::end_at_a_panic();
    match run(words) {
        Ok(code) => code,
        Err(error) => {
            nacelle_vmm::say(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(mut words: impl Iterator<Item = OsString>) -> anyhow::Result<ExitCode> {
    let (flag, path) = (words.next(), words.next().map(PathBuf::from));
    let path = match (flag, path, words.next()) {
        (Some(flag), Some(path), None) if flag == "--config" => path,
        _ => anyhow::bail!("usage: nacelle vmm --config FILE"),
    };
    // A session of its own: no terminal's hang-up reaches a pod. Fails only for a process
    // that leads one already.
    let _ = rustix::process::setsid();
    let config = read(&path)?;
    let exit = nacelle_vmm::run_jailed(&config)?;
    if exit.code() != 0 {
        nacelle_vmm::say(&exit.to_string());
    }
    Ok(ExitCode::from(u8::try_from(exit.code()).unwrap_or(1)))
}

fn read(path: &Path) -> anyhow::Result<MachineConfig> {
    let text = std::fs::read(path).with_context(|| format!("read machine configuration {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("machine configuration {}", path.display()))
}
