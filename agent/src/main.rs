//! The guest's agent: PID 1 of every Nacelle guest.
//!
//! One static executable in three roles:
//!
//! * as PID 1 of a guest ([`guest`]): prepares the system ([`init`]), tells the host that
//!   it is ready, and serves `agent.v1` and the standard streams over vsock;
//! * `helper` ([`mod@helper`]): run by the first to build one container or process;
//! * `serve RUN SYSFS SOCKETS`: the first role's service on unix sockets, for tests.

mod agent;
mod container;
mod devices;
mod error;
mod fd;
mod guest;
mod helper;
mod init;
mod log;
mod paths;
mod power;
mod process;
mod reaper;
mod sandbox;
mod serve;
mod server;
mod service;
mod stdio;
mod users;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some(helper::ARGUMENT) => helper::child::main(),
        Some(serve::ARGUMENT) => serve::main(args.collect()),
        // The kernel passes on what it does not understand of its command line.
        _ if std::process::id() == 1 => guest::main(),
        _ => {
            eprintln!("nacelle-agent: this is the init of a Nacelle guest and runs as PID 1 only");
            ExitCode::FAILURE
        }
    }
}
