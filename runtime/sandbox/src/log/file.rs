//! The log file of one container, shared by its streams.
//!
//! A log is rotated by its reader: the kubelet renames the file and asks to reopen the
//! log. Which bytes of the streams a file holds is therefore not told by the file alone:
//! the container's record keeps the [`Place`] of the current one, and is written before
//! the first line goes to a new file. A daemon that starts again finds the file by that,
//! under whatever name it has by now.

use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nacelle_proto::stdio::Stream;
use rustix::fs::{FileType, OFlags, SeekFrom};
use serde::{Deserialize, Serialize};

use super::Location;
use super::format::{Counter, Measure};
use crate::beneath::Directory;
use crate::{Error, Result};

/// Most files of a log directory that are looked through for one that was renamed.
const FILES: usize = 10_000;
/// How much of a log is counted at a time, in bytes.
const CHUNK_BYTES: usize = 64 * 1024;

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

    fn identity(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    fn is(&self, file: &Metadata) -> bool {
        self.identity() == identify(file)
    }

    /// The offsets behind what a file of this place holds.
    fn end(&self, held: &Measure) -> (i64, i64) {
        (self.stdout.saturating_add_unsigned(held.stdout), self.stderr.saturating_add_unsigned(held.stderr))
    }
}

/// An open log. Lines are appended whole, one `write` each time where the disk lets it.
#[derive(Debug)]
pub struct LogFile {
    location: Location,
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
    /// Blocks for as long as the disk takes to read the log: not for a worker of the runtime. What is not a regular file, or is
    /// reached by a link below [`Location`]'s line, is refused and left as it is. A failure changes nothing that matters: with
    /// the same `place` it can be tried again at any time, for the agent keeps what no log has.
    pub fn open(location: Location, place: Option<Place>) -> Result<(Self, Place)> {
        let path = location.path();
        let directory = location.directory()?;
        let there = directory.stat(location.file())?;
        let earlier = match place {
            Some(place) if there.as_ref().is_none_or(|file| (file.st_dev, file.st_ino) != place.identity()) => {
                find(&directory, &path, &place)?
            }
            _ => None,
        };
        let (file, place, (stdout, stderr)) = match (place, earlier) {
            // Renamed, but nobody asked to reopen it yet: it goes on where it is, as if the daemon had
            // never been away.
            (Some(place), Some((file, held))) if there.is_none() => (file, place, place.end(&held)),
            (place, earlier) => {
                let file = open(&directory, location.file(), true)?;
                let held = count(&file, &path)?;
                let metadata = file.metadata().map_err(Error::io("read log", &path))?;
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
        Ok((Self { location, path, state: Mutex::new(State { file, stdout, stderr }) }, place))
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
    /// `record` notes the new file's place; if it fails, the log stays where it is. Blocks, as [`LogFile::open`].
    pub fn reopen(&self, record: impl FnOnce(Place) -> Result<()>) -> Result<()> {
        let file = open(&self.location.directory()?, self.location.file(), true)?;
        let identity = |file: &File| file.metadata().map_err(Error::io("read log", &self.path));
        let new = identity(&file)?;
        let is_current = |state: &State| Ok::<_, Error>(identify(&new) == identify(&identity(&state.file)?));
        if is_current(&self.lock())? {
            return Ok(());
        }
        // Nobody writes to it yet, and it may take a while: lines meanwhile go where they went.
        let held = count(&file, &self.path)?;
        let mut state = self.lock();
        if is_current(&state)? {
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

fn identify(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Opens a log file for appending.
fn open(directory: &Directory, name: &Path, create: bool) -> Result<File> {
    let flags = OFlags::RDWR | OFlags::APPEND | if create { OFlags::CREATE } else { OFlags::empty() };
    directory.file(name, flags, 0o640)
}

/// Cuts an incomplete last line off, and counts the rest.
fn count(file: &File, path: &Path) -> Result<Measure> {
    let length = file.metadata().map_err(Error::io("read log", path))?.len();
    let held = measure(file, length).map_err(Error::io("read log", path))?;
    if length > held.whole {
        file.set_len(held.whole).map_err(Error::io("truncate log", path))?;
    }
    Ok(held)
}

/// Counts the first `length` bytes of a log. Holes, of which a file of any size can be made in no time, are passed over.
fn measure(file: &File, length: u64) -> io::Result<Measure> {
    let mut counter = Counter::default();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut at = 0;
    while at < length {
        let most = usize::try_from(length - at).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        let got = match file.read_at(chunk.get_mut(..most).unwrap_or_default(), at) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let data = chunk.get(..got).unwrap_or_default();
        counter.push(data);
        at += got as u64;
        if data.iter().all(|byte| *byte == 0) {
            let next = match rustix::fs::seek(file, SeekFrom::Data(at)) {
                Ok(next) => next.clamp(at, length),
                Err(rustix::io::Errno::NXIO) => length,
                // A file system that does not know of holes.
                Err(_) => at,
            };
            counter.push_zeros(next - at);
            at = next;
        }
    }
    Ok(counter.measure())
}

/// Finds the file of `place` in the log's directory, where a rotation leaves it.
fn find(directory: &Directory, path: &Path, place: &Place) -> Result<Option<(File, Measure)>> {
    match directory.names(FILES) {
        Ok(names) => {
            for name in names {
                let file = directory.stat(&name).ok().flatten();
                let file = file.filter(|file| FileType::from_raw_mode(file.st_mode) == FileType::RegularFile);
                if file.is_some_and(|file| (file.st_dev, file.st_ino) == place.identity()) {
                    let file = open(directory, name.as_ref(), false)?;
                    let held = count(&file, path)?;
                    return Ok(Some((file, held)));
                }
            }
            tracing::warn!(log = %path.display(), "the file that the log was in is gone");
        }
        Err(error) => tracing::warn!(%error, "the file that the log was in is not looked for"),
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::Instant;

    use rustix::fs::{CWD, Mode, mknodat};

    use super::*;

    fn open(path: &Path, place: Option<Place>) -> Result<(LogFile, Place)> {
        LogFile::open(Location::new(path, Path::new(path.file_name().unwrap())).unwrap(), place)
    }

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
        let (log, place) = open(&path, None).unwrap();
        assert_eq!(offsets(&log), (0, 0));
        log.append(Stream::Stdout, 6, b"t stdout F hello\n").unwrap();
        log.append(Stream::Stderr, 1, b"t stderr P x\nt stdout F torn").unwrap();
        drop(log);
        let (log, again) = open(&path, Some(place)).unwrap();
        assert_eq!((offsets(&log), again), ((6, 1), place));
        log.append(Stream::Stdout, 6, b"t stdout F again\n").unwrap();
        assert_eq!(read(&path), "t stdout F hello\nt stderr P x\nt stdout F again\n");
    }

    #[test]
    fn what_lay_there_before_the_process_started_is_not_its_output() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        fs::write(&path, "t stdout F of another\n").unwrap();
        let (log, place) = open(&path, None).unwrap();
        assert_eq!(offsets(&log), (0, 0));
        log.append(Stream::Stdout, 3, b"t stdout F my\n").unwrap();
        drop(log);
        assert_eq!(offsets(&open(&path, Some(place)).unwrap().0), (3, 0));
    }

    #[test]
    fn a_rotated_log_goes_on_in_a_new_file_at_the_same_offsets() {
        let directory = tempfile::tempdir().unwrap();
        let (path, rotated) = (directory.path().join("0.log"), directory.path().join("0.log.1"));
        let (log, first) = open(&path, None).unwrap();
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
        let (log, _) = open(&path, Some(place)).unwrap();
        assert_eq!(offsets(&log), (8, 0), "the daemon that starts again knows of both files");
    }

    #[test]
    fn a_crash_at_any_point_of_a_rotation_loses_and_repeats_nothing() {
        for (renamed, created, recorded) in
            [(false, false, false), (true, false, false), (true, true, false), (true, true, true)]
        {
            let directory = tempfile::tempdir().unwrap();
            let (path, rotated) = (directory.path().join("0.log"), directory.path().join("0.log.1"));
            let (log, mut place) = open(&path, None).unwrap();
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
            let (log, place) = open(&path, Some(place)).unwrap();
            assert_eq!(offsets(&log), (4, 0), "renamed {renamed}, created {created}, recorded {recorded}");
            log.append(Stream::Stdout, 4, b"t stdout F two\n").unwrap();
            drop(log);
            assert_eq!(offsets(&open(&path, Some(place)).unwrap().0), (8, 0));
            let all = read(if renamed { &rotated } else { &path }) + &if created { read(&path) } else { String::new() };
            assert_eq!(all, "t stdout F one\nt stdout F two\n");
        }
    }

    #[test]
    fn no_link_is_followed_from_the_pods_directory_on() {
        for link in ["pod", "pod/web", "pod/web/0.log"] {
            let (directory, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            // What the link leads to has all that is looked for.
            fs::create_dir_all(outside.path().join("web")).unwrap();
            for victim in ["web/0.log", "0.log", "file"] {
                fs::write(outside.path().join(victim), "precious, without a newline").unwrap();
            }
            fs::create_dir_all(directory.path().join("pod/web")).unwrap();
            let link = directory.path().join(link);
            fs::remove_dir(&link).or_else(|_| fs::remove_dir_all(&link)).ok();
            let target = if link.ends_with("0.log") { outside.path().join("file") } else { outside.path().to_owned() };
            symlink(&target, &link).unwrap();
            let path = directory.path().join("pod/web/0.log");
            let location = Location::new(&path, Path::new("web/0.log")).unwrap();
            let error = LogFile::open(location, None).unwrap_err().to_string();
            assert!(error.contains("symbolic link") || error.contains("Not a directory"), "{error}");
            for victim in ["web/0.log", "0.log", "file"] {
                assert_eq!(read(&outside.path().join(victim)), "precious, without a newline");
            }
            assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 3);
        }
    }

    #[test]
    fn logs_may_lie_on_another_disk_by_an_administrators_link() {
        let (directory, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(disk.path(), directory.path().join("pods")).unwrap();
        let location = Location::new(&directory.path().join("pods/pod/web/0.log"), Path::new("web/0.log")).unwrap();
        LogFile::open(location, None).unwrap();
        assert!(disk.path().join("pod/web/0.log").exists());
    }

    #[test]
    fn a_log_that_was_replaced_is_an_error_until_it_is_one_again() {
        let directory = tempfile::tempdir().unwrap();
        let (path, kept) = (directory.path().join("0.log"), directory.path().join("kept"));
        let (log, place) = open(&path, None).unwrap();
        log.append(Stream::Stdout, 4, b"t stdout F one\n").unwrap();
        fs::rename(&path, &kept).unwrap();
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        for place in [None, Some(place)] {
            let error = open(&path, place).unwrap_err().to_string();
            assert!(error.contains("named pipe"), "{error}");
        }
        log.reopen(|_| panic!("nothing was opened")).unwrap_err();
        log.append(Stream::Stdout, 4, b"t stdout F two\n").unwrap();
        drop(log);
        fs::rename(&kept, &path).unwrap();
        let (log, _) = open(&path, Some(place)).unwrap();
        assert_eq!(offsets(&log), (8, 0), "nothing is lost and nothing repeated");
    }

    #[test]
    fn an_endless_line_costs_neither_memory_nor_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        fs::write(&path, "t stdout F one\n").unwrap();
        File::options().append(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        let begun = Instant::now();
        let (log, _) = open(&path, None).unwrap();
        // A byte for a byte, it would take minutes and more memory than there is.
        assert!(begun.elapsed().as_secs() < 20);
        log.append(Stream::Stdout, 4, b"t stdout F two\n").unwrap();
        assert_eq!(read(&path), "t stdout F one\nt stdout F two\n", "a line without an end is no line");
    }

    #[test]
    fn a_directory_full_of_files_is_not_searched_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        let (log, place) = open(&path, None).unwrap();
        log.append(Stream::Stdout, 4, b"t stdout F one\n").unwrap();
        fs::remove_file(&path).unwrap();
        for number in 0..=FILES {
            File::create(directory.path().join(number.to_string())).unwrap();
        }
        let (log, _) = open(&path, Some(place)).unwrap();
        assert_eq!(offsets(&log), (0, 0), "the agent tells what it still has");
    }
}
