//! What goes wrong while calls are made, and what must go on all the same.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, image, limit};
use nacelle_tests::dead::Dead;
use rustix::process::{Pid, Signal, kill_process};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout};

use crate::helper::Killer;
use crate::node::{Node, PAUSE};
use crate::plan::{Act, Aside, Fault};
use crate::pods::IMAGE;

/// An image that is pulled and removed: the containers' own, by another name.
const OTHER_NAME: &str = "busybox-docker";

/// Whether calls may fail while this is so.
pub fn may_fail(fault: &Fault) -> bool {
    match fault {
        Fault::Step { act, .. } => *act != Act::Stop { then_kill: false },
        Fault::KillDaemon { .. } | Fault::FewDescriptors { .. } => true,
        Fault::Plugin(whim) => !whim.stands_still() || whim.then_kill,
        _ => false,
    }
}

/// What is asked beside the changes.
pub async fn aside(client: &Client, what: Aside, bystander: &str) -> Result<()> {
    let spec = || Some(cri::ImageSpec { image: image(OTHER_NAME), ..Default::default() });
    match what {
        Aside::Exec => {
            let answer = client.exec(bystander, &["echo", "here"]).await.context("ExecSync")?;
            ensure!(answer.stdout == b"here\n", "ExecSync: {answer:?}");
        }
        Aside::Pull => drop(client.pull(OTHER_NAME).await.context("PullImage")?),
        Aside::RemoveImage => {
            let request = cri::RemoveImageRequest { image: spec() };
            client.images.clone().remove_image(request).await.context("RemoveImage")?;
        }
        Aside::Look => {
            client.runtime.clone().status(cri::StatusRequest { verbose: true }).await.context("Status")?;
            client.images.clone().list_images(cri::ListImagesRequest { filter: None }).await.context("ListImages")?;
            client.stats(bystander).await.context("ContainerStats")?;
        }
    }
    Ok(())
}

/// Whom a fault is about.
#[derive(Debug, Clone, Copy)]
pub struct Targets<'a> {
    /// The pod that it is to meet, and its VMM.
    pub victim: &'a str,
    pub vmm: Pid,
    /// A container of another pod.
    pub bystander: &'a str,
    /// What kills the helper in the victim's guest, if that is the fault.
    pub killer: Option<&'a Killer>,
}

/// What goes wrong while calls are made, until they are `done`; whether anything met it.
pub async fn disturb(
    node: &mut Node,
    client: &Client,
    fault: &Fault,
    targets: Targets<'_>,
    done: &AtomicBool,
) -> Result<bool> {
    let Targets { victim, vmm, bystander, killer } = targets;
    let milliseconds = Duration::from_millis;
    let is_done = || done.load(Ordering::Relaxed);
    match fault {
        Fault::Step { name, act, .. } => {
            // The daemon takes pods over whether anything is asked or not.
            let deadline = Instant::now() + if name.starts_with("adopt.") { limit(5) } else { Duration::ZERO };
            loop {
                if node.has_ended() {
                    return Ok(true);
                }
                if node.stands_still() {
                    sleep(PAUSE * 10).await;
                    match act {
                        Act::Stop { then_kill: true } => node.kill(),
                        _ => node.signal(Signal::CONT),
                    }
                    return Ok(true);
                }
                if is_done() && (Instant::now() > deadline || matches!(act, Act::Fail(_))) {
                    return Ok(false);
                }
                sleep(PAUSE).await;
            }
        }
        Fault::KillDaemon { after } => {
            sleep(milliseconds(*after)).await;
            node.kill();
            Ok(true)
        }
        Fault::StopDaemon { after, lasting } => {
            sleep(milliseconds(*after)).await;
            node.signal(Signal::STOP);
            sleep(milliseconds(*lasting)).await;
            node.signal(Signal::CONT);
            Ok(true)
        }
        Fault::KillVmm { after } => {
            sleep(milliseconds(*after)).await;
            Ok(kill_process(vmm, Signal::KILL).is_ok())
        }
        Fault::StopVmm { after, lasting } => {
            sleep(milliseconds(*after)).await;
            let stopped = kill_process(vmm, Signal::STOP).is_ok();
            sleep(milliseconds(*lasting)).await;
            let _ = kill_process(vmm, Signal::CONT);
            Ok(stopped)
        }
        Fault::Plugin(whim) => {
            let met = Node::until(limit(60), || node.is_met() || is_done()).await && node.is_met();
            if met && whim.stands_still() {
                aside(client, Aside::Exec, bystander).await.context("while a plugin hangs")?;
                if whim.then_kill {
                    node.kill();
                }
                node.disarm(*whim);
                // It may be about to stand still.
                while whim.how == "stop" && !is_done() {
                    node.continue_plugin();
                    sleep(PAUSE).await;
                }
            }
            Ok(met)
        }
        Fault::KillHelper => {
            let Some(killer) = killer else { return Ok(false) };
            Node::until(limit(60), is_done).await;
            killer.end(client).await
        }
        Fault::FullDisk { .. } | Fault::FewDescriptors { .. } => Ok(true),
        Fault::Registry => {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let name = format!("{}/silent:latest", listener.local_addr()?);
            let pull = {
                let mut images = client.images.clone();
                let image = Some(cri::ImageSpec { image: name, ..Default::default() });
                tokio::spawn(
                    async move { images.pull_image(cri::PullImageRequest { image, ..Default::default() }).await },
                )
            };
            let connection = timeout(limit(10), listener.accept()).await.context("the pull does not come")??;
            aside(client, Aside::Look, bystander).await.context("while a registry hangs")?;
            aside(client, Aside::Exec, bystander).await.context("while a registry hangs")?;
            aside(client, Aside::Pull, bystander).await.context("while a registry hangs")?;
            ensure!(!pull.is_finished(), "a pull has ended that cannot");
            pull.abort();
            drop(connection);
            Ok(true)
        }
        Fault::HostPath => {
            let dead = Dead::mount(node.path().join("dead"))?;
            let mut config = container_config(IMAGE, &["sleep", "1000"]);
            let host_path = dead.place().to_string_lossy().into_owned();
            config.mounts.push(cri::Mount { container_path: "/d".into(), host_path, ..cri::Mount::default() });
            let create = tokio::spawn({
                let (client, pod) = (client.clone(), victim.to_owned());
                async move { client.create_as(&pod, config).await }
            });
            for _ in 0..3 {
                aside(client, Aside::Exec, bystander).await.context("while a volume hangs")?;
            }
            aside(client, Aside::Look, bystander).await.context("while a volume hangs")?;
            ensure!(!create.is_finished(), "a container is made of a volume that hangs: {:?}", create.await);
            drop(dead);
            let refused =
                timeout(limit(30), create).await.context("a volume is gone, and its container still waits")??;
            ensure!(refused.is_err(), "a container of a dead volume");
            Ok(true)
        }
    }
}
