//! One place of the torture: a daemon, the pods that are wanted of it, and what is done to them at a point.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use futures_util::future::join_all;
use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, limit};
use rustix::process::{Pid, Signal};
use tokio::time::{Instant, sleep, timeout};

use crate::check::Check;
use crate::fault::{Targets, aside, disturb, may_fail};
use crate::helper::Killer;
use crate::node::{Node, PAUSE};
use crate::plan::{Act, Aside, Change, Fault, Point};
use crate::pods::{IMAGE, Pod, Want};

/// How many pods there are between points, at least and at most.
const PODS: (usize, usize) = (2, 3);
/// Containers of a pod, at most.
const CONTAINERS: usize = 3;

pub struct World {
    node: Node,
    client: Client,
    pods: Vec<Pod>,
    check: Check,
    rng: Rng,
    /// How many pods and containers were ever wanted.
    number: usize,
    met: bool,
    killer: Option<Killer>,
}

impl World {
    pub async fn new(program: &Path, log: Option<&Path>) -> Result<Self> {
        let node = Node::new(program, log).await?;
        let client = node.client().await?;
        client.pull(IMAGE).await?;
        println!("  a daemon in {}", node.path().display());
        std::fs::create_dir(node.path().join("k"))?;
        let mut world = Self {
            node,
            client,
            pods: Vec::new(),
            check: Check::default(),
            rng: Rng::with_seed(0),
            number: 0,
            met: false,
            killer: None,
        };
        // What a daemon without pods has.
        let broken = world.check.all(&world.node, &world.client, &mut world.pods).await;
        ensure!(broken.is_empty(), "before the first pod: {broken:#?}");
        Ok(world)
    }

    /// Whether the last point's fault was met by anything.
    pub fn was_met(&self) -> bool {
        self.met
    }

    pub fn last_words(&mut self) -> Vec<String> {
        let log = self.node.daemon().log();
        let lines: Vec<_> = log.lines().map(str::to_owned).collect();
        lines[lines.len().saturating_sub(80)..].to_vec()
    }

    /// Goes through one point; what does not hold afterwards.
    pub async fn point(&mut self, point: &Point) -> Vec<String> {
        self.met = false;
        match self.try_point(point).await {
            Ok(broken) => broken,
            Err(error) => vec![format!("{error:#}")],
        }
    }

    /// Removes all pods; what is left then.
    pub async fn end(&mut self) -> Vec<String> {
        for pod in &mut self.pods {
            pod.wanted = false;
        }
        if let Err(error) = self.settle().await {
            return vec![format!("at the end: {error:#}")];
        }
        let mut broken = self.check.all(&self.node, &self.client, &mut self.pods).await;
        broken.extend(self.node.daemon().leftovers());
        broken
    }

    async fn try_point(&mut self, point: &Point) -> Result<Vec<String>> {
        self.rng = Rng::with_seed(point.pick);
        self.prepare()?;
        let begun = Instant::now();
        self.settle().await.context("before the point")?;
        let ready = self.check.all(&self.node, &self.client, &mut self.pods).await;
        ensure!(ready.is_empty(), "before the point: {ready:#?}");
        let prepared = begun.elapsed();
        let _ = self.node.said();

        let subject = self.rng.usize(..self.pods.len());
        let other = (subject + 1) % self.pods.len();
        let victim = self.pods[subject].id.clone().context("a pod's id")?;
        let vmm = Pid::from_raw(self.client.vmm_pid(&victim).await?).context("a VMM's process")?;
        // One that nothing is done to.
        let bystander = self.pods[other].running(0).and_then(|at| self.pods[other].containers[at].id.clone());
        let bystander = bystander.context("a container that runs")?;
        self.arm(point, &victim).await?;
        self.want(point.change, subject)?;
        // What happens to the other pod is not to be the bystander's end.
        match point.beside {
            change @ (Change::CreateContainer | Change::RotateLog) => self.want(change, other)?,
            change @ (Change::StopContainer | Change::RemoveContainer) if self.pods.len() > 2 => {
                self.want(change, (subject + 2) % self.pods.len())?;
            }
            _ => {}
        }

        let mut broken = self.torment(point, vmm, &victim, &bystander).await?;
        if let Fault::KillVmm { .. } = point.fault {
            self.expect_end(&victim).await?;
        }
        let tormented = begun.elapsed() - prepared;
        self.settle().await.context("after the fault")?;
        let settled = begun.elapsed() - prepared - tormented;
        broken.extend(self.check.all(&self.node, &self.client, &mut self.pods).await);
        println!(
            "  {} pods; made ready in {prepared:.1?}, tormented for {tormented:.1?}, settled in {settled:.1?}",
            self.pods.len()
        );
        Ok(broken)
    }

    /// Wants as many pods and containers as there have to be, and not more.
    fn prepare(&mut self) -> Result<()> {
        while self.pods.len() < PODS.0 {
            self.want(Change::RunPod, 0)?;
        }
        let many = self.pods.len().saturating_sub(PODS.1);
        for pod in self.pods.iter_mut().take(many) {
            pod.wanted = false;
        }
        for at in 0..self.pods.len() {
            for container in self.pods[at].containers.iter_mut().rev().skip(CONTAINERS - 1) {
                container.want = Want::Gone;
            }
            if self.pods[at].containers.iter().all(|container| container.want != Want::Running) {
                self.want(Change::CreateContainer, at)?;
            }
        }
        Ok(())
    }

    fn want(&mut self, change: Change, at: usize) -> Result<()> {
        self.number += 1;
        let (number, pick) = (self.number, self.rng.u64(..));
        match change {
            Change::RunPod => {
                let mut pod = Pod::wanted(&self.node.path().join("k"), self.node.cgroup(), number)?;
                pod.want_container(number, pick.is_multiple_of(2), None)?;
                self.pods.push(pod);
            }
            Change::RemovePod => self.pods[at].wanted = false,
            Change::CreateContainer => {
                let disk = pick.is_multiple_of(3).then(|| self.node.disk());
                self.pods[at].want_container(number, true, disk)?;
            }
            Change::RotateLog => {
                if let Some(container) = self.pods[at].running(pick) {
                    self.pods[at].containers[container].want_rotation();
                }
            }
            Change::StopContainer | Change::RemoveContainer => {
                if let Some(container) = self.pods[at].running(pick) {
                    let want = if change == Change::StopContainer { Want::Ended } else { Want::Gone };
                    self.pods[at].containers[container].want = want;
                }
            }
            Change::Nothing => {}
        }
        Ok(())
    }

    /// Prepares the fault, before anything is asked.
    async fn arm(&mut self, point: &Point, victim: &str) -> Result<()> {
        match &point.fault {
            Fault::Step { name, act, turn } => {
                let act = match act {
                    Act::Kill => "kill",
                    Act::Stop { .. } => "stop",
                    Act::Fail(errno) => errno,
                };
                let skip = if *turn == 0 { String::new() } else { format!("{turn}*off->") };
                self.node.launch(&format!("{name}={skip}1*return({act})"))?;
                self.node.answers_or_not().await?;
                self.client = self.node.client().await?;
            }
            Fault::Plugin(whim) => self.node.arm(*whim)?,
            Fault::FullDisk { restart } => {
                self.node.fill()?;
                if *restart {
                    self.client = self.node.serve().await.context("start with a full disk")?;
                }
            }
            Fault::KillHelper => {
                self.number += 1;
                let volume = self.node.path().join("k").join(format!("killer{}", self.number));
                self.killer = Some(Killer::start(&self.client, victim, volume).await?);
            }
            Fault::FewDescriptors { more } => self.node.limit_descriptors(Some(*more))?,
            _ => {}
        }
        Ok(())
    }

    /// Asks for all that is wanted while the fault is there, and takes the fault away.
    async fn torment(&mut self, point: &Point, vmm: Pid, victim: &str, bystander: &str) -> Result<Vec<String>> {
        let Self { node, client, pods, killer, .. } = self;
        let done = AtomicBool::new(false);
        let calls = async {
            let drives = pods.iter_mut().map(|pod| async {
                let result = timeout(limit(60), pod.drive(client)).await;
                let result = result.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer")));
                result.map_err(|error| (pod.id.as_deref() == Some(victim), pod.wanted, format!("{error:#}"))).err()
            });
            let aside = timeout(limit(60), aside(client, point.aside, bystander));
            let (drives, aside) = tokio::join!(join_all(drives), aside);
            done.store(true, Ordering::Relaxed);
            let aside = aside.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer")));
            (drives.into_iter().flatten().collect::<Vec<_>>(), aside)
        };
        let targets = Targets { victim, vmm, bystander, killer: killer.as_ref() };
        let fault = disturb(node, client, &point.fault, targets, &done);
        let ((failed, aside), met) = tokio::join!(calls, fault);
        let met = met.context("during the fault")?;

        let mut broken = Vec::new();
        for (of_victim, wanted, error) in failed {
            let excused = match &point.fault {
                Fault::KillVmm { .. } | Fault::KillHelper => of_victim,
                // A full disk keeps no pod from ending.
                Fault::FullDisk { .. } => wanted,
                fault => may_fail(fault),
            };
            // A kubelet asks for it again.
            let removed = point.aside == Aside::RemoveImage && error.contains("is not present: pull it first");
            if !excused && !removed {
                broken.push(format!("a call failed that had no reason to: {error}"));
            }
        }
        if let Err(error) = aside
            && !may_fail(&point.fault)
            && !matches!(point.fault, Fault::KillVmm { .. })
            && !matches!((&point.fault, point.aside), (Fault::FullDisk { .. }, Aside::Pull | Aside::RemoveImage))
        {
            broken.push(format!("{:?} failed, which had no reason to: {error:#}", point.aside));
        }

        self.killer = None;
        self.node.empty();
        if let Fault::Plugin(whim) = &point.fault {
            self.node.disarm(*whim);
        }
        if self.node.stands_still() {
            self.node.signal(Signal::CONT);
        }
        let said = self.node.said();
        self.met = met || said.contains("fails here");
        if self.node.has_ended() || self.node.pid().is_none() || point.restart {
            self.node.serve().await.context("restart")?;
        } else if matches!(point.fault, Fault::FewDescriptors { .. }) {
            self.node.limit_descriptors(None)?;
        }
        self.client = self.node.client().await?;
        Ok(broken)
    }

    /// Asks for all that is wanted until it is there.
    async fn settle(&mut self) -> Result<()> {
        let deadline = Instant::now() + limit(30);
        let mut said = Vec::new();
        loop {
            let Self { client, pods, .. } = self;
            let results = join_all(pods.iter_mut().map(|pod| timeout(limit(60), pod.drive(client)))).await;
            let failed: Vec<_> = results
                .into_iter()
                .filter_map(|result| match result {
                    Ok(Ok(())) => None,
                    Ok(Err(error)) => Some(format!("{error:#}")),
                    Err(_) => Some("no answer".to_owned()),
                })
                .collect();
            if failed.is_empty() {
                break;
            }
            if failed != said {
                println!("  not there yet: {failed:?}");
                said.clone_from(&failed);
            }
            ensure!(Instant::now() < deadline, "still fails: {failed:#?}");
            sleep(PAUSE * 4).await;
        }
        let mut kept = Vec::new();
        for mut pod in std::mem::take(&mut self.pods) {
            if !pod.settle()? {
                kept.push(pod);
            }
        }
        self.pods = kept;
        Ok(())
    }

    /// The pod whose VMM was killed has ended, and says so.
    async fn expect_end(&mut self, id: &str) -> Result<()> {
        let Some(pod) = self.pods.iter_mut().find(|pod| pod.id.as_deref() == Some(id)) else { return Ok(()) };
        if let Err(error) = self.client.wait_not_ready(id).await {
            // Removed meanwhile, as it had to be.
            ensure!(!pod.wanted, "the end of a pod whose VMM was killed: {error:#}");
            return Ok(());
        }
        for container in pod.containers.iter().filter_map(|container| container.id.as_ref()) {
            // One that was being created may be gone.
            if let Ok(status) = self.client.status(container).await {
                ensure!(
                    status.state() == cri::ContainerState::ContainerExited,
                    "container {container} of a killed guest is {:?}",
                    status.state()
                );
            }
        }
        pod.wanted = false;
        Ok(())
    }
}
