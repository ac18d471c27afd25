//! The log file of one container, shared by its streams.
//!
//! A log is rotated by its reader: the kubelet renames the file and asks to reopen the
//! log. Which bytes of the streams a file holds is therefore not told by the file alone:
//! the container's record keeps the [`Place`] of the current one, and is written before
//! the first line goes to a new file. A daemon that starts again finds the file by that,
//! under whatever name it has by now.

use std::fs::{self, File, Metadata};
use std::io::{self, BufReader, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nacelle_proto::stdio::Stream;
use serde::{Deserialize, Serialize};

use super::format::{Measure, measure};
use crate::{Error, Result};

/// Which file a log is in, and the offsets in the process's streams at which it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    device: u64,
    inode: u64,
    /// Below 0 by what lay in the file before the process started.
    stdout: i64,
    /// As `stdout`.
    stderr: i64,
}

impl Place {
    /// The place of a file that holds `held`, at the end of which the streams are at these offsets.
    fn ending(file: &Metadata, held: &Measure, stdout: i64, stderr: i64) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
            stdout: stdout.saturating_sub_unsigned(held.stdout),
            stderr: stderr.saturating_sub_unsigned(held.stderr),
        }
    }

    fn is(&self, file: &Metadata) -> bool {
        (self.device, self.inode) == (file.dev(), file.ino())
    }

    /// The offsets behind what a file of this place holds.
    fn end(&self, held: &Measure) -> (i64, i64) {
        (self.stdout.saturating_add_unsigned(held.stdout), self.stderr.saturating_add_unsigned(held.stderr))
    }
}

/// An open log. Lines are appended whole, one `write` each time where the disk lets it.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    // Held for one write: the streams' lines must not interleave within a line.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    stdout: i64,
    stderr: i64,
}

impl LogFile {
    /// Opens or creates the log, drops an incomplete last line, and counts what it holds.
    /// `place` is what was returned before for this process, if anything was.
    ///
    /// A symbolic link at `path` is refused: the directory belongs to the kubelet, but
    /// what lies in it may not.
    pub fn open(path: &Path, place: Option<Place>) -> Result<(Self, Place)> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(Error::io("create log directory", directory))?;
        }
        let there = fs::symlink_metadata(path).ok();
        let earlier = match place {
            Some(place) if !there.as_ref().is_some_and(|file| place.is(file)) => find(path, &place)?,
            _ => None,
        };
        let (file, place, (stdout, stderr)) = match (place, earlier) {
            // Renamed, but nobody asked to reopen it yet: it goes on where it is, as if the daemon had
            // never been away.
            (Some(place), Some((file, held))) if there.is_none() => (file, place, place.end(&held)),
            (place, earlier) => {
                let (file, held) = open(path)?;
                let metadata = file.metadata().map_err(Error::io("read log", path))?;
                let end = match (place, earlier) {
                    (None, _) => (0, 0),
                    (Some(place), _) if place.is(&metadata) => place.end(&held),
                    (Some(place), Some((_, held))) => place.end(&held),
                    // The agent will tell what it still has.
                    (Some(place), None) => (place.stdout, place.stderr),
                };
                (file, Place::ending(&metadata, &held, end.0, end.1), end)
            }
        };
        Ok((Self { path: path.into(), state: Mutex::new(State { file, stdout, stderr }) }, place))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// First byte of a stream that is in no file of the log yet.
    pub fn offset(&self, stream: Stream) -> u64 {
        let state = self.lock();
        u64::try_from(if stream == Stream::Stderr { state.stderr } else { state.stdout }).unwrap_or(0)
    }

    /// Appends whole lines that hold `bytes` bytes of a stream. If the disk refuses a part,
    /// the part that it took is cut off again, so that the lines can be tried once more as
    /// they are.
    pub fn append(&self, stream: Stream, bytes: u64, lines: &[u8]) -> io::Result<()> {
        let mut state = self.lock();
        let before = state.file.metadata()?.len();
        if let Err(error) = state.file.write_all(lines) {
            let _ = state.file.set_len(before);
            return Err(error);
        }
        state.count(stream, bytes);
        Ok(())
    }

    /// Counts bytes of a stream as written that nobody has any more.
    pub fn skip(&self, stream: Stream, bytes: u64) {
        self.lock().count(stream, bytes);
    }

    /// Goes on in a new file at the log's path, if the file there is not the current one.
    /// `record` notes the new file's place; if it fails, the log stays where it is.
    pub fn reopen(&self, record: impl FnOnce(Place) -> Result<()>) -> Result<()> {
        let mut state = self.lock();
        let (file, held) = open(&self.path)?;
        let identity = |file: &File| file.metadata().map_err(Error::io("read log", &self.path));
        let (new, old) = (identity(&file)?, identity(&state.file)?);
        if (new.dev(), new.ino()) == (old.dev(), old.ino()) {
            return Ok(());
        }
        record(Place::ending(&new, &held, state.stdout, state.stderr))?;
        state.file = file;
        Ok(())
    }
}

impl State {
    fn count(&mut self, stream: Stream, bytes: u64) {
        let total = if stream == Stream::Stderr { &mut self.stderr } else { &mut self.stdout };
        *total = total.saturating_add_unsigned(bytes);
    }
}

/// Opens a log file for appending, without an incomplete last line, and counts it.
fn open(path: &Path) -> Result<(File, Measure)> {
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
    Ok((file, held))
}

/// Finds the file of `place` beside `path`, where a rotation leaves it.
fn find(path: &Path, place: &Place) -> Result<Option<(File, Measure)>> {
    let Some(directory) = path.parent() else { return Ok(None) };
    for entry in fs::read_dir(directory).map_err(Error::io("read log directory", directory))?.flatten() {
        // Not through links: DirEntry does not follow them.
        if entry.metadata().is_ok_and(|file| file.is_file() && place.is(&file)) {
            return open(&entry.path()).map(Some);
        }
    }
    tracing::warn!(log = %path.display(), "the file that the log was in is gone");
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    fn offsets(log: &LogFile) -> (u64, u64) {
        (log.offset(Stream::Stdout), log.offset(Stream::Stderr))
    }

    #[test]
    fn opening_again_drops_the_torn_line_and_counts_the_rest() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sub/0.log");
        let (log, place) = LogFile::open(&path, None).unwrap();
        assert_eq!(offsets(&log), (0, 0));
        log.append(Stream::Stdout, 6, b"t stdout F hello\n").unwrap();
        log.append(Stream::Stderr, 1, b"t stderr P x\nt stdout F torn").unwrap();
        drop(log);
        let (log, again) = LogFile::open(&path, Some(place)).unwrap();
        assert_eq!((offsets(&log), again), ((6, 1), place));
        log.append(Stream::Stdout, 6, b"t stdout F again\n").unwrap();
        assert_eq!(read(&path), "t stdout F hello\nt stderr P x\nt stdout F again\n");
    }

    #[test]
    fn what_lay_there_before_the_process_started_is_not_its_output() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        fs::write(&path, "t stdout F of another\n").unwrap();
        let (log, place) = LogFile::open(&path, None).unwrap();
        assert_eq!(offsets(&log), (0, 0));
        log.append(Stream::Stdout, 3, b"t stdout F my\n").unwrap();
        drop(log);
        assert_eq!(offsets(&LogFile::open(&path, Some(place)).unwrap().0), (3, 0));
    }

    #[test]
    fn a_rotated_log_goes_on_in_a_new_file_at_the_same_offsets() {
        let directory = tempfile::tempdir().unwrap();
        let (path, rotated) = (directory.path().join("0.log"), directory.path().join("0.log.1"));
        let (log, first) = LogFile::open(&path, None).unwrap();
        log.append(Stream::Stdout, 4, b"t stdout F one\n").unwrap();
        let mut place = first;
        log.reopen(|new| {
            place = new;
            Ok(())
        })
        .unwrap();
        assert_eq!(place, first, "nothing was renamed, so nothing changes");
        fs::rename(&path, &rotated).unwrap();
        log.reopen(|new| {
            place = new;
            Ok(())
        })
        .unwrap();
        assert!(path.exists(), "it is there when the call returns");
        log.append(Stream::Stdout, 4, b"t stdout F two\n").unwrap();
        assert_eq!((read(&rotated).as_str(), read(&path).as_str()), ("t stdout F one\n", "t stdout F two\n"));
        drop(log);
        let (log, _) = LogFile::open(&path, Some(place)).unwrap();
        assert_eq!(offsets(&log), (8, 0), "the daemon that starts again knows of both files");
    }

    #[test]
    fn a_crash_at_any_point_of_a_rotation_loses_and_repeats_nothing() {
        for (renamed, created, recorded) in
            [(false, false, false), (true, false, false), (true, true, false), (true, true, true)]
        {
            let directory = tempfile::tempdir().unwrap();
            let (path, rotated) = (directory.path().join("0.log"), directory.path().join("0.log.1"));
            let (log, mut place) = LogFile::open(&path, None).unwrap();
            log.append(Stream::Stdout, 4, b"t stdout F one\n").unwrap();
            if renamed {
                fs::rename(&path, &rotated).unwrap();
            }
            if created {
                let result = log.reopen(|new| {
                    if recorded {
                        place = new;
                        return Ok(());
                    }
                    Err(Error::Internal("crashed here".into()))
                });
                assert_eq!(result.is_ok(), recorded);
            }
            drop(log);
            let (log, place) = LogFile::open(&path, Some(place)).unwrap();
            assert_eq!(offsets(&log), (4, 0), "renamed {renamed}, created {created}, recorded {recorded}");
            log.append(Stream::Stdout, 4, b"t stdout F two\n").unwrap();
            drop(log);
            assert_eq!(offsets(&LogFile::open(&path, Some(place)).unwrap().0), (8, 0));
            let all = read(if renamed { &rotated } else { &path }) + &if created { read(&path) } else { String::new() };
            assert_eq!(all, "t stdout F one\nt stdout F two\n");
        }
    }

    #[test]
    fn a_symbolic_link_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &path).unwrap();
        assert!(LogFile::open(&path, None).is_err());
        assert!(!directory.path().join("elsewhere").exists());
    }
}
