//! The device between a guest's driver and a real tap, whose far end is a packet socket.

mod guest;
mod hostile;
mod packets;
