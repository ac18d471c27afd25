use std::fs;
use std::sync::mpsc;
use std::thread;

use rustix::mount::{mount, mount_bind};

use super::*;

/// A thread in a jail as a VMM's, and its mount namespace.
struct Jailed {
    namespace: File,
    end: mpsc::Sender<()>,
    thread: thread::JoinHandle<Vec<String>>,
}

fn private_namespace() -> bool {
    // SAFETY: the thread shares its descriptors as before.
    if unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.is_err() {
        eprintln!("not tested: it takes root");
        return false;
    }
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    true
}

impl Jailed {
    fn new(place: PathBuf) -> Self {
        let (tell, told) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let thread = thread::spawn(move || {
            assert!(private_namespace());
            let namespace = File::open("/proc/thread-self/ns/mnt").unwrap();
            mount("jail", &place, "tmpfs", ROOT - MountFlags::BIND, None).unwrap();
            rustix::process::chdir(&place).unwrap();
            rustix::process::pivot_root(".", ".").unwrap();
            unmount(".", UnmountFlags::DETACH).unwrap();
            mount_remount("/", ROOT | MountFlags::RDONLY, c"").unwrap();
            tell.send(namespace).unwrap();
            ended.recv().unwrap_err();
            let left = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
            fs::write("/volumes/new", "").unwrap_err();
            fs::read_dir("/volumes").unwrap().map(left).collect()
        });
        Self { namespace: told.recv().unwrap(), end, thread }
    }

    /// What is left in its directory of volumes.
    fn end(self) -> Vec<String> {
        drop(self.end);
        self.thread.join().unwrap()
    }

    fn attach(&self, name: &'static str, place: &File, access: MountAccess) -> io::Result<OwnedFd> {
        thread::scope(|scope| scope.spawn(|| attach(self.namespace.as_fd(), name, place, access)).join().unwrap())
    }

    fn detach(&self, name: &'static str) -> io::Result<()> {
        thread::scope(|scope| scope.spawn(|| detach(self.namespace.as_fd(), name)).join().unwrap())
    }
}

fn hold(path: &Path) -> File {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap().into()
}

fn list(directory: impl AsFd, path: &str) -> Vec<String> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let entries = rustix::fs::Dir::new(rustix::fs::openat(directory, path, flags, Mode::empty()).unwrap()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_str().unwrap().to_owned());
    let mut names: Vec<_> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}

/// In a mount namespace that plays the host's, with a shared mount at the path that it is given.
fn on_a_host(test: impl FnOnce(&Path) + Send + 'static) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    let host = move || {
        if private_namespace() {
            mount("host", &path, "tmpfs", MountFlags::empty(), None).unwrap();
            mount_change(&path, MountPropagationFlags::SHARED).unwrap();
            test(&path);
        }
    };
    thread::spawn(host).join().unwrap();
}

#[test]
fn later_mounts_of_the_host_come_and_nothing_leads_upwards() {
    on_a_host(|host| {
        for name in ["volume/before", "volume/after", "secret", "other", "jail"] {
            fs::create_dir_all(host.join(name)).unwrap();
        }
        fs::write(host.join("other/file"), "").unwrap();
        let bind = |at: &str| mount_bind(host.join("other"), host.join(at)).unwrap();
        bind("volume/before");
        let jailed = Jailed::new(host.join("jail"));
        let place = hold(&host.join("volume"));
        // The way out that this is about.
        assert!(list(&place, "..").contains(&"secret".to_owned()));
        let copy = jailed.attach("a.0", &place, MountAccess::Write).unwrap();
        assert_eq!(list(&copy, "before"), ["file"]);
        assert_eq!(list(&copy, "after"), [""; 0]);
        bind("volume/after");
        assert_eq!(list(&copy, "after"), ["file"], "what the host mounts later is seen");
        unmount(host.join("volume/after"), UnmountFlags::empty()).unwrap();
        assert_eq!(list(&copy, "after"), [""; 0], "and what it unmounts is gone");
        for up in ["../..", "../../../../../..", "before/../../.."] {
            assert_eq!(list(&copy, up), ["volumes"], "{up} leads to the jail");
        }
        // A second attempt, of whatever the first has left.
        let again = jailed.attach("a.0", &place, MountAccess::Read).unwrap();
        bind("volume/after");
        assert_eq!(list(&again, "after"), ["file"]);
        let write = |at: &str| rustix::fs::mkdirat(&again, at, Mode::RWXU);
        assert_eq!(write("new"), Err(Errno::ROFS));
        write("after/new").expect("read-only, but not recursively");
        let single = host.join("other/file");
        fs::write(&single, "content").unwrap();
        let file = jailed.attach("a.1", &hold(&single), MountAccess::ReadAll).unwrap();
        assert_eq!(rustix::fs::fstat(&file).unwrap().st_size, 7);
        for name in ["a.0", "a.0", "a.1", "never"] {
            jailed.detach(name).unwrap();
        }
        assert_eq!(jailed.end(), [""; 0]);
    });
}

#[test]
fn who_is_in_no_jail_gets_nothing() {
    on_a_host(|host| {
        fs::create_dir(host.join("volume")).unwrap();
        let own = File::open("/proc/thread-self/ns/mnt").unwrap();
        let place = hold(&host.join("volume"));
        let attached = thread::scope(|scope| {
            scope.spawn(|| attach(own.as_fd(), "a.0", &place, MountAccess::Write).map(drop)).join().unwrap()
        });
        let error = attached.unwrap_err().to_string();
        assert!(error.contains("not in its jail"), "{error}");
        assert!(!Path::new("/volumes").exists());
    });
}

#[test]
fn a_mount_that_nothing_propagates_from_is_told_apart() {
    let table = "22 1 0:21 / / rw - ext4 /dev/vda rw\n\
                 30 22 0:22 / /shared rw,nosuid shared:1 - tmpfs tmpfs rw\n\
                 31 22 0:23 / /slave rw master:1 propagate_from:2 - tmpfs shared:1 rw\n\
                 32 22 0:24 / /private rw - tmpfs shared:1 rw\n";
    for (mount, expected) in [("22", false), ("30", true), ("31", true), ("32", false), ("3", false)] {
        assert_eq!(propagates(table, mount), expected, "{mount}");
    }
}
