//! System calls on files held by `O_PATH` descriptors that have no safe wrapper.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

fn check(result: i64) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// A path to the file itself, whatever its name is by now. It is followed once, to the file:
/// a symbolic link that the descriptor stands for is not.
pub fn path_of(file: BorrowedFd<'_>) -> CString {
    // A number contains no NUL.
    CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default()
}

/// Value of an extended attribute, or its length if `buffer` is empty.
pub fn getxattr(file: BorrowedFd<'_>, name: &CStr, buffer: &mut [u8]) -> io::Result<usize> {
    let path = path_of(file);
    // SAFETY: both strings end with NUL, and the buffer has the length that is given.
    check(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) } as i64)
}

/// Names of all extended attributes, or their length if `buffer` is empty.
pub fn listxattr(file: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let path = path_of(file);
    // SAFETY: the string ends with NUL, and the buffer has the length that is given.
    check(unsafe { libc::listxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) } as i64)
}

/// Sets an extended attribute.
pub fn setxattr(file: BorrowedFd<'_>, name: &CStr, value: &[u8], flags: i32) -> io::Result<()> {
    let path = path_of(file);
    // SAFETY: both strings end with NUL, and the value has the length that is given.
    let result = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) };
    check(result.into()).map(drop)
}

/// Removes an extended attribute.
pub fn removexattr(file: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let path = path_of(file);
    // SAFETY: both strings end with NUL.
    check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) }.into()).map(drop)
}

/// Changes the mode of a file, which may be held by an `O_PATH` descriptor.
pub fn chmod(file: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    let path = path_of(file);
    // SAFETY: the string ends with NUL.
    check(unsafe { libc::chmod(path.as_ptr(), mode) }.into()).map(drop)
}

/// Figures of the file system that a file is on.
pub fn statvfs(file: BorrowedFd<'_>) -> io::Result<libc::statvfs64> {
    // SAFETY: all bytes zero are a valid value of the structure, which the call fills.
    unsafe {
        let mut result: libc::statvfs64 = std::mem::zeroed();
        check(libc::fstatvfs64(file.as_raw_fd(), &raw mut result).into()).map(|_| result)
    }
}

/// A `stat` of zeros, to be filled in.
pub fn empty_stat() -> libc::stat64 {
    // SAFETY: all bytes zero are a valid value of the structure.
    unsafe { std::mem::zeroed() }
}

/// The user whose files this thread makes. Returns the one before.
pub fn set_fs_user(uid: u32) -> u32 {
    // SAFETY: changes a number of this thread's, and no memory.
    (unsafe { libc::setfsuid(uid) }) as u32
}

/// The group whose files this thread makes. Returns the one before.
pub fn set_fs_group(gid: u32) -> u32 {
    // SAFETY: changes a number of this thread's, and no memory.
    (unsafe { libc::setfsgid(gid) }) as u32
}

/// Lets this thread make files of any mode, whatever the process's `umask` is.
pub fn forget_umask() -> io::Result<()> {
    // SAFETY: gives this thread file system attributes of its own (working directory, root,
    // umask), equal to those it shared; then changes one. No memory is involved.
    unsafe {
        check(libc::unshare(libc::CLONE_FS).into())?;
        libc::umask(0);
    }
    Ok(())
}
