//! Directories in which the servers of registries are configured: `certs.d/HOST/hosts.toml`.

use std::path::{Path, PathBuf};

use super::endpoint::{Endpoint, default_endpoint};
use super::hosts;
use crate::error::{Error, Result};

/// What a directory is called that is for every registry without one of its own.
const DEFAULT: &str = "_default";
const FILE: &str = "hosts.toml";

/// Finds the servers of registries in directories, anew for each pull: a change counts from the next one on.
#[derive(Debug, Clone, Default)]
pub struct Mirrors {
    directories: Vec<PathBuf>,
}

impl Mirrors {
    /// Looks in these directories, in this order; the first that has something for a registry counts. None needs to
    /// exist.
    #[must_use]
    pub fn new(directories: Vec<PathBuf>) -> Self {
        Self { directories }
    }

    /// The servers of the registry `host` (with its port, as in references), in the order in which they are tried.
    ///
    /// # Errors
    /// [`Error::Configuration`] if what is configured cannot be read, or says what is not understood.
    pub fn endpoints(&self, host: &str) -> Result<Vec<Endpoint>> {
        for directory in &self.directories {
            for name in names(host) {
                let found = directory.join(name);
                let known = found.try_exists().map_err(|error| Error::Configuration {
                    what: found.display().to_string(),
                    reason: format!("cannot be looked at: {error}"),
                })?;
                if known {
                    return of(&found, host);
                }
            }
        }
        Ok(vec![default_endpoint(host)])
    }
}

/// What the directory of a registry may be called. Not every file system takes a colon.
fn names(host: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((name, port)) = host.rsplit_once(':')
        && !port.is_empty()
        && port.bytes().all(|byte| byte.is_ascii_digit())
    {
        names.push(format!("{name}_{port}_"));
    }
    names.extend([host.to_owned(), DEFAULT.to_owned()]);
    names
}

fn of(directory: &Path, host: &str) -> Result<Vec<Endpoint>> {
    let file = directory.join(FILE);
    let wrong = |path: &Path, reason: String| Error::Configuration { what: path.display().to_string(), reason };
    match std::fs::read_to_string(&file) {
        Ok(text) => hosts::parse(&text, directory, host).map_err(|reason| wrong(&file, reason)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            hosts::certificates(directory, host).map_err(|reason| wrong(directory, reason))
        }
        Err(error) => Err(wrong(&file, format!("cannot be read: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(mirrors: &Mirrors, host: &str) -> Vec<String> {
        mirrors.endpoints(host).unwrap().into_iter().map(|endpoint| endpoint.url).collect()
    }

    #[test]
    fn the_nearest_directory_counts_and_changes_at_once() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let missing = first.path().join("missing");
        let mirrors = Mirrors::new(vec![missing, first.path().into(), second.path().into()]);
        let write = |directory: &Path, name: &str, mirror: &str| {
            std::fs::create_dir_all(directory.join(name)).unwrap();
            std::fs::write(directory.join(name).join(FILE), format!("[host.\"{mirror}\"]\n")).unwrap();
        };
        let server = "https://reg.test:5000".to_owned();
        assert_eq!(urls(&mirrors, "reg.test:5000"), std::slice::from_ref(&server));
        for (directory, name) in [
            (second.path(), DEFAULT),
            (second.path(), "reg.test:5000"),
            (first.path(), DEFAULT),
            (first.path(), "reg.test:5000"),
            (first.path(), "reg.test_5000_"),
        ] {
            let mirror = format!("https://{}.test", name.replace([':', '_'], "-"));
            write(directory, name, &mirror);
            assert_eq!(urls(&mirrors, "reg.test:5000"), [mirror, server.clone()]);
        }
        assert_eq!(urls(&mirrors, "other.test"), ["https://-default.test", "https://other.test"]);
    }

    #[test]
    fn a_damaged_file_is_named_and_not_ignored() {
        let directory = tempfile::tempdir().unwrap();
        let host = directory.path().join("reg.test");
        std::fs::create_dir(&host).unwrap();
        let mirrors = Mirrors::new(vec![directory.path().into()]);
        std::fs::write(host.join(FILE), "server =").unwrap();
        let error = mirrors.endpoints("reg.test").unwrap_err().to_string();
        assert!(error.contains("reg.test/hosts.toml"), "{error}");
        std::fs::remove_file(host.join(FILE)).unwrap();
        assert_eq!(urls(&mirrors, "reg.test"), ["https://reg.test"]);
        std::fs::write(host.join("ca.crt"), "nonsense").unwrap();
        let error = mirrors.endpoints("reg.test").unwrap_err().to_string();
        assert!(error.contains("ca.crt"), "{error}");
    }
}
