//! What happens at each point: drawn from the seed and the point's number alone, so that it happens again.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use fastrand::Rng;

/// What a failpoint does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// The daemon is killed there.
    Kill,
    /// It stands still there, and goes on or is killed later.
    Stop { then_kill: bool },
    /// The step fails with this error.
    Fail(&'static str),
}

/// When the CNI plugin of the tests does something else than the real one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whim {
    /// `ADD` or `DEL`.
    pub command: &'static str,
    /// `before` or `after` the real one has done its work.
    pub when: &'static str,
    /// `fail`, `kill` (itself), `stop` (itself, until it is continued) or `hang`.
    pub how: &'static str,
    /// Whether the daemon is killed while it hangs or stands still.
    pub then_kill: bool,
}

impl Whim {
    /// Whether the plugin neither ends nor goes on by itself.
    pub fn stands_still(&self) -> bool {
        matches!(self.how, "hang" | "stop")
    }
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// At a step within the daemon, at the turn of this number.
    Step { name: String, act: Act, turn: u32 },
    /// The daemon is killed this many milliseconds after calls began.
    KillDaemon { after: u64 },
    /// It stands still for a while.
    StopDaemon { after: u64, lasting: u64 },
    /// A VMM is killed.
    KillVmm { after: u64 },
    /// A guest stands still for a while.
    StopVmm { after: u64, lasting: u64 },
    /// The process that builds containers and processes in the guest is killed, as often as there is one.
    KillHelper,
    /// A CNI plugin does not do what it should.
    Plugin(Whim),
    /// The file system of the records is full; the daemon is restarted meanwhile or is not.
    FullDisk { restart: bool },
    /// The daemon may have only so many descriptors more than it has.
    FewDescriptors { more: u64 },
    /// A registry takes a connection and never answers.
    Registry,
    /// The file system of a volume never answers.
    HostPath,
}

/// What is asked of the daemon meanwhile, of one pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    RunPod,
    RemovePod,
    CreateContainer,
    StopContainer,
    RemoveContainer,
    /// Its log is renamed, and the daemon is asked to go on in a new one.
    RotateLog,
    Nothing,
}

/// What is asked beside that, and changes no pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aside {
    Exec,
    Pull,
    RemoveImage,
    Look,
}

/// One point.
#[derive(Debug, Clone)]
pub struct Point {
    pub fault: Fault,
    /// What the fault is to meet.
    pub change: Change,
    /// What another pod is asked for.
    pub beside: Change,
    pub aside: Aside,
    /// Whether the daemon is killed afterwards in any case.
    pub restart: bool,
    /// For the choice of pods and containers.
    pub pick: u64,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} during {:?}, beside {:?} and {:?}", self.fault, self.change, self.beside, self.aside)?;
        if self.restart { f.write_str(", then a restart") } else { Ok(()) }
    }
}

/// The points of a seed.
pub struct Plan {
    seed: u64,
    /// Steps of the daemon that have failpoints.
    steps: Vec<String>,
}

/// Kinds of faults from outside.
const OUTSIDE: usize = 11;

impl Plan {
    pub fn new(seed: u64, steps: Vec<String>) -> Self {
        Self { seed, steps }
    }

    /// The point of this number. Of three, two are within the daemon; each step and each kind of fault has its turn
    /// before any has a second.
    pub fn point(&self, number: usize) -> Point {
        let mut rng = Rng::with_seed(self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ number as u64);
        let fault = match number % 3 {
            2 => self.outside(self.turn(number / 3, OUTSIDE), &mut rng),
            rest => {
                let name = self.steps[self.turn(number / 3 * 2 + rest, self.steps.len())].clone();
                step(name, &mut rng)
            }
        };
        let change = met_by(&fault, &mut rng);
        let mut beside = || any_change(&mut rng);
        let beside = match beside() {
            // Pods cost the most.
            Change::RunPod => Change::Nothing,
            other => other,
        };
        let aside = match rng.usize(..6) {
            0 => Aside::Pull,
            1 => Aside::RemoveImage,
            2 => Aside::Look,
            _ => Aside::Exec,
        };
        Point { fault, change, beside, aside, restart: rng.u8(..4) == 0, pick: rng.u64(..) }
    }

    /// Whose turn it is: the decks of cards are shuffled by the seed.
    fn turn(&self, number: usize, of: usize) -> usize {
        let mut deck: Vec<usize> = (0..of).collect();
        Rng::with_seed(self.seed ^ ((number / of) as u64) << 32).shuffle(&mut deck);
        deck[number % of]
    }

    fn outside(&self, kind: usize, rng: &mut Rng) -> Fault {
        let whim = |rng: &mut Rng, command| {
            let when = *rng.choice(&["before", "after"]).unwrap_or(&"before");
            let how = *rng.choice(&["fail", "kill", "stop", "hang", "hang"]).unwrap_or(&"hang");
            Fault::Plugin(Whim { command, when, how, then_kill: rng.bool() })
        };
        match kind {
            0 | 1 => Fault::KillDaemon { after: rng.u64(..2000) },
            2 => Fault::StopDaemon { after: rng.u64(..1000), lasting: rng.u64(100..3000) },
            3 => Fault::KillVmm { after: rng.u64(..1000) },
            4 => Fault::StopVmm { after: rng.u64(..500), lasting: rng.u64(100..5000) },
            5 => whim(rng, "ADD"),
            6 => whim(rng, "DEL"),
            7 => Fault::FullDisk { restart: rng.bool() },
            8 => Fault::FewDescriptors { more: rng.u64(..30) },
            9 => Fault::KillHelper,
            _ if rng.bool() => Fault::Registry,
            _ => Fault::HostPath,
        }
    }
}

/// Steps after which nothing can fail in the daemon: an error there would be none that it can meet.
const CANNOT_FAIL: [&str; 4] = ["create.record", "reopen.recorded", "start.ready", "start_container.guest"];

fn step(name: String, rng: &mut Rng) -> Fault {
    let may_fail = !CANNOT_FAIL.contains(&name.as_str());
    let act = match rng.usize(..8) {
        0 | 1 => Act::Stop { then_kill: rng.bool() },
        2 | 3 if may_fail => Act::Fail("EIO"),
        4 if may_fail => Act::Fail("ENOSPC"),
        5 if may_fail => Act::Fail("EMFILE"),
        _ => Act::Kill,
    };
    // Some are reached more than once.
    let turn = if matches!(name.as_str(), "teardown.device" | "adopt.held" | "adopt.asked") { rng.u32(..2) } else { 0 };
    Fault::Step { name, act, turn }
}

fn any_change(rng: &mut Rng) -> Change {
    use Change::{CreateContainer, Nothing, RemoveContainer, RemovePod, RotateLog, RunPod, StopContainer};
    let all = [RunPod, RemovePod, CreateContainer, CreateContainer, StopContainer, RemoveContainer, RotateLog, Nothing];
    rng.choice(&all).copied().unwrap_or(Nothing)
}

/// What has to be asked for the fault to be met.
fn met_by(fault: &Fault, rng: &mut Rng) -> Change {
    match fault {
        Fault::Step { name, .. } => match name.split('.').next().unwrap_or_default() {
            "start" | "vm" => Change::RunPod,
            "create" | "start_container" => Change::CreateContainer,
            "teardown" | "remove_container" => Change::RemoveContainer,
            "stop" | "release" | "remove" => Change::RemovePod,
            "reopen" => Change::RotateLog,
            _ => Change::Nothing,
        },
        Fault::Plugin(Whim { command: "ADD", .. }) => Change::RunPod,
        Fault::Plugin(_) => Change::RemovePod,
        Fault::HostPath | Fault::Registry => Change::Nothing,
        Fault::KillHelper => Change::CreateContainer,
        // A guest whose disk's file cannot grow has an error of its disk.
        Fault::FullDisk { .. } => {
            *rng.choice(&[Change::RunPod, Change::RemovePod, Change::RotateLog]).unwrap_or(&Change::RunPod)
        }
        _ => any_change(rng),
    }
}

/// The names of all steps in the source of the daemon.
pub fn steps(source: &Path) -> Result<Vec<String>> {
    let mut steps = Vec::new();
    let mut directories = vec![source.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                directories.push(entry.path());
            } else {
                let text = std::fs::read_to_string(entry.path())?;
                let names = text.split("step!(\"").skip(1).filter_map(|rest| rest.split('"').next());
                steps.extend(names.map(str::to_owned));
            }
        }
    }
    steps.sort();
    steps.dedup();
    ensure!(!steps.is_empty(), "no failpoints in {}", source.display());
    Ok(steps)
}
