//! A machine in a thread of the test, with a kernel of a few instructions.

pub mod prepared;

use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nacelle_vmm::config::MachineConfig;
use nacelle_vmm::control::{Client, Request};
use nacelle_vmm::{Error, Exit, console};
use prepared::Prepared;
pub(crate) use prepared::code;

/// A guest that does not end by itself in this time hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// A machine that may be running.
pub struct Guest {
    pub config: MachineConfig,
    result: Option<Receiver<Result<Exit, Error>>>,
    _directory: tempfile::TempDir,
}

impl Guest {
    /// Everything on disk, nothing running.
    pub fn prepare(code: &[u8]) -> Self {
        let Prepared { config, directory } = Prepared::new(code);
        Self { config, result: None, _directory: directory }
    }

    pub fn start(code: &[u8]) -> Self {
        Self::prepare(code).run()
    }

    /// Runs what was prepared.
    pub fn run(mut self) -> Self {
        let (sender, receiver) = channel();
        let config = self.config.clone();
        thread::spawn(move || sender.send(nacelle_vmm::run(&config)));
        self.result = Some(receiver);
        self
    }

    /// How it ended, and the last lines of its console.
    pub fn wait(self) -> (Exit, Vec<String>, Self) {
        let result = self.result.as_ref().unwrap().recv_timeout(PATIENCE);
        let console = console::tail(&self.config.console, 20).unwrap_or_default();
        match result {
            Ok(result) => (result.unwrap(), console, self),
            Err(_) => {
                let mut client = Client::connect(&self.config.control, Instant::now()).unwrap();
                client.call(&Request::Stop, &[], PATIENCE).unwrap();
                panic!("the guest hangs; its console: {console:?}");
            }
        }
    }
}
