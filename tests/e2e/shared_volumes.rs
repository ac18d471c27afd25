//! What the containers of a pod have in common: a volume is one file system to them, as it is on a host.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, limit};

/// Serves a socket, reads a named pipe, holds locks, counts in mapped memory, and notes what it is told of by a watch.
const FIRST: &str = r#"
import ctypes, fcntl, mmap, os, socket, struct, threading, time
os.chdir('/shared')
flocked = open('flock', 'w'); fcntl.flock(flocked, fcntl.LOCK_EX)
locked = open('fcntl', 'w'); fcntl.lockf(locked, fcntl.LOCK_EX)
memory = open('memory', 'w+b'); memory.truncate(4096); shared = mmap.mmap(memory.fileno(), 4096)
os.mkfifo('pipe')
server = socket.socket(socket.AF_UNIX); server.bind('socket'); server.listen()
libc = ctypes.CDLL(None)
watch = libc.inotify_init(); libc.inotify_add_watch(watch, b'/shared', 0x100)
def serve():
    while True:
        peer, _ = server.accept(); peer.sendall(b'hello'); peer.close()
def read():
    with open('pipe') as pipe, open('/tmp/pipe', 'w') as out: out.write(pipe.read())
def note():
    while True:
        event = os.read(watch, 4096)
        with open('/tmp/events', 'ab') as out: out.write(event[16:].replace(b'\0', b'') + b'\n')
for work in serve, read, note: threading.Thread(target=work, daemon=True).start()
open('/tmp/ready', 'w').close()
number = 0
while True:
    number += 1; shared[:8] = struct.pack('<Q', number); time.sleep(0.01)
"#;

/// Writes without end to a file that it keeps open, and makes files by names relative to the directory that it is in.
const SECOND: &str = r"
import os, time
os.chdir('/shared/sub')
log = open('log', 'a', 1); number = 0
while True:
    number += 1; log.write(f'{number}\n'); open('relative', 'w').write(str(number)); time.sleep(0.05)
";

/// What every script of the other container begins with: nothing waits for ever.
const OTHER: &str = "import fcntl, mmap, os, signal, socket, struct, time; signal.alarm(60); os.chdir('/shared')\n";

struct Pod {
    client: Client,
    id: String,
    host: tempfile::TempDir,
    _logs: tempfile::TempDir,
}

impl Pod {
    async fn new() -> Self {
        let client = Client::node().await;
        client.pull("debian").await.unwrap();
        let (logs, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = client.run_pod(logs.path()).await.unwrap();
        fs::create_dir(host.path().join("sub")).unwrap();
        fs::write(host.path().join("file"), "content").unwrap();
        Self { client, id, host, _logs: logs }
    }

    /// Starts a container with the directory, or what is below it, at /shared.
    async fn start(&self, name: &str, below: &str, readonly: bool, script: &str) -> String {
        let mount = cri::Mount {
            host_path: self.host.path().join(below).to_string_lossy().into_owned(),
            container_path: "/shared".into(),
            readonly,
            ..cri::Mount::default()
        };
        let mut config = container_config("debian", &["python3", "-c", script]);
        config.metadata.as_mut().unwrap().name = name.into();
        config.mounts = vec![mount];
        let id = self.client.create_as(&self.id, config).await.unwrap();
        self.client.start(&id).await.unwrap();
        id
    }

    /// What a script of the other container prints.
    async fn python(&self, container: &str, script: &str) -> Result<String, String> {
        let script = format!("{OTHER}{script}");
        let answer = self.client.exec(container, &["python3", "-c", &script]).await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if answer.exit_code == 0 { Ok(text(&answer.stdout)) } else { Err(text(&answer.stderr)) }
    }

    /// Waits until a file of a container has a word in it.
    async fn says(&self, container: &str, file: &str, word: &str) {
        let begun = Instant::now();
        loop {
            let text = self.client.exec(container, &["cat", file]).await.unwrap().stdout;
            let text = String::from_utf8_lossy(&text).into_owned();
            if text.contains(word) {
                return;
            }
            assert!(begun.elapsed() < limit(20), "{file} says {text:?}, not {word:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).unwrap_or_default().lines().count()
}

#[tokio::test]
async fn sockets_pipes_locks_memory_and_watches_join_the_containers_of_a_pod() {
    let pod = Pod::new().await;
    let idle = "import time; time.sleep(1000)";
    // The one that may only read knows all of it first.
    let reader = pod.start("reader", "", true, idle).await;
    assert_eq!(pod.python(&reader, "os.listdir('sub'); print(open('file').read())").await.unwrap(), "content");
    let first = pod.start("first", "", false, FIRST).await;
    let other = pod.start("other", "", false, idle).await;
    let begun = Instant::now();
    while pod.client.exec(&first, &["test", "-e", "/tmp/ready"]).await.unwrap().exit_code != 0 {
        assert!(begun.elapsed() < limit(60), "the first container does not get ready");
    }

    let connect = "s = socket.socket(socket.AF_UNIX); s.connect('socket'); print(s.recv(9).decode())";
    let through = "open('pipe', 'w').write('through')";
    let counted = "m = mmap.mmap(os.open('memory', os.O_RDONLY), 4096, prot=mmap.PROT_READ)\n\
                   a = m[:8]\n\
                   while m[:8] == a: pass\n\
                   print('counts')";
    assert_eq!(pod.python(&other, connect).await.unwrap(), "hello");
    assert_eq!(pod.python(&reader, connect).await.unwrap(), "hello");
    pod.python(&other, through).await.unwrap();
    pod.says(&first, "/tmp/pipe", "through").await;
    for lock in ["fcntl.flock(open('flock', 'r+'), 6)", "fcntl.lockf(open('fcntl', 'r+'), 6)"] {
        let said = pod.python(&other, lock).await.unwrap_err();
        assert!(said.contains("BlockingIOError"), "{lock}: {said}");
    }
    for container in [&other, &reader] {
        assert_eq!(pod.python(container, counted).await.unwrap(), "counts");
    }
    pod.python(&other, "open('made', 'w')").await.unwrap();
    pod.says(&first, "/tmp/events", "made").await;

    // Who may only read gains nothing by it, and takes nothing.
    for attempt in ["open('file', 'a')", "os.unlink('file')", "os.chmod('file', 0)", "open('new', 'w')"] {
        let said = pod.python(&reader, attempt).await.unwrap_err();
        assert!(said.contains("Read-only"), "{attempt}: {said}");
    }
    pod.python(&other, "open('file', 'w').write('new')").await.unwrap();
    assert_eq!(pod.python(&reader, "print(open('file').read())").await.unwrap(), "new");

    // Locks end with their holder's container.
    pod.client.stop(&first, 0).await.unwrap();
    pod.client.remove(&first).await.unwrap();
    pod.python(&other, "fcntl.flock(open('flock', 'r+'), 6); fcntl.lockf(open('fcntl', 'r+'), 6)").await.unwrap();
    pod.client.remove_pod(&pod.id).await.unwrap();
}

#[tokio::test]
async fn a_container_keeps_what_it_uses_when_another_with_the_same_volume_goes() {
    let pod = Pod::new().await;
    let log = pod.host.path().join("sub/log");
    let idle = "import os, time; os.listdir('/shared/sub'); time.sleep(1000)";
    let first = pod.start("first", "", false, idle).await;
    // Below the other's: by another root, the same files.
    let inner = pod.start("inner", "sub", false, "import time; time.sleep(1000)").await;
    let second = pod.start("second", "", false, SECOND).await;
    let more = async |than: usize| {
        let begun = Instant::now();
        while lines(&log) <= than {
            assert!(begun.elapsed() < limit(30), "nothing more is written");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    more(2).await;
    pod.python(&inner, "fcntl.flock(open('log', 'r+'), 6); time.sleep(0)").await.unwrap();
    pod.client.stop(&first, 0).await.unwrap();
    pod.client.remove(&first).await.unwrap();
    more(lines(&log) + 2).await;
    pod.client.stop(&inner, 0).await.unwrap();
    pod.client.remove(&inner).await.unwrap();
    more(lines(&log) + 2).await;
    let status = pod.client.status(&second).await.unwrap();
    assert_eq!(status.state(), cri::ContainerState::ContainerRunning);
    pod.client.remove_pod(&pod.id).await.unwrap();
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.lines().enumerate().all(|(index, line)| line == (index + 1).to_string()), "lines are missing");
}
