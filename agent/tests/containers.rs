//! Containers as the host sees them: through the agent's calls and streams.

#![allow(clippy::unwrap_used)]

mod harness;

use std::time::Duration;

use harness::{Agent, possible};
use nacelle_proto::agent::v1::container_info::State;
use nacelle_proto::agent::v1::{
    ExecRequest, ForgetExecRequest, InfoRequest, ListContainersRequest, ResizeTerminalRequest, SetClockRequest,
    ShutdownRequest, SignalRequest, StatsRequest,
};
use nacelle_proto::stdio::Stream;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

macro_rules! agent {
    () => {
        match possible() {
            true => Agent::start().await,
            false => return,
        }
    };
}

async fn state(agent: &mut Agent, id: &str) -> State {
    let list = agent.calls.list_containers(ListContainersRequest {}).await.unwrap().into_inner();
    list.containers.iter().find(|container| container.container_id == id).unwrap().state()
}

fn kill(id: &str, exec: &str, signal: u32, all: bool) -> SignalRequest {
    SignalRequest { container_id: id.into(), exec_id: exec.into(), signal, all, exec_tree: false }
}

#[tokio::test]
async fn a_container_s_whole_life_leaves_nothing() {
    let mut agent = agent!();
    let spec = Agent::spec(&["sh", "-c", "echo out; echo err >&2; hostname; cat /etc/hosts /etc/hostname; exit 3"]);
    agent.calls.create_container(Agent::create("c", 1, &spec)).await.unwrap();
    assert_eq!(state(&mut agent, "c").await, State::Created);
    let again = agent.calls.create_container(Agent::create("c", 2, &spec)).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);

    let pid = agent.start_container("c").await.unwrap();
    assert!(pid > 1);
    assert_eq!(agent.wait("c", "").await, 3);
    assert_eq!(state(&mut agent, "c").await, State::Exited);
    let out = agent.read("c", "", Stream::Stdout).await;
    assert!(out.starts_with("out\npod-name\n127.0.0.1\tlocalhost\n") && out.ends_with("\npod-name\n"), "{out}");
    assert_eq!(agent.read("c", "", Stream::Stderr).await, "err\n");
    assert_eq!(agent.start_container("c").await.unwrap_err().code(), Code::FailedPrecondition);

    assert_eq!(agent.remove("c").await, [1]);
    assert_eq!(agent.remove("c").await, [0u32; 0]);
    assert_eq!(agent.start_container("c").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(agent.mounts(), [""; 0]);
    assert_eq!(agent.leftovers(), [""; 0].map(std::path::PathBuf::from));
}

#[tokio::test]
async fn a_bad_command_fails_at_start_with_its_path() {
    let mut agent = agent!();
    for (slot, command, code) in [(1, "/no/such", 127), (2, "no-such", 127), (3, "/srv/plain", 126), (4, "/srv", 126)] {
        let id = format!("c{slot}");
        agent.calls.create_container(Agent::create(&id, slot, &Agent::spec(&[command]))).await.unwrap();
        let error = agent.start_container(&id).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(command), "{}", error.message());
        assert_eq!(agent.wait(&id, "").await, code);
        assert_eq!(agent.remove(&id).await, [slot]);
    }
}

#[tokio::test]
async fn what_cannot_be_created_leaves_nothing() {
    let mut agent = agent!();
    let mut spec = Agent::spec(&["true"]);
    spec["mounts"].as_array_mut().unwrap().push(json!({"destination": "/x", "type": "no-such-fs", "source": "x"}));
    let error = agent.calls.create_container(Agent::create("c", 1, &spec)).await.unwrap_err();
    assert_eq!(error.code(), Code::Internal);
    let mut request = Agent::create("c", 1, &Agent::spec(&["true"]));
    request.user = "nobody-knows".into();
    let error = agent.calls.create_container(request).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("nobody-knows"), "{}", error.message());
    assert_eq!(agent.mounts(), [""; 0]);
    assert_eq!(agent.leftovers(), [""; 0].map(std::path::PathBuf::from));
    agent.run("c", 1, &["true"]).await;
    assert_eq!(agent.wait("c", "").await, 0);
}

#[tokio::test]
async fn exec_runs_as_the_container_does() {
    let mut agent = agent!();
    let mut spec = Agent::spec(&["sleep", "1000"]);
    spec["process"]["cwd"] = json!("/srv");
    let mut request = Agent::create("c", 1, &spec);
    request.user = "www".into();
    agent.calls.create_container(request).await.unwrap();
    let early = agent.exec("c", "e", &["true"]).await.unwrap_err();
    assert_eq!(early.code(), Code::FailedPrecondition);
    agent.start_container("c").await.unwrap();

    let (code, output) =
        agent.exec_output("c", "e1", &["sh", "-c", "id -u; id -g; id -G; pwd; echo $HOME; exit 7"]).await;
    assert_eq!((code, output.as_str()), (7, "33\n34\n34 4\n/srv\n/srv\n"));
    let again = agent.exec("c", "e1", &["true"]).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    let missing = agent.exec("c", "e2", &["/no/such", "x"]).await.unwrap_err();
    assert_eq!(missing.code(), Code::InvalidArgument);
    assert!(missing.message().contains("/no/such"), "{}", missing.message());
    assert!(agent.open("c", "e2", Stream::Stdout, 0).await.is_err(), "a failed exec leaves no process");

    agent.exec("c", "e3", &["sleep", "1000"]).await.unwrap();
    agent.calls.signal(kill("c", "e3", 9, false)).await.unwrap();
    assert_eq!(agent.wait("c", "e3").await, 137);
    agent.calls.signal(kill("c", "e3", 9, false)).await.unwrap();
    let forget = |exec: &str| ForgetExecRequest { container_id: "c".into(), exec_id: exec.into() };
    agent.calls.forget_exec(forget("e3")).await.unwrap();
    assert_eq!(agent.calls.forget_exec(forget("e3")).await.unwrap_err().code(), Code::NotFound);

    // Ten at once do not disturb each other.
    let mut running = tokio::task::JoinSet::new();
    for number in 0..10 {
        let mut calls = agent.calls.clone();
        let args = ["sh", "-c", "echo $NUMBER"].map(str::to_owned).to_vec();
        let env = vec![format!("NUMBER={number}")];
        let exec_id = format!("n{number}");
        running.spawn(async move {
            calls
                .exec(ExecRequest { container_id: "c".into(), exec_id, args, env, ..Default::default() })
                .await
                .unwrap();
        });
    }
    while let Some(result) = running.join_next().await {
        result.unwrap();
    }
    for number in 0..10 {
        assert_eq!(agent.read("c", &format!("n{number}"), Stream::Stdout).await, format!("{number}\n"));
    }
    agent.calls.signal(kill("c", "", 9, true)).await.unwrap();
    assert_eq!(agent.wait("c", "").await, 137);
    assert_eq!(agent.exec("c", "late", &["true"]).await.unwrap_err().code(), Code::FailedPrecondition);
    agent.remove("c").await;
    assert_eq!(agent.leftovers(), [""; 0].map(std::path::PathBuf::from));
}

#[tokio::test]
async fn a_command_of_any_length_is_refused_in_words_and_harms_no_other_call() {
    let mut agent = agent!();
    agent.run("c", 1, &["sleep", "1000"]).await;
    let waiting = {
        let mut calls = agent.calls.clone();
        let request = nacelle_proto::agent::v1::WaitRequest { container_id: "c".into(), exec_id: String::new() };
        tokio::spawn(async move { calls.wait(request).await })
    };
    for (number, length) in [200, 16_000, 62_000, 100_000].into_iter().enumerate() {
        // Each of its characters is three bytes, and becomes nine on the way.
        for (kind, letter) in ["x", "\u{2026}"].into_iter().enumerate() {
            let command = format!("/no/{}", letter.repeat(length / letter.len()));
            let error = agent.exec("c", &format!("e{number}-{kind}"), &[&command]).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{length}: {error}");
            assert!(error.message().starts_with("cannot execute \"/no/"), "{length}: {error}");
            assert!(error.message().len() < 5000, "{length}");
            let reason = if length > 4096 { "File name too long (os error 36)" } else { "no such file or directory" };
            assert!(error.message().ends_with(reason), "{length}: {error}");
        }
    }
    let mut calls = agent.calls.clone();
    calls.signal(kill("c", "", 9, false)).await.unwrap();
    let answer = waiting.await.unwrap().expect("a call that was under way all the while goes on");
    assert_eq!(answer.into_inner().exit_code, 137);
    // What is too long for a container's own process is refused in the same words.
    let command = format!("/no/{}", "x".repeat(100_000));
    agent.calls.create_container(Agent::create("d", 2, &Agent::spec(&[&command]))).await.unwrap();
    let error = agent.start_container("d").await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("bytes ...]"), "{error}");
    assert_eq!(agent.wait("d", "").await, 126);
}

#[tokio::test]
async fn standard_input_reaches_the_process_and_closes() {
    let mut agent = agent!();
    let mut request = Agent::create("c", 1, &Agent::spec(&["cat"]));
    request.stdin = true;
    agent.calls.create_container(request).await.unwrap();
    agent.start_container("c").await.unwrap();
    let mut stdin = agent.open("c", "", Stream::Stdin, 0).await.unwrap();
    stdin.write_all(b"one\n").await.unwrap();
    // A newer connection takes over without closing the input.
    let mut newer = agent.open("c", "", Stream::Stdin, 0).await.unwrap();
    newer.write_all(b"two\n").await.unwrap();
    newer.shutdown().await.unwrap();
    assert_eq!(agent.wait("c", "").await, 0);
    assert_eq!(agent.read("c", "", Stream::Stdout).await, "one\ntwo\n");
    assert!(agent.open("c", "", Stream::Stdin, 0).await.unwrap_err().contains("closed"));
}

#[tokio::test]
async fn much_output_survives_broken_connections() {
    let mut agent = agent!();
    agent.run("c", 1, &["seq", "1", "900000"]).await;
    let expected: String = (1..=900_000).map(|number| format!("{number}\n")).collect();
    let mut seen = Vec::new();
    while seen.len() < expected.len() {
        let mut socket = agent.open("c", "", Stream::Stdout, seen.len() as u64).await.unwrap();
        // Each connection breaks after its share, the last part of it unacknowledged.
        let mut share = 700_000;
        let mut chunk = vec![0; 50_000];
        while share > 0 && seen.len() < expected.len() {
            let count = socket.read(&mut chunk).await.unwrap();
            assert!(count > 0, "ended at {}", seen.len());
            seen.extend_from_slice(&chunk[..count]);
            share -= count.min(share);
            if share > 100_000 {
                socket.write_u64_le(seen.len() as u64).await.unwrap();
            }
        }
    }
    assert!(seen == expected.as_bytes());
    assert_eq!(agent.wait("c", "").await, 0);
}

#[tokio::test]
async fn a_terminal_has_a_size_and_an_end_of_input() {
    let mut agent = agent!();
    let mut spec = Agent::spec(&["sh", "-c", "stty size; tty; read line; echo got $line; stty size; cat; echo end"]);
    spec["process"]["consoleSize"] = json!({"height": 11, "width": 22});
    let mut request = Agent::create("c", 1, &spec);
    (request.terminal, request.stdin, request.user) = (true, true, "www".into());
    agent.calls.create_container(request).await.unwrap();
    agent.start_container("c").await.unwrap();
    let mut stdin = agent.open("c", "", Stream::Stdin, 0).await.unwrap();
    let resize = ResizeTerminalRequest { container_id: "c".into(), exec_id: String::new(), rows: 33, columns: 44 };
    tokio::time::sleep(Duration::from_millis(300)).await;
    agent.calls.resize_terminal(resize).await.unwrap();
    stdin.write_all(b"hello\n").await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    stdin.shutdown().await.unwrap();
    assert_eq!(agent.wait("c", "").await, 0);
    let output = agent.read("c", "", Stream::Stdout).await;
    assert_eq!(output, "11 22\r\n/dev/pts/0\r\nhello\r\ngot hello\r\n33 44\r\nend\r\n");
    assert!(agent.open("c", "", Stream::Stderr, 0).await.is_err());

    agent.run("d", 2, &["sleep", "1000"]).await;
    let args = vec!["tty".to_owned()];
    let request =
        ExecRequest { container_id: "d".into(), exec_id: "t".into(), args, terminal: true, ..Default::default() };
    agent.calls.exec(request).await.unwrap();
    assert_eq!(agent.read("d", "t", Stream::Stdout).await, "/dev/pts/0\r\n");
    assert_eq!(agent.wait("d", "t").await, 0);
}

#[tokio::test]
async fn the_filter_and_the_capabilities_hold_for_every_process() {
    let mut agent = agent!();
    for (slot, no_new_privileges) in [(1, json!(null)), (2, json!(false)), (3, json!(true))] {
        let id = format!("c{slot}");
        let look = "grep -E 'Seccomp:|CapEff|CapBnd|CapPrm|SigIgn' /proc/self/status; mkdir /tmp/x 2>&1";
        let mut spec = Agent::spec(&["sh", "-c", &format!("{look}; sleep 1000")]);
        if !no_new_privileges.is_null() {
            spec["process"]["noNewPrivileges"] = no_new_privileges;
        }
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]
        });
        agent.calls.create_container(Agent::create(&id, slot, &spec)).await.unwrap();
        agent.start_container(&id).await.unwrap();
        let (_, by_exec) = agent.exec_output(&id, "e", &["sh", "-c", look]).await;
        let bits = (1u64 << 0) | (1 << 27);
        assert!(
            by_exec.contains(&format!("CapPrm:\t{bits:016x}\nCapEff:\t{bits:016x}\nCapBnd:\t{bits:016x}\n")),
            "{by_exec}"
        );
        assert!(by_exec.contains("Seccomp:\t2\n") && by_exec.contains("not supported"), "{by_exec}");
        // Only the C library's own two signals, which its posix_spawn leaves so.
        assert!(by_exec.contains("SigIgn:\t0000000180000000\n"), "{by_exec}");
        let mut socket = agent.open(&id, "", Stream::Stdout, 0).await.unwrap();
        let mut by_init = vec![0; by_exec.len()];
        socket.read_exact(&mut by_init).await.unwrap();
        assert_eq!(String::from_utf8(by_init).unwrap(), by_exec);
    }
}

#[tokio::test]
async fn a_container_cannot_reach_disks_by_making_nodes() {
    let mut agent = agent!();
    let mut spec =
        Agent::spec(&["sh", "-c", "mknod /dev/disk b 7 0 && head -c 1 /dev/disk; head -c 1 /dev/zero | sha256sum"]);
    spec["linux"]["resources"] = json!({"devices": [{"allow": false, "access": "rwm"}]});
    agent.calls.create_container(Agent::create("c", 1, &spec)).await.unwrap();
    agent.start_container("c").await.unwrap();
    assert_eq!(agent.wait("c", "").await, 0);
    let errors = agent.read("c", "", Stream::Stderr).await;
    assert!(errors.contains("/dev/disk: Operation not permitted"), "{errors}");
    assert!(agent.read("c", "", Stream::Stdout).await.starts_with("6e340b9cffb37a98"), "/dev/zero works");
}

#[tokio::test]
async fn a_readonly_root_still_gets_its_mount_points() {
    let mut agent = agent!();
    let mut request = Agent::create(
        "c",
        1,
        &Agent::spec(&["sh", "-c", "touch /x; touch /etc/hosts; touch /dev/x && cat /etc/hostname"]),
    );
    request.readonly_rootfs = true;
    agent.calls.create_container(request).await.unwrap();
    agent.start_container("c").await.unwrap();
    assert_eq!(agent.wait("c", "").await, 0);
    assert_eq!(agent.read("c", "", Stream::Stdout).await, "pod-name\n");
    let errors = agent.read("c", "", Stream::Stderr).await;
    assert_eq!(errors.matches("Read-only file system").count(), 2, "{errors}");
}

#[tokio::test]
async fn an_exec_s_wait_does_not_wait_for_its_children() {
    let mut agent = agent!();
    agent.run("c", 1, &["sleep", "1000"]).await;
    agent.exec("c", "e", &["sh", "-c", "(sleep 1; echo late) & echo early"]).await.unwrap();
    assert_eq!(agent.wait("c", "e").await, 0);
    assert_eq!(agent.read("c", "e", Stream::Stdout).await, "early\nlate\n");
    // A container's children die with it, where it has a PID namespace and where not.
    agent.run("d", 2, &["sh", "-c", "sleep 1000 & true"]).await;
    assert_eq!(agent.read("d", "", Stream::Stdout).await, "");
    let mut spec = Agent::spec(&["sh", "-c", "sleep 1000 & true"]);
    spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    agent.calls.create_container(Agent::create("e", 3, &spec)).await.unwrap();
    agent.start_container("e").await.unwrap();
    assert_eq!(agent.read("e", "", Stream::Stdout).await, "");
}

/// A shell's commands that leave a child in a session of its own, whose parent ends at once, and print its id.
const DAEMON: &str = "setsid sh -c 'sleep 1000 & echo $!' < /dev/null; ";

/// How many processes a container has.
async fn processes(agent: &mut Agent, id: &str) -> u64 {
    let stats = agent.calls.stats(StatsRequest { processes: true }).await.unwrap().into_inner();
    let usage = stats.containers.iter().find(|usage| usage.container_id == id).unwrap();
    usage.processes.unwrap().processes
}

#[tokio::test]
async fn an_exec_is_killed_with_all_that_it_has_started_and_nothing_else() {
    let mut agent = agent!();
    agent.run("c", 1, &["sleep", "1000"]).await;
    let tree = |exec: &str, signal| SignalRequest { exec_tree: true, ..kill("c", exec, signal, false) };
    let mut held = vec![];
    for exec in ["killed", "forgotten", "ended", "other"] {
        let end = if exec == "ended" { "true" } else { "exec sleep 1000" };
        agent.exec("c", exec, &["sh", "-c", &format!("{DAEMON}{end}")]).await.unwrap();
        // Its child is there.
        let mut socket = agent.open("c", exec, Stream::Stdout, 0).await.unwrap();
        assert!(socket.read_u8().await.unwrap().is_ascii_digit());
        held.push(socket);
    }
    assert_eq!(agent.wait("c", "ended").await, 0);
    // The container's own, three execs with a child each, and what the fourth has left behind.
    until(&mut agent, "c", 8).await;
    agent.calls.signal(tree("killed", 9)).await.unwrap();
    assert_eq!(agent.wait("c", "killed").await, 137);
    until(&mut agent, "c", 6).await;

    let forget = |exec: &str| ForgetExecRequest { container_id: "c".into(), exec_id: exec.into() };
    // One that runs goes with what it has started, one that has ended leaves it.
    agent.calls.forget_exec(forget("forgotten")).await.unwrap();
    agent.calls.forget_exec(forget("ended")).await.unwrap();
    agent.calls.forget_exec(forget("killed")).await.unwrap();
    until(&mut agent, "c", 4).await;
    // Another signal reaches all of the tree as well; and nobody but execs has one.
    agent.calls.signal(tree("other", 15)).await.unwrap();
    assert_eq!(agent.wait("c", "other").await, 143);
    until(&mut agent, "c", 2).await;
    for wrong in [tree("", 9), SignalRequest { all: true, ..tree("other", 9) }] {
        let error = agent.calls.signal(wrong).await.unwrap_err();
        assert!(error.code() == Code::InvalidArgument && error.message().contains("exec_tree"), "{error}");
    }
    agent.calls.forget_exec(forget("other")).await.unwrap();
    // What is empty is gone, what is not stays until it is.
    assert_eq!(agent.groups("c").len(), 1, "{:?}", agent.groups("c"));
    assert_eq!(state(&mut agent, "c").await, State::Running);
    agent.remove("c").await;
    assert_eq!(agent.leftovers(), [""; 0].map(std::path::PathBuf::from));
}

/// Waits until a container has this many processes: what is killed ends when the kernel gets to it.
async fn until(agent: &mut Agent, id: &str, count: u64) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        let found = processes(agent, id).await;
        if found == count {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{found} processes instead of {count}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_exec_that_is_forgotten_while_it_is_started_does_not_run_on() {
    let mut agent = agent!();
    agent.run("c", 1, &["sleep", "1000"]).await;
    let forget = || ForgetExecRequest { container_id: "c".into(), exec_id: "e".into() };
    for _ in 0..20 {
        let starting = {
            let mut calls = agent.calls.clone();
            let args = ["sleep", "1000"].map(str::to_owned).to_vec();
            let request = ExecRequest { container_id: "c".into(), exec_id: "e".into(), args, ..Default::default() };
            tokio::spawn(async move { calls.exec(request).await })
        };
        // Before, while or after it is started; NOT_FOUND only before.
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while let Err(error) = agent.calls.forget_exec(forget()).await {
            assert_eq!(error.code(), Code::NotFound, "{error}");
            assert!(std::time::Instant::now() < deadline, "{error}");
        }
        if let Err(error) = starting.await.unwrap() {
            assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
        }
        until(&mut agent, "c", 1).await;
    }
    let list = agent.calls.list_containers(ListContainersRequest {}).await.unwrap().into_inner();
    assert_eq!(list.containers[0].exec_ids, [""; 0]);
    assert_eq!(agent.groups("c"), [""; 0].map(std::path::PathBuf::from));
}

#[tokio::test]
async fn an_exec_counts_for_the_limits_of_its_container() {
    let mut agent = agent!();
    let mut spec = Agent::spec(&["sleep", "1000"]);
    spec["linux"]["resources"] = json!({"pids": {"limit": 5}});
    match agent.calls.create_container(Agent::create("c", 1, &spec)).await {
        Err(error) if error.message().contains("kernel has no pids.max") => {
            eprintln!("skipped: this machine's control groups have no pids controller");
            return;
        }
        created => drop(created.unwrap()),
    }
    agent.start_container("c").await.unwrap();
    let (code, _) = agent.exec_output("c", "e", &["sh", "-c", "for n in 1 2 3 4 5 6; do sleep 9 & done"]).await;
    assert_ne!(code, 0, "more processes than the container may have");
}

#[tokio::test]
async fn the_agent_tells_what_it_knows_and_its_clock() {
    let mut agent = agent!();
    let mut told = agent.calls.info(InfoRequest {}).await.unwrap().into_inner().features;
    told.sort();
    assert_eq!(told, ["clock", "exec_tree", "image_volumes", "oom_of_process", "starting"]);
    let first = agent.calls.set_clock(SetClockRequest::default()).await.unwrap().into_inner();
    let second = agent.calls.set_clock(SetClockRequest::default()).await.unwrap().into_inner();
    assert!(first.at > 0 && second.at >= first.at && !first.stepped);
    // To set it would set this machine's.
    let future = SetClockRequest { at: i64::MAX, host_time: 1 };
    let error = agent.calls.set_clock(future).await.unwrap_err();
    assert!(error.code() == Code::InvalidArgument && error.message().starts_with("at: "), "{error}");
}

#[tokio::test]
async fn removal_ends_what_runs_and_calls_in_progress() {
    let mut agent = agent!();
    agent.run("c", 1, &["sleep", "1000"]).await;
    agent.exec("c", "e", &["sleep", "1000"]).await.unwrap();
    let waiting = {
        let mut calls = agent.calls.clone();
        let request = nacelle_proto::agent::v1::WaitRequest { container_id: "c".into(), exec_id: String::new() };
        tokio::spawn(async move { calls.wait(request).await.unwrap().into_inner().exit_code })
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (first, second) = {
        let mut other = agent.calls.clone();
        let request = nacelle_proto::agent::v1::RemoveContainerRequest { container_id: "c".into() };
        tokio::join!(
            agent.remove("c"),
            async move { other.remove_container(request).await.unwrap().into_inner().released }
        )
    };
    assert_eq!(first.len() + second.len(), 1, "one of them let go of the device");
    assert_eq!(waiting.await.unwrap(), 137);
    // One that was never started goes as well.
    agent.calls.create_container(Agent::create("d", 2, &Agent::spec(&["true"]))).await.unwrap();
    assert_eq!(agent.remove("d").await, [2]);
    assert_eq!(agent.mounts(), [""; 0]);
    assert_eq!(agent.leftovers(), [""; 0].map(std::path::PathBuf::from));
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_nothing_half_made() {
    let mut agent = agent!();
    for (slot, patience) in (1..=8).zip([0u64, 1, 2, 5, 10, 20, 40, 80]) {
        let id = format!("c{slot}");
        let request = Agent::create(&id, slot, &Agent::spec(&["true"]));
        let _ = tokio::time::timeout(Duration::from_millis(patience), agent.calls.create_container(request)).await;
    }
    // Whatever came of each, its removal leaves nothing, and its name can be used again.
    for slot in 1..=8 {
        let id = format!("c{slot}");
        agent.remove(&id).await;
        agent.run(&id, slot, &["true"]).await;
        assert_eq!(agent.wait(&id, "").await, 0);
        assert_eq!(agent.remove(&id).await, [slot]);
    }
    assert_eq!(agent.mounts(), [""; 0]);
    assert_eq!(agent.leftovers(), [""; 0].map(std::path::PathBuf::from));
}

#[tokio::test]
async fn ten_containers_at_once() {
    let mut agent = agent!();
    let mut running = tokio::task::JoinSet::new();
    for slot in 1..=10 {
        let mut calls = agent.calls.clone();
        running.spawn(async move {
            let id = format!("c{slot}");
            let spec = Agent::spec(&["sh", "-c", &format!("echo {slot}")]);
            calls.create_container(Agent::create(&id, slot, &spec)).await.unwrap();
            let start = nacelle_proto::agent::v1::StartContainerRequest { container_id: id };
            calls.start_container(start).await.unwrap();
        });
    }
    while let Some(result) = running.join_next().await {
        result.unwrap();
    }
    for slot in 1..=10 {
        let id = format!("c{slot}");
        assert_eq!(agent.wait(&id, "").await, 0);
        assert_eq!(agent.read(&id, "", Stream::Stdout).await, format!("{slot}\n"));
        assert_eq!(agent.remove(&id).await, [slot]);
    }
    assert_eq!(agent.leftovers(), [""; 0].map(std::path::PathBuf::from));
}

#[tokio::test]
async fn a_shutdown_answers_before_it_ends() {
    let mut agent = agent!();
    agent.run("c", 1, &["sleep", "1000"]).await;
    agent.calls.shutdown(ShutdownRequest {}).await.unwrap();
    assert!(agent.ended());
}
