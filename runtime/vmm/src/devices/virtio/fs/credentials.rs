//! Whom a worker acts as.
//!
//! The guest's kernel has checked what the caller may do before it asks, with all of the
//! caller's groups. So the worker does what it is asked to by its own rights, with two
//! exceptions: a file that it makes belongs to the caller, and a write by a caller that may
//! not keep the set-user-id bits of a file clears them.

use std::cell::Cell;
use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::sys;

thread_local! {
    /// Whether this thread's writes keep set-user-id bits.
    static KEEPS_SET_ID: Cell<bool> = const { Cell::new(true) };
}

/// What a thread needs before it serves requests.
pub fn prepare_thread() -> io::Result<()> {
    sys::forget_umask()
}

/// Writes and truncations of this thread keep set-user-id bits from now on, or clear them as
/// those of an ordinary user do.
pub fn keep_set_id(keep: bool) -> io::Result<()> {
    // Most files are written by one kind of user, so the calls below are rare.
    if KEEPS_SET_ID.get() != keep {
        change(|effective| if keep { effective | CapabilitySet::FSETID } else { effective - CapabilitySet::FSETID })?;
        KEEPS_SET_ID.set(keep);
    }
    Ok(())
}

fn change(effective: impl FnOnce(CapabilitySet) -> CapabilitySet) -> io::Result<()> {
    let now = capabilities(None)?;
    // What is not permitted is not to be had: a test may run without privileges.
    let effective = effective(now.effective) & now.permitted;
    if effective != now.effective {
        set_capabilities(None, CapabilitySets { effective, ..now })?;
    }
    Ok(())
}

/// While it lives, files that this thread makes belong to a user. The user's rights do not
/// bound what the thread does.
#[derive(Debug)]
pub struct Owner {
    changed: bool,
}

impl Owner {
    /// Files belong to this user and group.
    ///
    /// # Errors
    /// If this process may not act for the user.
    pub fn new(uid: u32, gid: u32) -> io::Result<Self> {
        if uid == 0 && gid == 0 {
            return Ok(Self { changed: false });
        }
        // The identity is restored on drop, should the rest of this fail.
        let owner = Self { changed: true };
        sys::set_fs_group(gid);
        sys::set_fs_user(uid);
        // Neither tells of a failure: a second call tells what holds.
        if sys::set_fs_user(uid) != uid || sys::set_fs_group(gid) != gid {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        // Gone with the user: without them the group that lets the caller write to a
        // directory would have to be the caller's first.
        change(|effective| {
            effective
                | CapabilitySet::DAC_OVERRIDE
                | CapabilitySet::DAC_READ_SEARCH
                | CapabilitySet::FOWNER
                | CapabilitySet::FSETID
        })?;
        KEEPS_SET_ID.set(true);
        Ok(owner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if self.changed {
            // The capabilities come back with user 0.
            sys::set_fs_user(rustix::process::geteuid().as_raw());
            sys::set_fs_group(rustix::process::getegid().as_raw());
        }
    }
}
