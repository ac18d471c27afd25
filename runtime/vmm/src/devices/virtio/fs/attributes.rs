//! What files are like, between the host's words and the protocol's.

use std::ffi::CStr;
use std::io;

use fuse_backend_rs::api::filesystem::{ROOT_ID, SetattrValid};
use rustix::fs::{Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

use super::passthrough::errno;
use super::sys;

/// Longest value of an extended attribute, and longest list of their names (`XATTR_SIZE_MAX`).
const XATTR_LIMIT: usize = 64 * 1024;
/// Extended attributes that a guest may set: those that mean something to it. Labels and
/// signatures of the host's own are not among them.
const XATTRS: [&[u8]; 4] = [b"user.", b"trusted.", b"security.capability", b"system.posix_acl_"];

/// The protocol's attributes, with the inode number that the guest sees.
pub fn stat(stat: &Statx, inode: u64) -> libc::stat64 {
    let mut result = sys::empty_stat();
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    result.st_ino = inode;
    result.st_mode = stat.stx_mode.into();
    result.st_nlink = stat.stx_nlink.into();
    result.st_uid = stat.stx_uid;
    result.st_gid = stat.stx_gid;
    result.st_rdev = libc::makedev(stat.stx_rdev_major, stat.stx_rdev_minor);
    result.st_size = signed(stat.stx_size);
    result.st_blksize = stat.stx_blksize.into();
    result.st_blocks = signed(stat.stx_blocks);
    result.st_atime = stat.stx_atime.tv_sec;
    result.st_atime_nsec = stat.stx_atime.tv_nsec.into();
    result.st_mtime = stat.stx_mtime.tv_sec;
    result.st_mtime_nsec = stat.stx_mtime.tv_nsec.into();
    result.st_ctime = stat.stx_ctime.tv_sec;
    result.st_ctime_nsec = stat.stx_ctime.tv_nsec.into();
    result
}

/// The device's own root: a directory that nobody can write to.
pub fn device_root() -> libc::stat64 {
    let mut result = sys::empty_stat();
    result.st_ino = ROOT_ID;
    result.st_mode = libc::S_IFDIR | 0o555;
    result.st_nlink = 2;
    result.st_blksize = 4096;
    result
}

/// The file system that the device's own root is: an empty one.
pub fn device_statfs() -> libc::statvfs64 {
    // SAFETY: all bytes zero are a valid value of the structure.
    let mut result: libc::statvfs64 = unsafe { std::mem::zeroed() };
    result.f_bsize = 4096;
    result.f_frsize = 4096;
    result.f_namemax = 255;
    result
}

/// The times that a request sets, if it sets any.
pub fn times(attr: &libc::stat64, valid: SetattrValid) -> Option<Timestamps> {
    let time = |now, set, seconds, nanoseconds| {
        let nanoseconds = match () {
            () if valid.contains(now) => UTIME_NOW,
            () if valid.contains(set) => nanoseconds,
            () => UTIME_OMIT,
        };
        Timespec { tv_sec: seconds, tv_nsec: nanoseconds }
    };
    valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME).then(|| Timestamps {
        last_access: time(SetattrValid::ATIME_NOW, SetattrValid::ATIME, attr.st_atime, attr.st_atime_nsec),
        last_modification: time(SetattrValid::MTIME_NOW, SetattrValid::MTIME, attr.st_mtime, attr.st_mtime_nsec),
    })
}

/// Whether the guest may change the extended attribute.
pub fn check_xattr(name: &CStr) -> io::Result<()> {
    let name = name.to_bytes();
    if XATTRS.iter().any(|prefix| name.starts_with(prefix)) { Ok(()) } else { Err(errno(libc::EOPNOTSUPP)) }
}

/// How much room to make for what the guest wants `size` bytes of.
pub fn xattr_buffer(size: u32) -> usize {
    (size as usize).min(XATTR_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_the_host_are_not_the_guests_to_change() {
        for name in [c"user.a", c"trusted.overlay.opaque", c"security.capability", c"system.posix_acl_access"] {
            check_xattr(name).unwrap();
        }
        for name in [c"security.selinux", c"security.ima", c"system.nfs4_acl", c"", c"us"] {
            assert_eq!(check_xattr(name).unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP), "{name:?}");
        }
    }

    #[test]
    fn times_are_those_of_the_request_or_now_or_left_alone() {
        let mut attr = sys::empty_stat();
        (attr.st_mtime, attr.st_mtime_nsec) = (7, 9);
        assert!(times(&attr, SetattrValid::MODE).is_none());
        let set = times(&attr, SetattrValid::MTIME).unwrap();
        assert_eq!((set.last_access.tv_nsec, set.last_modification.tv_sec), (UTIME_OMIT, 7));
        assert_eq!(set.last_modification.tv_nsec, 9);
        let now = times(&attr, SetattrValid::ATIME | SetattrValid::ATIME_NOW).unwrap();
        assert_eq!((now.last_access.tv_nsec, now.last_modification.tv_nsec), (UTIME_NOW, UTIME_OMIT));
    }
}
