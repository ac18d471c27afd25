//! The last steps of a container's process: from libcontainer's hands to its command.
//!
//! libcontainer would check the command when it builds the container; a bad command is
//! to fail when it is started. So nothing is checked beforehand, and why the execution
//! fails goes through the status pipe, which a successful one closes.

use std::env;
use std::ffi::{CString, OsString};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libcontainer::oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, Spec};
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use libcontainer::{capabilities, seccomp};

use super::message::ExecFailure;
use crate::error::shorten;

/// Most bytes of the command's path in a report, and how many of its end are kept: the report goes into the pipe in one
/// piece, whether or not somebody reads it.
const PATH_LIMIT: usize = 4096;
const PATH_END: usize = 512;
/// Exit code of a process whose command is not there.
const NOT_FOUND: i32 = 127;
/// Exit code of a process whose command is there but cannot be executed.
const NOT_EXECUTABLE: i32 = 126;

/// Becomes the command, or tells why not.
#[derive(Debug, Clone)]
pub struct StatusExecutor {
    /// The status pipe.
    pub status: Arc<OwnedFd>,
    /// The filter and capabilities that libcontainer has not applied.
    pub late: Option<(LinuxSeccomp, Option<LinuxCapabilities>)>,
}

/// The standard signals are 1 to 31 (signal(7)).
const LAST_STANDARD_SIGNAL: i32 = 31;

impl Executor for StatusExecutor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let args = spec.process().as_ref().and_then(|process| process.args().clone()).unwrap_or_default();
        let command = args.first().cloned().unwrap_or_default();
        // A command inherits what is ignored: Rust ignores SIGPIPE, and whoever started the
        // agent may have ignored others.
        for signal in 1..=LAST_STANDARD_SIGNAL {
            // SAFETY: setting a signal to its default installs no handler. SIGKILL and
            // SIGSTOP are refused, which changes nothing.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        let failure = match self.apply_late() {
            Ok(()) => become_command(&command, &args),
            Err(reason) => Failure { path: command, reason, command: false, code: NOT_EXECUTABLE },
        };
        self.report(failure)
    }

    fn validate(&self, _spec: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }
}

impl StatusExecutor {
    fn apply_late(&self) -> Result<(), String> {
        let Some((filter, caps)) = &self.late else { return Ok(()) };
        seccomp::initialize_seccomp(filter).map_err(|error| format!("cannot set the system call filter: {error}"))?;
        if let Some(caps) = caps {
            capabilities::drop_privileges(caps, create_syscall().as_ref())
                .map_err(|error| format!("cannot drop capabilities: {error}"))?;
        }
        Ok(())
    }

    fn report(&self, failure: Failure) -> ! {
        let Failure { path, reason, command, code } = failure;
        let path = shorten(&path, PATH_LIMIT, PATH_END).into_owned();
        let message = serde_json::to_vec(&ExecFailure { path, reason, command }).unwrap_or_default();
        if let Ok(pipe) = self.status.try_clone() {
            let _ = std::fs::File::from(pipe).write_all(&message);
        }
        // SAFETY: ends this process, running nothing of it any more.
        unsafe { libc::_exit(code) }
    }
}

struct Failure {
    path: String,
    reason: String,
    command: bool,
    code: i32,
}

/// Executes `command` with the environment of this process; returns only on failure.
fn become_command(command: &str, args: &[String]) -> Failure {
    let failure = |path: &Path, reason: String, code| Failure {
        path: path.to_string_lossy().into_owned(),
        reason,
        command: true,
        code,
    };
    let Ok(args) = args.iter().map(|arg| CString::new(arg.as_str())).collect::<Result<Vec<_>, _>>() else {
        return failure(Path::new(command), "an argument contains a NUL byte".into(), NOT_EXECUTABLE);
    };
    let mut pointers: Vec<_> = args.iter().map(|arg| arg.as_ptr()).collect();
    pointers.push(std::ptr::null());

    let mut denied = None;
    for candidate in candidates(command, env::var_os("PATH")) {
        let Ok(path) = CString::new(candidate.as_os_str().as_bytes()) else { continue };
        // SAFETY: path and arguments are NUL-terminated strings that outlive the call, and
        // the list of arguments ends with a null pointer.
        unsafe { libc::execv(path.as_ptr(), pointers.as_ptr()) };
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            // As in a shell, the search goes on past what is not there or not allowed.
            Some(libc::ENOENT | libc::ENOTDIR) if !script_without_interpreter(&candidate) => {}
            Some(libc::ENOENT | libc::ENOTDIR) => {
                return failure(&candidate, "its interpreter does not exist".into(), NOT_FOUND);
            }
            Some(libc::EACCES) => {
                let reason = if candidate.is_dir() { "it is a directory".into() } else { describe(&error) };
                denied = denied.or(Some((candidate, reason)));
            }
            _ => return failure(&candidate, describe(&error), NOT_EXECUTABLE),
        }
    }
    match denied {
        Some((path, reason)) => failure(&path, reason, NOT_EXECUTABLE),
        None if command.contains('/') => failure(Path::new(command), "no such file or directory".into(), NOT_FOUND),
        None => failure(Path::new(command), "not found in PATH".into(), NOT_FOUND),
    }
}

/// The files a command may stand for, in order.
fn candidates(command: &str, path: Option<OsString>) -> Vec<PathBuf> {
    if command.is_empty() {
        return Vec::new();
    }
    if command.contains('/') {
        return vec![command.into()];
    }
    // An empty entry means the working directory.
    env::split_paths(&path.unwrap_or_default())
        .map(
            |directory| {
                if directory.as_os_str().is_empty() { Path::new(".").join(command) } else { directory.join(command) }
            },
        )
        .collect()
}

/// ENOENT about a file that is there is about the interpreter it names.
fn script_without_interpreter(path: &Path) -> bool {
    path.is_file()
}

fn describe(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EACCES) => "permission denied".into(),
        Some(libc::ENOEXEC) => "it is neither a program for this machine nor a script with an interpreter".into(),
        Some(libc::E2BIG) => "its arguments and environment are too long".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_searched_and_a_path_is_not() {
        let path = Some(OsString::from("/a::b"));
        assert_eq!(candidates("x", path.clone()), [Path::new("/a/x"), Path::new("./x"), Path::new("b/x")]);
        assert_eq!(candidates("./x", path.clone()), [Path::new("./x")]);
        assert_eq!(candidates("/bin/x", path.clone()), [Path::new("/bin/x")]);
        assert!(candidates("", path).is_empty());
    }

    #[test]
    fn failures_name_the_file_and_have_the_shell_s_codes() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str, mode| {
            use std::os::unix::fs::PermissionsExt;
            let path = directory.path().join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let run = |command: &str| {
            let failure = become_command(command, &[command.to_owned()]);
            assert!(failure.path.ends_with(command), "{}", failure.path);
            (failure.code, failure.reason)
        };
        assert_eq!(run("/no/such/file").0, NOT_FOUND);
        assert_eq!(run("no-such-command-anywhere"), (NOT_FOUND, "not found in PATH".into()));
        assert_eq!(run(""), (NOT_FOUND, "not found in PATH".into()));
        assert_eq!(run(&file("plain", "", 0o644)), (NOT_EXECUTABLE, "permission denied".into()));
        assert_eq!(run(&file("script", "#!/no/such/interpreter\n", 0o755)).0, NOT_FOUND);
        let (code, reason) = run(&file("text", "echo hello\n", 0o755));
        assert!(code == NOT_EXECUTABLE && reason.contains("neither"), "{reason}");
        let (code, reason) = run(directory.path().to_str().unwrap());
        assert_eq!((code, reason.as_str()), (NOT_EXECUTABLE, "it is a directory"));
    }
}
