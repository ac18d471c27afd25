//! The helper's side.

use std::error::Error as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::lchown;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{ContainerStatus, State};
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use rustix::process::{Pid, Signal, kill_process, waitpid};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::executor::StatusExecutor;
use super::message::{self, Create, Inside, Late, Reply, Request, Tenant};
use crate::stdio::streams::null;

/// Socket by which libcontainer hands over a terminal.
const CONSOLE: &str = "console.sock";

/// Serves the one request that comes on standard input.
pub fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve() -> io::Result<()> {
    // The process to be built must not find the socket among its standard streams.
    let control = io::stdin().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(null()?)?;

    let (request, fds) = message::receive::<Request>(control.as_fd())?;
    let built = build(request, fds);
    match built {
        Ok((pid, terminal)) => {
            let terminal: Vec<OwnedFd> = terminal.into_iter().collect();
            let answered = message::send(control.as_fd(), &Reply::Ready { pid }, &message::borrow(&terminal));
            // Released by one message; a hang-up means that nobody wants the process.
            let released = answered.and_then(|()| message::receive::<()>(control.as_fd()));
            if released.is_err() {
                abandon(pid);
            }
            released.map(|_| ())
        }
        Err(mut reason) => {
            // It quotes what images and requests say; the message has its limit.
            reason.truncate(reason.floor_char_boundary(2048));
            message::send(control.as_fd(), &Reply::Failed { reason }, &[])
        }
    }
}

fn build(request: Request, fds: Vec<OwnedFd>) -> Result<(i32, Option<OwnedFd>), String> {
    let mut fds = fds.into_iter();
    let status = fds.next().ok_or("the request came without its descriptors")?;
    let stdio = [fds.next(), fds.next(), fds.next()];
    match request {
        Request::Create(create) => build_container(&create, status, stdio),
        Request::Exec(tenant) => build_tenant(&tenant, status, stdio),
    }
}

fn build_container(
    request: &Create,
    status: OwnedFd,
    stdio: [Option<OwnedFd>; 3],
) -> Result<(i32, Option<OwnedFd>), String> {
    let console = Console::listen(&request.bundle, request.terminal)?;
    let executor = StatusExecutor { status: Arc::new(status), late: None };
    let container = builder(&request.id, &request.state, executor, stdio, console.as_ref())
        .and_then(|builder| builder.as_init(&request.bundle).with_systemd(false).with_detach(true).build())
        .map_err(describe)?;
    let pid = container.pid().ok_or("libcontainer built a container without a process")?.as_raw();
    finish(pid, console)
}

fn build_tenant(
    request: &Tenant,
    status: OwnedFd,
    stdio: [Option<OwnedFd>; 3],
) -> Result<(i32, Option<OwnedFd>), String> {
    let late = match &request.late {
        Some(Late { seccomp, capabilities }) => {
            let filter = message::read_filter(seccomp).map_err(|error| format!("{}: {error}", seccomp.display()))?;
            Some((filter, capabilities.clone()))
        }
        None => None,
    };
    // libcontainer leaves sockets behind in the directory it finds the container's state
    // in, so each process gets a directory of its own, which the agent removes.
    let directory = request.directory.join(&request.id);
    let state = State::new(&request.id, ContainerStatus::Running, Some(request.pid), request.bundle.clone());
    fs::create_dir(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    state.save(&directory).map_err(|error| error.to_string())?;

    let console = Console::listen(&request.directory, request.terminal)?;
    if let Some(inside) = &request.inside {
        give(&request.directory, inside.root)
            .and_then(|()| enter(inside))
            .map_err(|error| format!("cannot enter the user namespace of the container: {error}"))?;
    }
    let executor = StatusExecutor { status: Arc::new(status), late };
    let pid = builder(&request.id, &request.directory, executor, stdio, console.as_ref())
        .and_then(|builder| {
            let process = request.directory.join("process.json");
            let tenant = builder.as_tenant().with_sub_cgroup(Some(request.group.clone()));
            tenant.with_detach(true).with_process(Some(process)).build()
        })
        .map_err(describe)?;
    finish(pid.as_raw(), console)
}

/// Has a directory and all that is in it belong to a user and group.
fn give(path: &Path, owner: (u32, u32)) -> io::Result<()> {
    lchown(path, Some(owner.0), Some(owner.1))?;
    if fs::symlink_metadata(path)?.is_dir() {
        fs::read_dir(path)?.try_for_each(|entry| give(&entry?.path(), owner))?;
    }
    Ok(())
}

/// Becomes root of a user namespace, after all that its root may not do.
fn enter(inside: &Inside) -> io::Result<()> {
    // The process that writes, whatever its number.
    fs::write(inside.cgroup.join("cgroup.procs"), "0")?;
    if let Some(adjustment) = inside.oom_score_adj {
        fs::write("/proc/self/oom_score_adj", adjustment.to_string())?;
    }
    move_into_link_name_space(File::open(&inside.namespace)?.as_fd(), Some(LinkNameSpaceType::User))?;
    for call in [libc::SYS_setresgid, libc::SYS_setresuid] {
        // SAFETY: changes the ids of this process, which has one thread.
        if unsafe { libc::syscall(call, 0, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn builder(
    id: &str,
    state: &Path,
    executor: StatusExecutor,
    [stdin, stdout, stderr]: [Option<OwnedFd>; 3],
    console: Option<&Console>,
) -> Result<ContainerBuilder, LibcontainerError> {
    let mut builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(executor)
        .with_root_path(state)?
        .with_console_socket(console.map(|console| &console.path))
        .validate_id()?;
    builder.stdin = stdin;
    builder.stdout = stdout;
    builder.stderr = stderr;
    Ok(builder)
}

/// Collects the terminal of the new process, or undoes the process.
fn finish(pid: i32, console: Option<Console>) -> Result<(i32, Option<OwnedFd>), String> {
    match console.map(Console::accept).transpose() {
        Ok(terminal) => Ok((pid, terminal)),
        Err(error) => {
            abandon(pid);
            Err(format!("cannot take over the terminal: {error}"))
        }
    }
}

fn abandon(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, Signal::KILL);
        let _ = waitpid(Some(pid), rustix::process::WaitOptions::empty());
    }
}

/// Where libcontainer connects to hand over a terminal's master side.
struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    fn listen(directory: &Path, wanted: bool) -> Result<Option<Self>, String> {
        if !wanted {
            return Ok(None);
        }
        // By its short name: a socket's path has 107 bytes at most.
        let listener = std::env::set_current_dir(directory)
            .and_then(|()| UnixListener::bind(CONSOLE))
            .and_then(|listener| std::env::set_current_dir("/").map(|()| listener))
            .map_err(|error| format!("cannot listen in {}: {error}", directory.display()))?;
        Ok(Some(Self { listener, path: directory.join(CONSOLE) }))
    }

    fn accept(self) -> io::Result<OwnedFd> {
        // It sits in the queue by now: the process sends it before it reports itself ready.
        self.listener.set_nonblocking(true)?;
        let (socket, _) = self.listener.accept()?;
        fs::remove_file(&self.path)?;
        message::receive_fd(socket.as_fd())
    }
}

/// An error with all its causes.
fn describe(error: LibcontainerError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some of them repeat their cause.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
