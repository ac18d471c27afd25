//! The agent's service on unix sockets, for tests without a guest. What is built for guests goes without.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;

use crate::agent::Agent;
use crate::paths::Paths;
use crate::reaper::Reaper;
use crate::server;

/// First argument that asks for this.
pub const ARGUMENT: &str = "serve";

/// Serves `SOCKETS/agent` and `SOCKETS/stdio`, keeping everything in `RUN` and looking for
/// devices in `SYSFS`, until it is asked to shut down.
pub fn main(args: Vec<String>) -> ExitCode {
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nacelle-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Vec<String>) -> Result<(), Box<dyn Error>> {
    let [run, sysfs, sockets] = <[String; 3]>::try_from(args).map_err(|_| "serve needs RUN, SYSFS and SOCKETS")?;
    let sockets = PathBuf::from(sockets);
    let paths = Paths { run: run.into(), sysfs: sysfs.into(), executable: std::env::current_exe()? };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let reaper = std::sync::Arc::new(Reaper::default());
        let children = Reaper::listen()?;
        tokio::spawn(reaper.clone().run(children));
        let mut terminate = signal(SignalKind::terminate())?;
        let agent = Agent::new(paths, reaper);
        let streams = UnixListenerStream::new(UnixListener::bind(sockets.join("stdio"))?);
        let calls = UnixListenerStream::new(UnixListener::bind(sockets.join("agent"))?);
        server::serve(agent, calls, streams, async move { terminate.recv().await.map_or((), |()| ()) }).await
    })
}
