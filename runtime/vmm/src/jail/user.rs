//! The user namespace of a VMM.
//!
//! In it every user and group is who they are on the host, so that files belong to whom they
//! belonged before. What it takes away is the rest of what root and its capabilities mean: they count
//! for the files of users that the namespace knows, and for nothing else of the host.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::ptr;

use rustix::process::{Pid, WaitOptions, waitpid};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{JailError, failed};

/// The files of a process that say whom its namespace knows.
const MAPS: [&str; 2] = ["uid_map", "gid_map"];

/// A namespace that this process is not in yet.
pub struct Namespace(File);

impl Namespace {
    /// Makes it. To be called where /proc is the host's.
    ///
    /// More than one user can be mapped from outside only. So what is born in it first is another process, which ends
    /// at once: its namespace is there until it has been waited for.
    pub fn new() -> Result<Self, JailError> {
        let first = first_process().map_err(failed("make a user namespace (see sysctl user.max_user_namespaces)"))?;
        let id = first.as_raw_nonzero();
        let namespace = map(id.get()).map_err(failed("map its users")).and_then(|()| {
            File::open(format!("/proc/{id}/ns/user")).map_err(failed("take hold of its user namespace"))
        });
        // A process that ends without a signal is waited for by this flag only.
        let any = WaitOptions::from_bits_retain(libc::__WALL.cast_unsigned());
        rustix::io::retry_on_intr(|| waitpid(Some(first), any)).map_err(failed("wait for a process that has ended"))?;
        namespace.map(Self)
    }

    /// Moves the calling process, which must have one thread only, into it.
    pub fn enter(self) -> Result<(), JailError> {
        move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::User))
            .map_err(failed("enter its user namespace"))
    }
}

extern "C" fn end(_: *mut libc::c_void) -> libc::c_int {
    0
}

/// Makes a process in a new user namespace, and lets it end. No signal tells of it, so that it can be waited for even
/// where the parent of this process has left SIGCHLD ignored.
fn first_process() -> io::Result<Pid> {
    let mut stack = MaybeUninit::<[u128; 256]>::uninit();
    // In this one's memory, which meanwhile stands still: to copy that takes longer than all the rest.
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_NEWUSER;
    // SAFETY: the new process does nothing but return, on a stack of its own that nobody else uses until it has ended,
    // which the calling thread waits for. The end of an array of such numbers is aligned as a stack must be.
    let id = unsafe { libc::clone(end, stack.as_mut_ptr().add(1).cast(), flags, ptr::null_mut()) };
    Pid::from_raw(id).filter(|_| id > 0).ok_or_else(io::Error::last_os_error)
}

/// Maps everybody whom this process's namespace knows to themselves in that of process `id`.
fn map(id: i32) -> io::Result<()> {
    for name in MAPS {
        let known = fs::read_to_string(format!("/proc/self/{name}"))?;
        let mut same = String::new();
        for line in known.lines() {
            let mut fields = line.split_whitespace();
            if let (Some(first), Some(count)) = (fields.next(), fields.nth(1)) {
                let _ = writeln!(same, "{first} {first} {count}");
            }
        }
        // The kernel takes it in one write or not at all.
        fs::write(format!("/proc/{id}/{name}"), same)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn everybody_is_who_they_were_in_a_namespace_of_its_own() {
        let read = |script: &str, namespace: Option<Namespace>| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            if let Some(namespace) = namespace {
                let fd = namespace.0;
                // SAFETY: nothing but a system call, in a process that has one thread.
                unsafe {
                    command.pre_exec(move || Ok(move_into_link_name_space(fd.as_fd(), Some(LinkNameSpaceType::User))?))
                };
            }
            let output = command.output().unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let namespace = || Some(Namespace::new().unwrap());
        let maps = "cat /proc/self/uid_map /proc/self/gid_map";
        let whom = |text: String| text.split_whitespace().map(String::from).collect::<Vec<_>>();
        let (outside, inside) = (whom(read(maps, None)), whom(read(maps, namespace())));
        for (outside, inside) in outside.chunks(3).zip(inside.chunks(3)) {
            assert_eq!([&outside[0], &outside[0], &outside[2]], [&inside[0], &inside[1], &inside[2]]);
        }
        assert_eq!(outside.len(), inside.len());
        let name = "readlink /proc/self/ns/user";
        assert_ne!(read(name, None), read(name, namespace()));
        // Nothing is left to be waited for.
        let left = waitpid(None, WaitOptions::NOHANG | WaitOptions::from_bits_retain(libc::__WCLONE.cast_unsigned()));
        assert_eq!(left.unwrap_err(), rustix::io::Errno::CHILD);
    }
}
