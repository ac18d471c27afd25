//! The guest's agent: PID 1 of every Nacelle guest.
//!
//! One static executable in four roles:
//!
//! * as PID 1 of a guest ([`guest`]): prepares the system ([`init`]), tells the host that
//!   it is ready, and serves `agent.v1` and the standard streams over vsock;
//! * `helper` ([`mod@helper`]): run by the first to build one container or process;
//! * `pod-init` ([`pod_init`]): run by the first as process 1 of the pod's PID namespace;
//! * `serve RUN SYSFS SOCKETS`: the first role's service on unix sockets, for tests; a release has no such role.

mod agent;
mod clock;
mod container;
mod devices;
mod error;
mod fd;
mod guest;
mod helper;
mod hugepages;
mod ids;
mod init;
mod json;
mod log;
mod namespaces;
mod network;
mod paths;
mod patience;
mod pod_init;
mod port_forward;
mod power;
mod process;
mod random;
mod reaper;
mod sandbox;
#[cfg(debug_assertions)]
mod serve;
mod server;
mod service;
mod stats;
mod stdio;
mod users;
mod volumes;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some(helper::ARGUMENT) => helper::child::main(),
        Some(pod_init::ARGUMENT) => pod_init::main(),
        #[cfg(debug_assertions)]
        Some(serve::ARGUMENT) => serve::main(args.collect()),
        // The kernel passes on what it does not understand of its command line.
        _ if std::process::id() == 1 => guest::main(),
        _ => {
            eprintln!("nacelle-agent: this is the init of a Nacelle guest and runs as PID 1 only");
            ExitCode::FAILURE
        }
    }
}
