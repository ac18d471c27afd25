//! Container logs in the CRI format, and the pump that fills them from the guest.
//!
//! A line of the log is `<RFC 3339 time> <stdout|stderr> <P|F> <content>`: `F` for a whole
//! line of output, `P` for a piece of one that is longer than [`format::LINE_BYTES`] or
//! has no end. From the log itself one can therefore count how many bytes of each stream
//! it holds, and that is how a daemon that starts again knows where to go on
//! ([`format::Counter`]): no byte is lost and none written twice. What files before the
//! current one held is in the container's record ([`Place`]).
//!
//! Where a log lies others have a say: see [`location`].
//!
//! The guest is told that it may forget output only when the log has it, so a slow disk
//! slows the container down and costs no memory here.

mod file;
pub mod format;
mod location;
mod pump;

pub use file::{LogFile, Place};
pub use location::Location;
pub use pump::{Sink, pump};
