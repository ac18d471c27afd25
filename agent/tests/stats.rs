//! What the agent tells of what its containers use.

mod harness;

use std::time::{Duration, Instant};

use harness::Agent;
use nacelle_proto::agent::v1::{ContainerUsage, StatsRequest, StatsResponse};

async fn stats(agent: &mut Agent, processes: bool) -> StatsResponse {
    agent.calls.stats(StatsRequest { processes }).await.expect("an answer").into_inner()
}

fn of<'a>(stats: &'a StatsResponse, id: &str) -> Option<&'a ContainerUsage> {
    stats.containers.iter().find(|container| container.container_id == id)
}

#[tokio::test]
async fn time_and_files_of_a_container_show_until_it_ends() {
    if !harness::possible() {
        return;
    }
    let mut agent = Agent::start().await;
    let work = "head -c 4194304 /dev/zero > /srv/file; exec 7< /srv/file; while :; do :; done";
    agent.run("busy", 1, &["sh", "-c", work]).await;
    agent.run("idle", 2, &["sleep", "1000"]).await;
    let deadline = Instant::now() + Duration::from_secs(30);
    let found = loop {
        let found = stats(&mut agent, true).await;
        let busy = of(&found, "busy").unwrap();
        let used = busy.group.as_ref().unwrap().cpu.as_ref().unwrap().usage;
        if used > 50_000 && busy.writable_layer.is_some_and(|layer| layer.bytes >= 4 << 20) {
            break found;
        }
        assert!(Instant::now() < deadline, "{busy:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let (busy, idle) = (of(&found, "busy").unwrap(), of(&found, "idle").unwrap());
    let cpu = |usage: &ContainerUsage| usage.group.as_ref().unwrap().cpu.as_ref().unwrap().usage;
    assert!(cpu(idle) < cpu(busy), "{idle:?}");
    assert!(idle.writable_layer.unwrap().bytes < 1 << 20);
    let processes = busy.processes.unwrap();
    assert_eq!((processes.processes, processes.sockets), (1, 0));
    assert!(processes.open_files >= 4 && processes.open_files_limit.is_some(), "{processes:?}");
    // All of them together, on a file system that they share.
    assert!(found.pod.as_ref().unwrap().cpu.as_ref().unwrap().usage >= cpu(busy));
    assert!(found.scratch.unwrap().total_bytes > 0);
    assert!(stats(&mut agent, false).await.containers.iter().all(|container| container.processes.is_none()));

    agent.remove("busy").await;
    let found = stats(&mut agent, false).await;
    assert!(of(&found, "busy").is_none() && of(&found, "idle").is_some());
}
