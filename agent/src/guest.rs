//! The agent as PID 1 of a guest.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use nacelle_proto::port_forward::PORT as PORT_FORWARD_PORT;
use nacelle_proto::stdio::{AGENT_PORT, READY_PORT, STDIO_PORT};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::{Stream, StreamExt};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::agent::Agent;
use crate::log;
use crate::paths::Paths;
use crate::reaper::Reaper;
use crate::{init, port_forward, power, server};

/// On the kernel's command line: announce on the console too, and go without vsock.
const ANNOUNCE: &str = "nacelle.announce=console";

/// Runs until the guest powers off. If this returns, the kernel panics, which is how the
/// host learns of it.
pub fn main() -> ExitCode {
    log::install_panic_hook();
    let result = init::prepare().map_err(Into::into).and_then(|()| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(run())
    });
    match result {
        Ok(()) => log::last_words(&format!("cannot power off: {}", power::off())),
        Err(error) => log::last_words(&error.to_string()),
    }
    ExitCode::FAILURE
}

async fn run() -> Result<(), Box<dyn Error>> {
    let console = init::command_line_has(ANNOUNCE);
    let ports = announce(console)?;
    init::finish()?;

    let reaper = std::sync::Arc::new(Reaper::default());
    let children = Reaper::listen()?;
    tokio::spawn(reaper.clone().run(children));
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let asked = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let agent = Agent::new(Paths::guest(), reaper);
    match ports {
        Some((calls, streams)) => {
            // Not before it is needed: until a call has made a pod, nobody comes here.
            let forwards = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, PORT_FORWARD_PORT))?;
            tokio::spawn(port_forward::accept(agent.clone(), from_host(forwards)));
            server::serve(agent, from_host(calls), from_host(streams), asked).await
        }
        None => {
            asked.await;
            Ok(())
        }
    }
}

/// Binds both ports and says so. Without a vsock device there are none.
fn announce(console: bool) -> Result<Option<(VsockListener, VsockListener)>, Box<dyn Error>> {
    let bind = |port| VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port));
    let ports = bind(AGENT_PORT).and_then(|calls| Ok((calls, bind(STDIO_PORT)?)));
    let told = ports.as_ref().map_err(|error| io::Error::from(error.kind())).and_then(|_| tell_host());
    if console {
        init::announce_on_console()?;
        // Without a device one can bind, but not connect.
        return Ok(told.ok().and(ports.ok()));
    }
    let ports = ports.map_err(|error| format!("cannot bind the vsock ports: {error}"))?;
    told.map_err(|error| format!("cannot tell the host on vsock port {READY_PORT} that the guest is ready: {error}"))?;
    Ok(Some(ports))
}

/// The kernel gives a connection two seconds, which is little on a host that is short of
/// time; how long the guest may take in all is for the host to say, and to end.
fn tell_host() -> io::Result<()> {
    let mut host = loop {
        match vsock::VsockStream::connect_with_cid_port(VMADDR_CID_HOST, READY_PORT) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
            connected => break connected?,
        }
    };
    host.write_all(concat!("ready ", env!("CARGO_PKG_VERSION"), "\n").as_bytes())
}

/// Connections that come from the host, and not from a process of the guest.
fn from_host(listener: VsockListener) -> impl Stream<Item = io::Result<VsockStream>> + Unpin + Send {
    listener.incoming().filter(|accepted| match accepted {
        Ok(stream) => stream.peer_addr().is_ok_and(|peer| peer.cid() == VMADDR_CID_HOST),
        Err(_) => true,
    })
}
