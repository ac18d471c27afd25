//! Programs that people run, from Debian's packages, as their images start them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use nacelle_proto::runtime::v1 as cri;

use nacelle_tests::client::{Client, container_config, limit, log_lines};

/// A pod with one container that runs what the image says.
struct Service {
    client: Client,
    pod: String,
    container: String,
    _logs: tempfile::TempDir,
}

impl Service {
    async fn start(image: &str) -> Self {
        Self::start_with(image, &[]).await
    }

    /// The same, with another command where there is one.
    async fn start_with(image: &str, command: &[&str]) -> Self {
        let client = Client::node().await;
        client.pull(image).await.unwrap();
        let logs = tempfile::tempdir().unwrap();
        let pod = client.run_pod(logs.path()).await.unwrap();
        let container = client.create_as(&pod, container_config(image, command)).await.unwrap();
        client.start(&container).await.unwrap();
        Self { client, pod, container, _logs: logs }
    }

    /// Runs a command in the container; its exit code and what it wrote.
    async fn run(&self, command: &[&str]) -> (i32, String) {
        let answer = self.client.exec(&self.container, command).await.unwrap();
        let text = [answer.stdout, answer.stderr].concat();
        (answer.exit_code, String::from_utf8_lossy(&text).trim().to_owned())
    }

    /// Runs a command that must succeed.
    async fn output(&self, command: &[&str]) -> String {
        let (code, text) = self.run(command).await;
        assert_eq!(code, 0, "{command:?}: {text}");
        text
    }

    /// Waits until the server says that it is there. Asking it would take time from it.
    async fn says(&self, words: &str) {
        let deadline = Instant::now() + limit(60);
        loop {
            let status = self.client.status(&self.container).await.unwrap();
            if std::fs::read(&status.log_path).is_ok_and(|log| String::from_utf8_lossy(&log).contains(words)) {
                return;
            }
            assert_eq!(status.state(), cri::ContainerState::ContainerRunning, "{:?}", self.log().await);
            assert!(Instant::now() < deadline, "{:?}", self.log().await);
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    }

    /// Runs a command until it succeeds, for what a server does not tell.
    async fn until(&self, command: &[&str]) -> String {
        let deadline = Instant::now() + limit(30);
        loop {
            let (code, text) = self.run(command).await;
            if code == 0 {
                return text;
            }
            let status = self.client.status(&self.container).await.unwrap();
            assert_eq!(status.state(), cri::ContainerState::ContainerRunning, "{:?}", self.log().await);
            assert!(Instant::now() < deadline, "{command:?}: {text}; {:?}", self.log().await);
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    }

    async fn log(&self) -> Vec<String> {
        let status = self.client.status(&self.container).await.unwrap();
        log_lines(status.log_path).unwrap().into_iter().map(|line| line.1).collect()
    }

    /// The pod's address with a port.
    async fn address(&self, port: u16) -> SocketAddr {
        let ip = self.client.pod_status(&self.pod).await.unwrap().network.unwrap().ip;
        SocketAddr::new(ip.parse().unwrap(), port)
    }

    /// Stops the container as the kubelet does; its exit code. The pod goes.
    async fn stop(self) -> i32 {
        self.client.stop(&self.container, i64::try_from(limit(30).as_secs()).unwrap()).await.unwrap();
        let code = self.client.status(&self.container).await.unwrap().exit_code;
        self.client.remove_pod(&self.pod).await.unwrap();
        code
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_serves_and_quits_in_peace() {
    let service = Service::start("nginx").await;
    service.until(&["sh", "-c", "pgrep -f '^nginx: worker'"]).await;
    let address = service.address(80).await;
    let get = move || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, limit(10))?;
        stream.set_read_timeout(Some(limit(20)))?;
        stream.write_all(b"GET / HTTP/1.0\r\nUser-Agent: a browser\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    };
    let answers: Vec<_> = (0..20).map(|_| std::thread::spawn(get)).collect();
    for answer in answers {
        let answer = answer.join().unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("Welcome to nginx!"), "{answer}");
    }
    let container = service.container.clone();
    let client = service.client.clone();
    assert_eq!(service.stop().await, 0, "SIGQUIT, the image's signal, lets it finish");
    assert!(client.status(&container).await.is_err(), "removed with its pod");
}

#[tokio::test]
async fn redis_keeps_what_it_is_given() {
    let service = Service::start("redis").await;
    service.says("Ready to accept connections").await;
    assert_eq!(service.output(&["redis-cli", "ping"]).await, "PONG");
    service.output(&["redis-cli", "set", "colour", "blue"]).await;
    assert_eq!(service.output(&["redis-cli", "get", "colour"]).await, "blue");
    let many = "for n in $(seq 1 300); do echo \"set key:$n value:$n\"; done | redis-cli | grep -c OK";
    assert_eq!(service.output(&["bash", "-c", many]).await, "300");
    assert_eq!(service.output(&["redis-cli", "dbsize"]).await, "301");
    assert_eq!(service.output(&["id", "-un"]).await, "redis", "the image's user");
    assert_eq!(service.stop().await, 0);
}

#[tokio::test]
async fn postgres_makes_a_database_and_survives_its_clients() {
    let service = Service::start("postgres").await;
    service.says("ready to accept connections").await;
    service.output(&["psql", "-d", "postgres", "-c", "select 1"]).await;
    service.output(&["pgbench", "--initialize", "--quiet", "postgres"]).await;
    let report = service.output(&["pgbench", "--client", "4", "--transactions", "10", "postgres"]).await;
    assert!(report.contains("number of transactions actually processed: 40/40"), "{report}");
    let query = "select (select sum(delta) from pgbench_history) = (select sum(tbalance) from pgbench_tellers)";
    assert_eq!(service.output(&["psql", "-d", "postgres", "-At", "-c", query]).await, "t", "what was paid has arrived");
    assert_eq!(service.stop().await, 0, "SIGINT, the image's signal, is a fast shutdown");
}

#[tokio::test]
async fn python_uses_threads_processes_and_sockets() {
    let script = "
import concurrent.futures as f, multiprocessing as m, socket, ssl, sqlite3, threading
def square(n): return n * n
if __name__ == '__main__':
    with f.ThreadPoolExecutor(4) as pool: assert sum(pool.map(square, range(100))) == 328350
    with m.get_context('fork').Pool(2) as pool: assert sum(pool.map(square, range(100))) == 328350
    server = socket.create_server(('127.0.0.1', 0))
    threading.Thread(target=lambda: server.accept()[0].sendall(b'hello'), daemon=True).start()
    assert socket.create_connection(server.getsockname()).recv(5) == b'hello'
    db = sqlite3.connect('/tmp/db'); db.execute('create table t (n)')
    db.executemany('insert into t values (?)', [(n,) for n in range(1000)]); db.commit()
    print(db.execute('select sum(n) from t').fetchone()[0])
";
    let service = Service::start_with("debian", &["sleep", "100000"]).await;
    assert_eq!(service.output(&["python3", "-c", script]).await, "499500");
    // What sleeps as the first process of its namespace would not hear of a stop before the grace period ends.
    service.client.remove_pod(&service.pod).await.unwrap();
}

#[tokio::test]
async fn a_probe_that_takes_too_long_ends_with_all_that_it_has_started() {
    let service = Service::start_with("busybox", &["sleep", "100000"]).await;
    // One that ends in time leaves alone what it started.
    service.output(&["sh", "-c", "setsid sleep 11111 > /dev/null 2>&1 & true"]).await;
    let script = "setsid sh -c 'sleep 22222 & sleep 33333' & sleep 44444";
    let timeout = i64::try_from(limit(2).as_secs()).unwrap();
    let late = service.client.exec_for(&service.container, &["sh", "-c", script], timeout).await.unwrap_err();
    assert_eq!(late.code(), tonic::Code::DeadlineExceeded, "{late}");
    let deadline = Instant::now() + limit(30);
    loop {
        let running = service.output(&["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]).await;
        assert!(running.contains("sleep 100000") && running.contains("sleep 11111"), "{running}");
        if ["22222", "33333", "44444"].iter().all(|number| !running.contains(&format!("sleep {number}"))) {
            break;
        }
        assert!(Instant::now() < deadline, "{running}");
    }
    service.client.remove_pod(&service.pod).await.unwrap();
}

#[tokio::test]
async fn a_command_of_any_length_is_refused_in_words_and_harms_no_other() {
    let service = Service::start_with("busybox", &["sleep", "100000"]).await;
    let (client, id) = (service.client.clone(), service.container.clone());
    let other = tokio::spawn(async move { client.exec(&id, &["sh", "-c", "while ! [ -e /go ]; do :; done"]).await });
    for length in [16_000, 62_000, 100_000] {
        let command = format!("/no/{}", "x".repeat(length));
        let error = service.client.exec(&service.container, &[&command]).await.unwrap_err();
        assert!(error.message().contains("cannot execute") && error.message().len() < 6000, "{length}: {error}");
        assert!(error.message().contains("too long"), "{length}: {error}");
    }
    service.output(&["touch", "/go"]).await;
    assert_eq!(other.await.unwrap().expect("an exec that ran all the while").exit_code, 0);
    service.client.remove_pod(&service.pod).await.unwrap();
}

#[tokio::test]
async fn a_container_whose_child_was_killed_for_want_of_memory_has_ended_as_it_says_itself() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    for (end, expected) in [("exit 0", (0, "Completed")), ("exit 3", (3, "Error"))] {
        let script = format!("sh -c 'dd if=/dev/zero of=/dev/null bs=64M; true'; {end}");
        let mut config = container_config("busybox", &["sh", "-c", &script]);
        config.metadata.as_mut().unwrap().name = format!("ends-{}", expected.0);
        let limits = 15 << 20;
        config.linux.as_mut().unwrap().resources = Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: limits,
            memory_swap_limit_in_bytes: limits,
            ..Default::default()
        });
        let id = client.create_as(&pod, config).await.unwrap();
        client.start(&id).await.unwrap();
        let status = client.wait_exit(&id).await.unwrap();
        assert_eq!((status.exit_code, status.reason.as_str()), expected, "{status:?}");
    }
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn the_clock_of_a_pod_follows_its_node_s() {
    let client = Client::node().await;
    client.pull("busybox").await.unwrap();
    let logs = tempfile::tempdir().unwrap();
    let pod = client.run_pod(logs.path()).await.unwrap();
    let mut config = container_config("busybox", &["sleep", "100000"]);
    let capabilities = cri::Capability { add_capabilities: vec!["SYS_TIME".into()], ..Default::default() };
    config.linux.as_mut().unwrap().security_context.get_or_insert_default().capabilities = Some(capabilities);
    let id = client.create_as(&pod, config).await.unwrap();
    client.start(&id).await.unwrap();
    // As wrong as after a long sleep of the node, without touching the node's.
    client.shell(&id, "date -s @1000000000").await;
    let deadline = Instant::now() + limit(60);
    loop {
        let seen: u64 = client.shell(&id, "date +%s").await.parse().unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        if now.abs_diff(seen) < limit(10).as_secs() {
            break;
        }
        assert!(Instant::now() < deadline, "{seen} in the pod, {now} on the node");
    }
    client.remove_pod(&pod).await.unwrap();
}
