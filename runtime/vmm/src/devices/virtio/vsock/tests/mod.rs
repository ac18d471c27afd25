//! The device between a guest's driver and real unix sockets.

mod guest;
mod hostile;
mod lifecycle;
mod streams;
