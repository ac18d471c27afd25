//! The device as a guest sees it, by real rings and messages.

mod files;
mod guest;
mod hostile;
mod lifecycle;
mod shared;
