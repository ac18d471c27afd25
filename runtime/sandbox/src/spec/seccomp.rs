//! System call filters: the default (`RuntimeDefault`), and those in files of the host.
//!
//! What a workload may need is allowed. What is known and refused answers `EPERM`, so that
//! programs report it, unless a capability grants it; what is not known answers `ENOSYS`, so that C libraries fall back
//! to older calls instead of failing on a newer one.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
    LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

use crate::{Error, Result};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const AF_VSOCK: u64 = 40;
/// Every CLONE_NEW* flag but CLONE_NEWTIME, which clone(2) cannot take.
const CLONE_NAMESPACES: u64 = 0x7E02_0000;
/// Personalities that change nothing of security: Linux, with and without ADDR_NO_RANDOMIZE
/// or UNAME26, and the query.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

const ALLOWED: &str = "
    accept accept4 access adjtimex alarm arch_prctl bind brk capget capset chdir chmod chown clock_adjtime
    clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old
    eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fanotify_mark
    fchdir fchmod fchmodat fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr
    fsetxattr fstat fstatfs fsync ftruncate futex futex_waitv futimesat get_mempolicy get_robust_list
    get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername
    getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid
    getsockname getsockopt gettid gettimeofday getuid getxattr inotify_add_watch inotify_init inotify_init1
    inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit ioctl ioprio_get
    ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lgetxattr link
    linkat listen listxattr llistxattr lremovexattr lseek lsetxattr lstat madvise mbind membarrier
    memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mprotect
    mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap msgctl msgget msgrcv msgsnd
    msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat open openat openat2 pause
    pidfd_getfd pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl
    pread64 preadv preadv2 prlimit64 process_madvise process_mrelease process_vm_readv process_vm_writev
    pselect6 ptrace pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg
    recvmsg remap_file_pages removexattr rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction
    rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
    sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop sendfile sendmmsg sendmsg
    sendto set_mempolicy set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid setgroups
    setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setsockopt setuid
    setxattr shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 socketpair splice stat statfs
    statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete
    timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill
    truncate umask uname unlink unlinkat utime utimensat utimes vfork vmsplice wait4 waitid write writev";

const REFUSED: &str = "
    acct add_key bpf chroot clock_settime delete_module fanotify_init finit_module fsconfig fsmount fsopen
    fspick get_kernel_syms init_module ioperm iopl io_uring_enter io_uring_register io_uring_setup kcmp
    kexec_file_load kexec_load keyctl lookup_dcookie migrate_pages mount mount_setattr move_mount move_pages
    nfsservctl open_by_handle_at open_tree perf_event_open pivot_root quotactl quotactl_fd reboot
    request_key set_mempolicy_home_node setdomainname sethostname setns settimeofday swapoff swapon syslog
    umount2 unshare userfaultfd ustat vhangup";

/// Calls that the kernel grants to a capability: a container that was given it gets them.
const GRANTED: &[(Capability, &str)] = &[
    (Capability::Bpf, "bpf"),
    (Capability::DacReadSearch, "open_by_handle_at"),
    (Capability::Perfmon, "perf_event_open"),
    (
        Capability::SysAdmin,
        "bpf clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount
         open_tree perf_event_open pivot_root quotactl quotactl_fd setdomainname sethostname setns swapoff swapon
         syslog umount2 unshare",
    ),
    (Capability::SysBoot, "reboot"),
    (Capability::SysChroot, "chroot"),
    (Capability::SysModule, "delete_module finit_module init_module"),
    (Capability::SysNice, "migrate_pages move_pages set_mempolicy_home_node"),
    (Capability::SysPacct, "acct"),
    (Capability::SysPtrace, "kcmp"),
    (Capability::SysRawio, "ioperm iopl"),
    (Capability::SysTime, "clock_settime settimeofday"),
    (Capability::SysTtyConfig, "vhangup"),
    (Capability::Syslog, "syslog"),
];

/// Largest profile of the host that is read, in bytes.
const PROFILE_LIMIT: u64 = 1 << 20;

/// The filter of a container with these capabilities.
pub fn runtime_default(capabilities: &HashSet<Capability>) -> Result<LinuxSeccomp, OciSpecError> {
    let granted: HashSet<&str> = GRANTED
        .iter()
        .filter(|(capability, _)| capabilities.contains(capability))
        .flat_map(|(_, calls)| calls.split_whitespace())
        .collect();
    let names = |words: &str| words.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let refused = REFUSED.split_whitespace().filter(|name| !granted.contains(name)).map(str::to_owned).collect();
    let allowed = names(ALLOWED).into_iter().chain(granted.iter().map(ToString::to_string)).collect();
    let mut rules = vec![
        rule(allowed, LinuxSeccompAction::ScmpActAllow).build()?,
        rule(refused, LinuxSeccompAction::ScmpActErrno).errno_ret(EPERM).build()?,
        // The vsock leads to the host daemon; it is the agent's alone.
        allow_if("socket", 0, LinuxSeccompOperator::ScmpCmpNe, AF_VSOCK, None)?,
    ];
    if capabilities.contains(&Capability::SysAdmin) {
        rules.push(rule(vec!["clone".to_owned()], LinuxSeccompAction::ScmpActAllow).build()?);
    } else {
        // Threads and processes, but no new namespaces; clone3 hides its flags behind a
        // pointer, so it stays unknown and the C library falls back to clone.
        rules.push(allow_if("clone", 0, LinuxSeccompOperator::ScmpCmpMaskedEq, CLONE_NAMESPACES, Some(0))?);
    }
    for personality in PERSONALITIES {
        rules.push(allow_if("personality", 0, LinuxSeccompOperator::ScmpCmpEq, personality, None)?);
    }
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(ENOSYS)
        .architectures(vec![Arch::ScmpArchX86_64])
        .syscalls(rules)
        .build()
}

/// The filter in a file of the host, in the form of the OCI runtime specification
/// (`linux.seccomp`). Its path and what is wrong with it are in the error.
pub fn localhost(path: &Path) -> Result<LinuxSeccomp> {
    let failed = |problem: String| Error::Invalid(format!("seccomp profile {}: {problem}", path.display()));
    if !path.is_absolute() {
        return Err(failed("its path must be absolute".into()));
    }
    // Not blocking: somebody may have put a FIFO there.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(|error| failed(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| failed(error.to_string()))?;
    if !metadata.is_file() || metadata.len() > PROFILE_LIMIT {
        return Err(failed(format!("it must be a regular file of at most {PROFILE_LIMIT} bytes")));
    }
    let mut text = Vec::new();
    file.take(PROFILE_LIMIT).read_to_end(&mut text).map_err(|error| failed(error.to_string()))?;
    let profile: LinuxSeccomp =
        serde_json::from_slice(&text).map_err(|error| failed(format!("it is no seccomp profile: {error}")))?;
    let rules = profile.syscalls().as_deref().unwrap_or_default();
    if rules.iter().any(|rule| rule.names().iter().all(String::is_empty)) {
        return Err(failed("a rule names no system call".into()));
    }
    let notify = LinuxSeccompAction::ScmpActNotify;
    if profile.default_action() == notify || rules.iter().any(|rule| rule.action() == notify) {
        return Err(failed(
            "SCMP_ACT_NOTIFY needs a listener in the guest, which there is not: use another action".into(),
        ));
    }
    Ok(profile)
}

fn rule(names: Vec<String>, action: LinuxSeccompAction) -> LinuxSyscallBuilder {
    LinuxSyscallBuilder::default().names(names).action(action)
}

fn allow_if(
    name: &str,
    index: usize,
    op: LinuxSeccompOperator,
    value: u64,
    value_two: Option<u64>,
) -> Result<LinuxSyscall, OciSpecError> {
    let mut argument = LinuxSeccompArgBuilder::default().index(index).value(value).op(op);
    if let Some(two) = value_two {
        argument = argument.value_two(two);
    }
    LinuxSyscallBuilder::default()
        .names(vec![name.to_owned()])
        .action(LinuxSeccompAction::ScmpActAllow)
        .args(vec![argument.build()?])
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_is_both_allowed_and_refused() {
        let allowed: HashSet<_> = ALLOWED.split_whitespace().collect();
        let refused: HashSet<_> = REFUSED.split_whitespace().collect();
        assert_eq!(allowed.intersection(&refused).count(), 0);
        assert_eq!(allowed.len(), ALLOWED.split_whitespace().count(), "a name stands twice");
        for dangerous in ["mount", "bpf", "kexec_load", "unshare", "setns"] {
            assert!(refused.contains(dangerous), "{dangerous}");
        }
    }

    fn action_on(filter: &LinuxSeccomp, call: &str) -> Option<LinuxSeccompAction> {
        let rules = filter.syscalls().as_deref().unwrap();
        rules.iter().find(|rule| rule.names().iter().any(|name| name == call)).map(LinuxSyscall::action)
    }

    #[test]
    fn what_a_capability_is_for_comes_with_it() {
        let plain = runtime_default(&HashSet::new()).unwrap();
        assert_eq!(plain.default_errno_ret(), Some(ENOSYS));
        for (capability, calls) in GRANTED {
            let filter = runtime_default(&HashSet::from([*capability])).unwrap();
            for call in calls.split_whitespace() {
                assert_ne!(action_on(&plain, call), Some(LinuxSeccompAction::ScmpActAllow), "{call}");
                assert_eq!(action_on(&filter, call), Some(LinuxSeccompAction::ScmpActAllow), "{call}");
            }
        }
    }

    #[test]
    fn no_capability_opens_the_way_to_the_host() {
        let everything = GRANTED.iter().map(|(capability, _)| *capability).collect();
        let filter = runtime_default(&everything).unwrap();
        let sockets: Vec<_> = filter
            .syscalls()
            .iter()
            .flatten()
            .filter(|rule| rule.names().iter().any(|name| name == "socket"))
            .collect();
        assert_eq!(sockets.len(), 1);
        assert!(sockets[0].args().is_some());
    }

    #[test]
    fn a_profile_that_cannot_be_used_is_named_with_its_fault() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("profile.json");
        let error = |path: &Path| localhost(path).unwrap_err().to_string();
        assert!(error(&path).contains("profile.json") && error(&path).contains("No such file"), "{}", error(&path));
        assert!(error(Path::new("profile.json")).contains("absolute"));
        assert!(error(directory.path()).contains("regular file"));
        for (text, fault) in [
            ("{", "no seccomp profile"),
            (r#"{"defaultAction": "SCMP_ACT_FLY"}"#, "SCMP_ACT_FLY"),
            (r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#, "SCMP_ACT_NOTIFY"),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [], "action": "SCMP_ACT_ERRNO"}]}"#,
                "names",
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            assert!(error(&path).contains(fault), "{}", error(&path));
        }
        let good = r#"{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [], "syscalls": [{"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}]}"#;
        std::fs::write(&path, good).unwrap();
        assert_eq!(action_on(&localhost(&path).unwrap(), "chmod"), Some(LinuxSeccompAction::ScmpActErrno));
    }
}
