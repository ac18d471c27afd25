//! The system calls of a VMM that serves its guest.
//!
//! All others fail as if it were not permitted: nothing that the VMM does needs them, and
//! code that a guest has smuggled in can neither execute a program, reach another process,
//! open a network socket nor change what is mounted. A call that is missing here by mistake
//! costs a guest one request instead of its life.

use std::collections::BTreeMap;
use std::io;

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_ioeventfd, kvm_irq_routing, kvm_irqfd, kvm_lapic_state, kvm_mp_state, kvm_msrs,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use rustix::ioctl::{Opcode, opcode};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Is, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{JailError, failed};

/// Memory, threads, time and signals.
const PROCESS: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_sigaltstack,
    libc::SYS_umask,
];

/// Descriptors of any kind: events, sockets, disks, taps, and messages between them.
const DESCRIPTORS: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_signalfd4,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Files, of volumes most of all.
const FILES: &[i64] = &[
    libc::SYS_chmod,
    libc::SYS_copy_file_range,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_lstat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_truncate,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// KVM's group of ioctls (Documentation/virt/kvm/api.rst of Linux).
const KVM: u8 = 0xae;
/// What runs a machine that is built, tells it of interrupts and notifications, and saves it. Not among them: what
/// makes machines, processors, devices and memory.
const KVM_IOCTLS: [Opcode; 15] = [
    opcode::none(KVM, 0x80), // KVM_RUN, the first: it is called most.
    opcode::none(KVM, 0x03), // KVM_CHECK_EXTENSION
    opcode::write::<kvm_irq_routing>(KVM, 0x6a),
    opcode::write::<kvm_irqfd>(KVM, 0x76),
    opcode::write::<kvm_ioeventfd>(KVM, 0x79),
    opcode::read::<kvm_clock_data>(KVM, 0x7c),
    opcode::read::<kvm_regs>(KVM, 0x81),
    opcode::read::<kvm_sregs>(KVM, 0x83),
    opcode::read_write::<kvm_msrs>(KVM, 0x88),
    opcode::read::<kvm_lapic_state>(KVM, 0x8e),
    opcode::read::<kvm_mp_state>(KVM, 0x98),
    opcode::read::<kvm_vcpu_events>(KVM, 0x9f),
    opcode::read::<kvm_debugregs>(KVM, 0xa1),
    opcode::read::<kvm_xsave>(KVM, 0xa4),
    opcode::read::<kvm_xcrs>(KVM, 0xa6),
];
/// Of a tap that is handed over, and of any descriptor.
const OTHER_IOCTLS: [libc::Ioctl; 5] =
    [libc::TUNGETIFF, libc::TUNSETVNETHDRSZ, libc::TUNSETOFFLOAD, libc::FIOCLEX, libc::FIONBIO];

/// What may be done to a descriptor. Not among them: to name the process that it sends signals to, for that may be any
/// of the same user.
const FCNTL_COMMANDS: [libc::c_int; 6] =
    [libc::F_DUPFD, libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL];

/// Confines the calling thread and those that it starts from now on.
///
/// # Errors
/// If the kernel has no seccomp.
pub fn confine() -> Result<(), JailError> {
    filters().map_err(io::Error::other).map_err(failed("filter its system calls"))
}

fn filters() -> Result<(), seccompiler::Error> {
    // glibc starts threads by clone3, whose arguments no filter can see, and by clone where
    // there is none.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    filter(clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?;
    filter(rules()?, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

/// What becomes of the calls that `rules` are about, and what of all others.
fn filter(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    those: SeccompAction,
) -> Result<(), seccompiler::Error> {
    let program = BpfProgram::try_from(SeccompFilter::new(rules, others, those, TargetArch::x86_64)?)?;
    seccompiler::apply_filter(&program)
}

/// By the number of each call that is allowed: what must hold of its arguments, any one of the
/// rules; none if nothing must.
fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let rule = |argument, is, value| SeccompRule::new(vec![SeccompCondition::new(argument, Length::Dword, is, value)?]);
    let masked = |argument, mask, value: u64| rule(argument, Is::MaskedEq(mask), value);
    let exactly = |argument, value: i64| rule(argument, Is::Eq, value.cast_unsigned());
    let mut rules: BTreeMap<_, _> =
        [PROCESS, DESCRIPTORS, FILES].into_iter().flatten().map(|call| (*call, Vec::new())).collect();
    // Memory that is to be executed is mapped before the guest runs.
    rules.insert(libc::SYS_mmap, vec![masked(2, libc::PROT_EXEC as u64, 0)?]);
    rules.insert(libc::SYS_mprotect, vec![masked(2, libc::PROT_EXEC as u64, 0)?]);
    let ioctls =
        KVM_IOCTLS.into_iter().map(i64::from).chain(OTHER_IOCTLS.into_iter().map(|number| number.cast_signed()));
    rules.insert(libc::SYS_ioctl, ioctls.map(|number| exactly(1, number)).collect::<Result<_, _>>()?);
    let commands = FCNTL_COMMANDS.into_iter().map(|command| exactly(1, command.into()));
    rules.insert(libc::SYS_fcntl, commands.collect::<Result<_, _>>()?);
    // Threads, but no processes. The other filter sees to this one.
    rules.insert(libc::SYS_clone3, Vec::new());
    rules.insert(libc::SYS_clone, vec![masked(0, libc::CLONE_THREAD as u64, libc::CLONE_THREAD as u64)?]);
    // A thread of its own directory and umask; no namespaces.
    rules.insert(libc::SYS_unshare, vec![exactly(0, libc::CLONE_FS.into())?]);
    rules.insert(libc::SYS_socket, vec![exactly(0, libc::AF_UNIX.into())?]);
    // Its own threads alone.
    rules.insert(libc::SYS_tgkill, vec![exactly(0, std::process::id().into())?]);
    // Its own limits.
    rules.insert(libc::SYS_prlimit64, vec![exactly(0, 0)?]);
    rules.insert(libc::SYS_prctl, vec![exactly(0, libc::PR_SET_NAME.into())?]);
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::process::Command;
    use std::thread;

    use super::*;

    #[test]
    fn what_serves_a_guest_goes_on_and_what_reaches_further_does_not() {
        let parent = rustix::process::getppid();
        let kvm = kvm_ioctls::Kvm::new().unwrap();
        let confined = move || {
            confine().unwrap();
            // A thread, memory, a unix socket and a file.
            thread::spawn(|| vec![1u8; 1 << 20]).join().unwrap();
            rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
            std::fs::metadata("/").unwrap();

            assert!(kvm.create_vm().is_err_and(|error| error.errno() == libc::EPERM));
            let denied = |result: io::Result<()>| result.unwrap_err().raw_os_error() == Some(libc::EPERM);
            assert!(denied(std::net::UdpSocket::bind("127.0.0.1:0").map(drop)));
            assert!(denied(Command::new("/bin/true").spawn().map(drop)));
            assert!(denied(std::os::unix::fs::chroot("/")));
            let file = std::fs::File::open("/").unwrap();
            file.try_clone().unwrap();
            // SAFETY: nothing but numbers is passed.
            let owned = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETOWN, libc::getppid()) };
            assert!(owned == -1 && denied(Err(io::Error::last_os_error())), "signals to another process");
            assert!(parent.is_none_or(|parent| denied(rustix::process::test_kill_process(parent).map_err(Into::into))));
        };
        // The filter stays with its thread.
        thread::spawn(confined).join().unwrap();
        std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    }
}
