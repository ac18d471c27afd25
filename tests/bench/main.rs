//! The benchmarks: ours and the peer's in alternating rounds of one run on one host. Run
//! by `hack/bench`, which puts the programs into place.

mod boot;
mod clone;
mod container;
mod exec;
mod fs;
mod guest;
mod isolation;
mod memory;
mod net;
mod pods;
mod report;
mod restart;
mod runc;
mod start;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::report::Report;

/// Where what is measured lies.
#[derive(Clone)]
pub struct Setting {
    /// The `nacelle` program.
    pub nacelle: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// Its initial RAM file system.
    pub initramfs: PathBuf,
    /// Rounds that count.
    pub rounds: usize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut names = Vec::new();
    let (mut json, mut samples) = (false, false);
    let mut rounds = 5;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => json = true,
            "--samples" => samples = true,
            "--rounds" => {
                rounds = arguments.next().and_then(|n| n.parse().ok()).context("--rounds wants a number")?;
            }
            name => names.push(name.to_owned()),
        }
    }
    let stage = PathBuf::from(std::env::var("NACELLE_STAGE").context("NACELLE_STAGE is set by hack/bench")?);
    let setting = Setting {
        nacelle: stage.join("usr/bin/nacelle"),
        kernel: stage.join("usr/lib/nacelle/vmlinux"),
        initramfs: stage.join("usr/lib/nacelle/initramfs.cpio"),
        rounds,
    };
    for name in names {
        let reports: Vec<Report> = match name.as_str() {
            "boot" => vec![boot::run(&setting)?],
            "clone" => vec![clone::run(&setting)?],
            "start" => vec![start::run(&setting).await?],
            "exec" => vec![exec::run(setting.rounds).await?],
            "container" => vec![container::run(setting.rounds).await?],
            "isolation" => isolation::run(setting.rounds).await?,
            "memory" => memory::run(&setting)?,
            "fs" => fs::run(&setting)?,
            "net" => net::run(&setting)?,
            "pods" => vec![pods::run(setting.rounds).await?],
            "restart" => vec![restart::run(setting.rounds).await?],
            "merge" => report::merged(std::io::stdin().lock())?,
            _ => bail!(
                "no benchmark {name:?}: there are boot, clone, container, exec, fs, isolation, memory, net, pods, restart, start"
            ),
        };
        for report in reports {
            match samples {
                true => println!("{}", report.samples()?),
                false => report.print(json),
            }
        }
    }
    Ok(())
}
