//! Descriptors on the event loop.

use std::fs::File;
use std::io;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Watches a pipe, socket or terminal, which must be non-blocking.
pub fn watch(file: File, interest: Interest) -> io::Result<AsyncFd<File>> {
    // SAFETY: a File owns its descriptor and keeps the same one for as long as it lives,
    // and nobody can take it out of a shared AsyncFd.
    unsafe { AsyncFd::register_with_interest(file, interest) }.map_err(Into::into)
}
