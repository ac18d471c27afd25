//! `nacelle`: pods as lightweight KVM guests.

mod check;
mod config;
mod daemon;
mod directories;
mod gate;
mod handlers;
mod health;
mod logging;
mod notify;
mod run;
mod streaming;
mod vmm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::Config;

/// Runs every Kubernetes pod as its own lightweight KVM guest.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    /// Configuration file; without it /etc/nacelle/config.toml is read if it is there.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the Container Runtime Interface to the kubelet.
    Daemon,
    /// Says whether this host can run guests and what to do if it cannot.
    Check,
    /// Runs one container in a guest of its own: pull, run, print its output, clean up.
    Run(run::RunArguments),
    /// Prints the configuration in force, with comments.
    Config,
    /// Drives one guest. Started by the daemon.
    #[command(hide = true)]
    Vmm,
}

fn main() -> ExitCode {
    // The VMM is on every pod's way: it does not go through the command line parser or an
    // async runtime.
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|word| word == "vmm") {
        return vmm::main(words);
    }
    let arguments = Arguments::parse();
    match dispatch(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("nacelle: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let config = Config::load(arguments.config.as_deref())?;
    match arguments.command {
        Command::Daemon => daemon::main(config),
        Command::Check => Ok(check::main(&config)),
        Command::Run(arguments) => run::main(config, arguments),
        Command::Config => {
            print!("{}", config.describe());
            Ok(ExitCode::SUCCESS)
        }
        Command::Vmm => anyhow::bail!("nacelle vmm must be the first argument"),
    }
}
