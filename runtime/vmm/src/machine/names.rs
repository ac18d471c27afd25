//! What a machine has by name on its host: made before it is built, and before its jail is entered, in which the
//! directory of all of it can only be read.

use std::path::PathBuf;

use rustix::fs::{AtFlags, CWD, unlinkat};

use super::Error;
use crate::config::MachineConfig;
use crate::console::{self, Ring};
use crate::control::server::Server;
use crate::devices::virtio::vsock::Listener;

/// The sockets and the console's file.
pub struct Names {
    pub control: Server,
    pub vsock: Listener,
    pub console: Ring,
    /// Of the first two.
    pub sockets: [Removed; 2],
    pub console_file: Removed,
}

impl Names {
    /// Makes them; what is there already is left alone, and an error.
    pub fn make(config: &MachineConfig) -> Result<Self, Error> {
        let control = Server::listen(&config.control)?;
        let control_file = Removed::new(&config.control);
        let vsock = Listener::new(&config.vsock)?;
        let sockets = [control_file, Removed::new(&config.vsock)];
        let console = Ring::create(&config.console, console::SIZE)?;
        Ok(Self { control, vsock, console, sockets, console_file: Removed::new(&config.console) })
    }
}

/// Removes a file when dropped, where that can be done.
pub struct Removed(Option<PathBuf>);

impl Removed {
    fn new(path: &std::path::Path) -> Self {
        Self(Some(path.to_owned()))
    }

    /// Leaves it where it is.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Removed {
    fn drop(&mut self) {
        // Whoever removed it first did our work. From its jail a machine cannot: the daemon does.
        if let Some(path) = &self.0 {
            let _ = unlinkat(CWD, path, AtFlags::empty());
        }
    }
}
