//! The namespaces of a pod with a user namespace of its own.
//!
//! Whoever is root in a user namespace may do what root may in the namespaces that belong
//! to it, and in no others: to bind port 80, to mount /proc, to set a parameter of the
//! network. So such a pod's UTS, IPC, network and PID namespaces are made in one go with its
//! user namespace, and belong to it; those of the guest stay the agent's. They live as long
//! as process 1 of the PID namespace (see [`crate::pod_init`]).
//!
//! Each is bound to a file of [`Paths::namespaces`]: a process that has entered the user
//! namespace may open these, where it would have to trace process 1 to open its /proc.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use nacelle_netlink::Mac;
use rustix::mount::mount_bind;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::{Error, Result};
use crate::ids::IdMap;
use crate::paths::Paths;
use crate::{init, pod_init};

/// What is made with the user namespace.
const MADE: libc::c_int =
    libc::CLONE_NEWUSER | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWNET | libc::CLONE_NEWPID;
/// Their files below `/proc/PID/ns`, the user namespace first: it is entered first.
const NAMES: [&str; 5] = ["user", "uts", "ipc", "net", "pid"];
/// Those that a thread of the agent enters to act for the pod.
const ENTERED: [(&str, LinkNameSpaceType); 3] = [
    ("uts", LinkNameSpaceType::HostNameAndNISDomainName),
    ("ipc", LinkNameSpaceType::InterProcessCommunication),
    ("net", LinkNameSpaceType::Network),
];

/// A pod's user namespace and those that belong to it.
#[derive(Debug)]
pub struct PodNamespaces {
    /// What its ids are in the guest.
    pub ids: IdMap,
    directory: PathBuf,
    user: File,
    network: File,
    /// Interfaces that were moved into it, by their slots.
    interfaces: Mutex<Vec<(u32, Mac)>>,
}

impl PodNamespaces {
    /// Makes them, with nothing in them but a loopback interface that is up. Blocks, for as
    /// long as a program takes to start.
    pub fn create(paths: &Paths, ids: IdMap) -> Result<Self> {
        let directory = paths.namespaces();
        fs::create_dir_all(&directory).map_err(Error::path("make the directory", &directory))?;
        let map = |pid: i32| {
            fs::write(format!("/proc/{pid}/uid_map"), ids.uids.line())?;
            fs::write(format!("/proc/{pid}/gid_map"), ids.gids.line())
        };
        let pid = pod_init::spawn(paths, MADE, map).map_err(Error::system("make the pod's user namespace"))?;
        for name in NAMES {
            let file = directory.join(name);
            File::create(&file).map_err(Error::path("make the file", &file))?;
            mount_bind(format!("/proc/{pid}/ns/{name}"), &file)
                .map_err(|error| Error::path("bind a namespace to", &file)(error.into()))?;
        }
        let open = |name: &str| {
            let file = directory.join(name);
            File::open(&file).map_err(Error::path("open the namespace", file))
        };
        let (user, network) = (open("user")?, open("net")?);
        let namespaces = Self { ids, directory, user, network, interfaces: Mutex::default() };
        namespaces.inside(|| {
            init::open_network();
            init::bring_up_loopback().map_err(Error::system("bring up the loopback interface"))
        })??;
        Ok(namespaces)
    }

    /// The file that stands for one of them: `user`, `uts`, `ipc`, `net` or `pid`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The user namespace.
    pub fn user(&self) -> BorrowedFd<'_> {
        self.user.as_fd()
    }

    /// The network namespace.
    pub fn network(&self) -> BorrowedFd<'_> {
        self.network.as_fd()
    }

    /// Interfaces that were moved into the network namespace: their slots, and their
    /// addresses, which tell them whatever they are called there.
    pub fn interfaces(&self) -> MutexGuard<'_, Vec<(u32, Mac)>> {
        self.interfaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `work` in the pod's UTS, IPC and network namespaces, as the guest's root. Not on
    /// a thread of the runtime: one that has entered a namespace is good for nothing else.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let enter = || -> io::Result<()> {
            for (name, kind) in ENTERED {
                move_into_link_name_space(File::open(self.file(name))?.as_fd(), Some(kind))?;
            }
            Ok(())
        };
        let entered = thread::scope(|scope| {
            let worker =
                thread::Builder::new().name("in the pod".into()).spawn_scoped(scope, || enter().map(|()| work()))?;
            worker.join().unwrap_or_else(|_| Err(io::Error::other("it panicked")))
        });
        entered.map_err(Error::system("act in the pod's namespaces"))
    }

    /// Has a file of the guest belong to the pod's root.
    pub fn give(&self, path: &Path) -> Result<()> {
        let (uid, gid) = self.ids.root();
        std::os::unix::fs::lchown(path, Some(uid), Some(gid)).map_err(Error::path("give to the pod's root", path))
    }
}

/// Does `work` with the effective user of the calling thread being `uid`, without the
/// capabilities of the guest's root meanwhile.
pub fn as_user<T>(uid: u32, work: impl FnOnce() -> T) -> io::Result<T> {
    const SAME: libc::uid_t = libc::uid_t::MAX;
    let become_user = |uid: libc::uid_t| {
        // SAFETY: changes an attribute of this thread alone: unlike the C library's function,
        // the system call knows no other threads.
        match unsafe { libc::syscall(libc::SYS_setresuid, SAME, uid, SAME) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    become_user(uid)?;
    let done = work();
    // The real user is still root.
    become_user(0)?;
    Ok(done)
}

/// A copy of the mount at `source`, and of those below it if `recursive`, whose files
/// belong to the ids in a user namespace that they belong to by number outside of it: those
/// of 0 to its root. It is mounted at `target`, a directory or file.
pub fn mount_mapped(source: &Path, target: &Path, user: BorrowedFd<'_>, recursive: bool) -> Result<()> {
    use rustix::fs::CWD;
    use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

    let failed = |action| move |error: rustix::io::Errno| Error::path(action, source)(error.into());
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    let tree = open_tree(CWD, source, flags).map_err(failed("copy the mount"))?;
    // SAFETY: all bytes zero are a valid value of the structure: nothing is changed.
    let mut change: libc::mount_attr = unsafe { std::mem::zeroed() };
    change.attr_set = libc::MOUNT_ATTR_IDMAP;
    change.userns_fd = u64::try_from(user.as_raw_fd()).unwrap_or(u64::MAX);
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path ends with NUL, and the structure has the length that is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    if result != 0 {
        return Err(Error::path("map the ids of", source)(io::Error::last_os_error()));
    }
    move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed("mount the copy of"))
}
