//! The control group of one container.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::patience::scaled;

/// How long the kernel may take to be done with killed processes.
const PATIENCE: Duration = Duration::from_secs(10);

/// A directory of the unified hierarchy, which may not exist yet or any more.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The group at `path`, an absolute one.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the group and opens its directory.
    pub fn create(&self) -> Result<File> {
        fs::create_dir(&self.path).map_err(Error::path("make the control group", &self.path))?;
        File::open(&self.path).map_err(Error::path("open the control group", &self.path))
    }

    /// Kills every process in the group and below, at once, forks included.
    pub fn kill(&self) -> Result<()> {
        let file = self.path.join("cgroup.kill");
        match fs::write(&file, "1") {
            Err(error) if !gone(&error) => Err(Error::path("kill a control group by", file)(error)),
            _ => Ok(()),
        }
    }

    /// Kills one process of the group, by a group below for it alone.
    pub fn kill_one(&self, pid: i32) -> Result<()> {
        let alone = self.alone(pid);
        match alone.create() {
            Err(Error::Path { source, .. }) if source.kind() == ErrorKind::AlreadyExists => {}
            made => drop(made?),
        }
        let file = alone.path.join("cgroup.procs");
        match fs::write(&file, pid.to_string()) {
            // It has ended meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            Err(error) => Err(Error::path("move a process to be killed by", file)(error)),
            Ok(()) => alone.kill(),
        }
    }

    /// Removes the group that [`Cgroup::kill_one`] made for a process that has ended, if it did.
    /// What is left goes with the container.
    pub fn forget_one(&self, pid: i32) {
        let _ = fs::remove_dir(self.alone(pid).path);
    }

    fn alone(&self, pid: i32) -> Self {
        Self::at(self.path.join(format!("killed-{pid}")))
    }

    /// Makes a group below, for a process and what it starts. Like that of a process that is
    /// killed alone it has no controllers, so its processes count for this group, and a group
    /// may have it beside processes of its own.
    pub fn create_below(&self, name: &str) -> Result<Self> {
        let below = Self::at(self.path.join(name));
        drop(below.create()?);
        Ok(below)
    }

    /// Removes the group, unless a process is left in it; answers whether it is gone.
    pub fn remove_if_empty(&self) -> bool {
        remove_tree(&self.path).is_ok()
    }

    /// How many processes of the group and below the out-of-memory killer has struck so far.
    pub fn oom_kills(&self) -> u64 {
        fs::read_to_string(self.path.join("memory.events")).map_or(0, |events| field(&events, "oom_kill"))
    }

    /// Whether a process is left in the group or below.
    pub fn populated(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.events")).is_ok_and(|events| field(&events, "populated") != 0)
    }

    /// Ids of the processes in the group and below.
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        visit(&self.path, &mut |directory| {
            let list = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            found.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()));
        });
        found
    }

    /// Kills what is in the group and removes it with the groups below. One that does not
    /// exist is fine. Blocks, up to seconds.
    pub fn remove(&self) -> Result<()> {
        let deadline = Instant::now() + scaled(PATIENCE);
        let mut pause = Duration::from_millis(1);
        loop {
            self.kill()?;
            let error = match remove_tree(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if error.kind() != ErrorKind::ResourceBusy || Instant::now() >= deadline {
                return Err(Error::path("remove the control group", &self.path)(error));
            }
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
}

/// Whether an error only says that the group does not exist.
fn gone(error: &io::Error) -> bool {
    // A file of a group that was removed in the meantime answers ENODEV.
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// The value of a `name value` line, 0 if there is none.
fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// Calls `act` for every directory of the tree, children before their parent.
fn visit(directory: &Path, act: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            visit(&entry.path(), act);
        }
    }
    act(directory);
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    let mut result = Ok(());
    visit(directory, &mut |directory| match fs::remove_dir(directory) {
        Err(error) if !gone(&error) => result = Err(error),
        _ => {}
    });
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let events = "low 0\noom 7\noom_kill 3\noom_group_kill 9\n";
        assert_eq!(field(events, "oom_kill"), 3);
        assert_eq!(field(events, "oom"), 7);
        assert_eq!(field(events, "kill"), 0);
        assert_eq!(field("oom_kill x\n", "oom_kill"), 0);
    }

    #[test]
    fn a_group_that_does_not_exist_is_empty_and_removed() {
        let group = Cgroup::at("/sys/fs/cgroup/nacelle-test-no-such-group".into());
        assert_eq!(group.oom_kills(), 0);
        assert!(!group.populated());
        assert!(group.processes().is_empty());
        group.kill().unwrap();
        group.remove().unwrap();
    }

    #[test]
    fn nested_groups_go_before_their_parents() {
        let directory = tempfile::tempdir().unwrap();
        let group = directory.path().join("group");
        fs::create_dir_all(group.join("a/b")).unwrap();
        fs::create_dir(group.join("c")).unwrap();
        remove_tree(&group).unwrap();
        assert!(!group.exists());
    }
}
