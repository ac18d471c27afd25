//! The pod's own PID namespace: what containers share that are to see each other's
//! processes, and none of the agent.
//!
//! A namespace lives as long as its process 1. That is this executable run again, which
//! does nothing but exist: what is orphaned becomes its child and is reaped by the kernel
//! at once. It stands in an empty mount namespace, so that nobody comes from its /proc
//! entry to the guest's files.
//!
//! Where the pod has a user namespace, the same process is the first in that, too, and there
//! from the start: see [`crate::namespaces`].

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::error::{Error, Result};
use crate::paths::Paths;

/// First argument of a process that is to be the pod's process 1.
pub const ARGUMENT: &str = "pod-init";
/// Written to standard output when it is in its place.
const READY: &[u8] = b"r";
/// Written to it when it may go there.
const GO: &[u8] = b"g";

/// What the kubelet gives a pause container.
const OOM_SCORE_ADJ: &str = "-998";

/// The pod's PID namespace, which is made when it is first asked for.
#[derive(Debug, Default)]
pub struct PodPids {
    init: Mutex<Option<i32>>,
}

impl PodPids {
    /// The file that stands for the namespace. Blocks, for as long as a program takes to
    /// start.
    pub fn namespace(&self, paths: &Paths) -> Result<PathBuf> {
        let mut init = self.init.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = match *init {
            Some(pid) => pid,
            None => {
                let pid = spawn(paths, libc::CLONE_NEWPID, |_| Ok(()));
                let pid = pid.map_err(Error::system("start process 1 of the pod"))?;
                *init = Some(pid);
                pid
            }
        };
        Ok(namespace_of(pid))
    }
}

/// The file that stands for the PID namespace a process is in.
pub fn namespace_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/pid"))
}

/// Starts a process in new namespaces (`CLONE_NEW…`), a PID namespace's process 1 among
/// them, as a child of this process. It does nothing before `prepare` has been called with
/// its id, and is in its place when this returns. Blocks, for as long as a program takes to
/// start.
pub fn spawn(paths: &Paths, namespaces: libc::c_int, prepare: impl FnOnce(i32) -> io::Result<()>) -> io::Result<i32> {
    let program = CString::new(paths.executable.as_os_str().as_bytes())?;
    let argument = CString::new(ARGUMENT)?;
    let words = [program.as_ptr(), argument.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<libc::c_char>()];
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let (ready, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (wait, go) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let flags = namespaces | libc::SIGCHLD;
    // SAFETY: like fork, but into new namespaces: the child has a copy of everything and,
    // until it executes, only makes system calls on memory prepared above.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid {
        0 => {
            // SAFETY: system calls on descriptors that are open, on strings that end with
            // NUL and on lists that end with null; on failure the copy ends.
            unsafe { become_init(&null, [&wait, &go], &theirs, &program, &words, &environment) }
        }
        pid if pid > 0 => {
            drop((theirs, wait));
            let pid = i32::try_from(pid).map_err(io::Error::other)?;
            // If that fails, the child sees the pipe end and ends, too.
            prepare(pid)?;
            // All of the pod's processes would end with it, for the few pages that it has.
            fs::write(format!("/proc/{pid}/oom_score_adj"), OOM_SCORE_ADJ)?;
            rustix::io::write(&go, GO)?;
            let mut byte = [0; 1];
            match rustix::io::read(&ready, &mut byte)? {
                1 => Ok(pid),
                _ => Err(io::Error::other("it ended before it was in its place")),
            }
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// What the child does until it is another program.
///
/// # Safety
/// `words` and `environment` must end with null and hold pointers to strings.
unsafe fn become_init(
    null: &OwnedFd,
    [wait, go]: [&OwnedFd; 2],
    ready: &OwnedFd,
    program: &CStr,
    words: &[*const libc::c_char],
    environment: &[*const libc::c_char],
) -> ! {
    // SAFETY: as the caller promises; the calls keep no pointer.
    unsafe {
        // Its own copy would keep the pipe from ending.
        libc::close(go.as_raw_fd());
        let mut byte = 0_u8;
        if libc::read(wait.as_raw_fd(), (&raw mut byte).cast(), 1) != 1 {
            libc::_exit(126);
        }
        // In a user namespace it is nobody until it takes the ids that are mapped by now. By
        // system calls: the C library would look for threads, which this copy does not have.
        libc::syscall(libc::SYS_setresgid, 0, 0, 0);
        libc::syscall(libc::SYS_setresuid, 0, 0, 0);
        libc::dup2(null.as_raw_fd(), libc::STDIN_FILENO);
        libc::dup2(ready.as_raw_fd(), libc::STDOUT_FILENO);
        libc::dup2(null.as_raw_fd(), libc::STDERR_FILENO);
        libc::execve(program.as_ptr(), words.as_ptr(), environment.as_ptr());
        libc::_exit(127)
    }
}

/// The pod's process 1.
pub fn main() -> ExitCode {
    match serve() {
        Ok(never) => match never {},
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve() -> io::Result<Infallible> {
    // SAFETY: ignores a signal; the kernel then reaps every child, orphans included.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    // Its /proc entry is for who may trace everything only.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    leave()?;
    rustix::io::write(rustix::stdio::stdout(), READY)?;
    let null = rustix::stdio::stdin().try_clone_to_owned()?;
    rustix::stdio::dup2_stdout(&null)?;
    loop {
        // SAFETY: waits for a signal, none of which has a handler.
        unsafe { libc::pause() };
    }
}

/// Moves into an empty file system of its own.
fn leave() -> io::Result<()> {
    // SAFETY: of what the flag takes apart this process shares nothing with a thread: it
    // has one.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS)? };
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    mount("tmpfs", "/tmp", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c"size=4k")?;
    chdir("/tmp")?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    Ok(())
}
