//! The log file of one container, shared by its streams.

use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::format::{Measure, measure};
use crate::{Error, Result};

/// An open log. Lines are appended whole, one `write` each time where the disk lets it.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    // Held for one write: the streams' lines must not interleave within a line.
    file: Mutex<File>,
}

impl LogFile {
    /// Opens or creates the log, drops an incomplete last line, and counts what it holds.
    ///
    /// A symbolic link at `path` is refused: the directory belongs to the kubelet, but
    /// what lies in it may not.
    pub fn open(path: &Path) -> Result<(Self, Measure)> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(Error::io("create log directory", directory))?;
        }
        let file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o640)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)
            .map_err(Error::io("open log", path))?;
        let held = measure(BufReader::new(&file)).map_err(Error::io("read log", path))?;
        let length = file.metadata().map_err(Error::io("read log", path))?.len();
        if length > held.whole {
            file.set_len(held.whole).map_err(Error::io("truncate log", path))?;
        }
        Ok((Self { path: path.into(), file: Mutex::new(file) }, held))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends whole lines. If the disk refuses a part, the part that it took is cut off
    /// again, so that the lines can be tried once more as they are.
    pub fn append(&self, lines: &[u8]) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = file.metadata()?.len();
        file.write_all(lines).inspect_err(|_| {
            let _ = file.set_len(before);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opening_again_drops_the_torn_line_and_counts_the_rest() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sub/0.log");
        let (log, held) = LogFile::open(&path).unwrap();
        assert_eq!(held, Measure::default());
        log.append(b"t stdout F hello\nt stderr P x\nt stdout F torn").unwrap();
        drop(log);
        let (log, held) = LogFile::open(&path).unwrap();
        assert_eq!((held.stdout, held.stderr), (6, 1));
        log.append(b"t stdout F again\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "t stdout F hello\nt stderr P x\nt stdout F again\n");
    }

    #[test]
    fn a_symbolic_link_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &path).unwrap();
        assert!(LogFile::open(&path).is_err());
        assert!(!directory.path().join("elsewhere").exists());
    }
}
