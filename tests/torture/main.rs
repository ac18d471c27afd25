//! The torture: pods, containers and images at random, and everything that can go wrong, at random moments. After each
//! point all that is promised has to hold. Run by `hack/torture` on a node.

mod check;
mod fault;
mod helper;
mod node;
mod plan;
mod pods;
mod world;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use plan::{Fault, Plan};
use world::World;

struct Options {
    seed: u64,
    points: usize,
    minutes: Option<u64>,
    program: PathBuf,
    /// Where the daemon's log is to be kept.
    log: Option<PathBuf>,
}

fn options() -> Result<Options> {
    let mut options = Options { seed: 1, points: 30, minutes: None, program: "nacelle".into(), log: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{name} wants a value"))?;
        match name.as_str() {
            "--seed" => options.seed = value.parse().context("--seed")?,
            "--points" => options.points = value.parse().context("--points")?,
            "--minutes" => options.minutes = Some(value.parse().context("--minutes")?),
            "--daemon-log" => options.log = Some(value.into()),
            "--program" => options.program = value.into(),
            _ => bail!("unknown option {name}"),
        }
    }
    Ok(options)
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let Options { seed, points, minutes, program, log } = options()?;
    let steps = plan::steps(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime/sandbox/src"))?;
    let plan = Plan::new(seed, steps.clone());
    let begun = Instant::now();
    let mut hit: BTreeMap<String, usize> = BTreeMap::new();
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let (mut done, mut failed) = (0, 0);
    let mut world = None;
    for number in 0..points {
        if minutes.is_some_and(|minutes| begun.elapsed() >= Duration::from_secs(minutes * 60)) {
            break;
        }
        let point = plan.point(number);
        let point_begun = Instant::now();
        println!("point {number}: {point}");
        let mut here = match world.take() {
            Some(world) => world,
            None => World::new(&program, log.as_deref()).await?,
        };
        let mut broken = here.point(&point).await;
        if number + 1 == points && broken.is_empty() {
            broken = here.end().await;
        }
        done += 1;
        if let Fault::Step { name, .. } = &point.fault
            && here.was_met()
        {
            *hit.entry(name.clone()).or_default() += 1;
        }
        let kind = format!("{:?}", point.fault);
        let kind = kind.split([' ', '(']).next().unwrap_or_default().to_owned();
        *kinds.entry(kind).or_default() += usize::from(here.was_met());
        let met = if here.was_met() { "" } else { ", not met" };
        let seconds = point_begun.elapsed().as_secs_f64();
        if broken.is_empty() {
            println!("point {number}: holds after {seconds:.1} s{met}");
            world = Some(here);
            continue;
        }
        failed += 1;
        println!("point {number}: BROKEN after {seconds:.1} s{met}, seed {seed}: {point}");
        for line in &broken {
            println!("  {line}");
        }
        println!("  the same again: hack/torture --seed {seed} --points {}", number + 1);
        println!("  the daemon's last words:");
        for line in here.last_words() {
            println!("  | {line}");
        }
        // What is broken stays so: the next point has a new place.
    }
    if let Some(mut world) = world
        && done < points
    {
        for line in world.end().await {
            failed += 1;
            println!("at the end of seed {seed}: {line}");
        }
    }
    let missed: Vec<_> = steps.iter().filter(|step| !hit.contains_key(*step)).cloned().collect();
    println!("seed {seed}: {done} points in {:.0} s, {failed} broken", begun.elapsed().as_secs_f64());
    println!("faults met: {kinds:?}");
    println!("steps met: {} of {}; not yet: {}", hit.len(), steps.len(), missed.join(" "));
    // As Rust's test programs end, for hack/test.
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("test torture::{seed} ... {word}");
    println!(
        "test result: {word}. {}; 0 ignored;",
        if failed == 0 { "1 passed; 0 failed" } else { "0 passed; 1 failed" }
    );
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
