//! The configurations of a directory.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::list::NetworkList;
use crate::{Error, Result};

/// Ends of the names of configurations.
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];
/// The longest configuration in bytes.
const LENGTH_LIMIT: u64 = 1 << 20;

/// Reads the first `limit` configurations in the lexical order of their names.
///
/// # Errors
/// [`Error::NotConfigured`] if there are none; [`Error::Configuration`] for the first that
/// makes no sense, for taking the next would put pods into a network that nobody chose.
pub fn load(directory: &Path, limit: usize) -> Result<Vec<NetworkList>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(Error::NotConfigured(directory.into())),
        Err(error) => return Err(Error::path("read the directory", directory)(error)),
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(std::io::Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| EXTENSIONS.iter().any(|known| end == *known)))
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    let lists = files.iter().take(limit).map(|path| read(path)).collect::<Result<Vec<_>>>()?;
    if lists.is_empty() { Err(Error::NotConfigured(directory.into())) } else { Ok(lists) }
}

fn read(path: &Path) -> Result<NetworkList> {
    let length = fs::metadata(path).map_err(Error::path("read", path))?.len();
    if length > LENGTH_LIMIT {
        let reason = format!("has {length} bytes, at most {LENGTH_LIMIT} are possible");
        return Err(Error::Configuration { path: path.into(), reason });
    }
    NetworkList::parse(path, &fs::read(path).map_err(Error::path("read", path))?)
}
