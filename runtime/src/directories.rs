//! Where the pods of this host's daemon are: a daemon that looks for them elsewhere, because
//! somebody has changed `root` or `run`, would take none of them over, and nobody would ever
//! stop their guests.
//!
//! A daemon is known by its socket. Beside that, it writes down its directories, for the next
//! one. The file may go with the boot of the host: so do the guests.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::config::Config;

/// Digits of a pod's id.
const ID_DIGITS: usize = 64;
/// The most bytes that are read of the file.
const LIMIT: u64 = 16 << 10;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Directories {
    root: PathBuf,
    run: PathBuf,
}

/// Whether the pods of the daemon before are where this one looks.
///
/// # Errors
/// They are elsewhere, and what to do.
pub fn check(config: &Config) -> anyhow::Result<()> {
    let Some(before) = read(&file(config)) else { return Ok(()) };
    if before == of(config) {
        return Ok(());
    }
    let pods = |directory: &Path| names(&directory.join("pods"));
    let count = pods(&before.root).into_iter().filter(|id| pods(&before.run).contains(id)).count();
    if count > 0 {
        bail!(
            "{count} pods that were started with root = {:?} and run = {:?} are there, and would be lost with root = {:?} \
             and run = {:?}: set these keys as they were, or remove the pods first (crictl rmp --all --force)",
            before.root,
            before.run,
            config.root,
            config.run
        );
    }
    Ok(())
}

/// Writes down the directories of this daemon.
///
/// # Errors
/// The file cannot be written.
pub fn claim(config: &Config) -> anyhow::Result<()> {
    let path = file(config);
    if read(&path).is_some_and(|before| before == of(config)) {
        return Ok(());
    }
    let write = || {
        let new = path.with_extension("new");
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        std::fs::write(&new, serde_json::to_vec(&of(config))?)?;
        std::fs::rename(&new, &path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

fn of(config: &Config) -> Directories {
    Directories { root: config.root.clone(), run: config.run.clone() }
}

fn file(config: &Config) -> PathBuf {
    let mut name = config.socket.clone().into_os_string();
    name.push(".directories");
    name.into()
}

/// What is written there; none if it is not there or makes no sense.
fn read(path: &Path) -> Option<Directories> {
    let mut text = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, LIMIT), &mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// The ids of pods in a directory.
fn names(directory: &Path) -> std::collections::BTreeSet<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let is_id = |name: &String| name.len() == ID_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(is_id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_that_would_be_lost_by_another_directory_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let config = Config { socket: path("sock"), root: path("root"), run: path("run"), ..Config::default() };
        check(&config).unwrap();
        claim(&config).unwrap();
        check(&config).unwrap();
        let moved = [
            Config { root: path("other"), ..config.clone() },
            Config { run: path("other"), ..config.clone() },
            Config { root: path("other"), run: path("another"), ..config.clone() },
        ];
        let pod = "ab".repeat(32);
        for base in ["root", "run"] {
            moved.iter().for_each(|config| check(config).unwrap());
            std::fs::create_dir_all(path(base).join("pods").join(&pod)).unwrap();
        }
        for config in &moved {
            let said = check(config).unwrap_err().to_string();
            assert!(said.contains("1 pods") && said.contains(&path("root").display().to_string()), "{said}");
        }
        check(&config).unwrap();
        // Another daemon of the host.
        check(&Config { socket: path("other-sock"), ..moved[2].clone() }).unwrap();
        // Once they are gone, the new place holds.
        std::fs::remove_dir_all(path("run")).unwrap();
        check(&moved[0]).unwrap();
        claim(&moved[0]).unwrap();
        check(&moved[0]).unwrap();
        std::fs::write(file(&config), "no such form").unwrap();
        check(&config).unwrap();
    }
}
