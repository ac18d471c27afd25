//! The system calls of a VMM that serves its guest.
//!
//! All others fail as if it were not permitted: nothing that the VMM does needs them, and
//! code that a guest has smuggled in can neither execute a program, reach another process,
//! open a network socket nor change what is mounted. A call that is missing here by mistake
//! costs a guest one request instead of its life.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_ioeventfd, kvm_irq_routing, kvm_irqfd, kvm_lapic_state, kvm_mp_state, kvm_msrs,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use rustix::ioctl::{Opcode, opcode};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Is, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
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
    filter(clone3, SeccompAction::Errno(libc::ENOSYS as u32))?;
    let forbidden = forbidden()?;
    let plain = [PROCESS, DESCRIPTORS, FILES].into_iter().flatten().copied();
    let allowed =
        plain.chain(forbidden.keys().copied()).chain([libc::SYS_clone3]).filter_map(|call| call.try_into().ok());
    let allowed = by_number(&allowed.collect());
    filter(forbidden, SeccompAction::Errno(libc::EPERM as u32))?;
    // The last, for no further one can follow it.
    seccompiler::apply_filter(&allowed)
}

/// What becomes of the calls that `rules` are about. All others are allowed.
fn filter(rules: BTreeMap<i64, Vec<SeccompRule>>, those: SeccompAction) -> Result<(), seccompiler::Error> {
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, those, TargetArch::x86_64)?;
    seccompiler::apply_filter(&BpfProgram::try_from(filter)?)
}

/// A program that allows `calls`, whatever their arguments, and no others. It finds a call by
/// halves, in at most fourteen steps: the kernel runs it for each of its calls when it is installed, and
/// going through a list of all that are allowed took a thirtieth of a guest's whole start.
fn by_number(calls: &BTreeSet<u32>) -> BpfProgram {
    // From which number on it is which, up to the next.
    let mut bounds = vec![(0, false)];
    for call in calls {
        bounds.pop_if(|(from, _)| from == call);
        bounds.extend([(*call, true), (call + 1, false)]);
    }
    bounds.dedup_by_key(|(_, allowed)| *allowed);
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, CALL_NUMBER)];
    program.extend(halves(&bounds));
    program
}

/// The part of such a program for numbers from the first bound on.
fn halves(bounds: &[(u32, bool)]) -> BpfProgram {
    let (low, high) = bounds.split_at(bounds.len() / 2);
    match (low, high) {
        ([], [(_, true)]) => vec![statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW)],
        ([_, ..], [(bound, _), ..]) => {
            let low = halves(low);
            // The second jump over the lower half, for a conditional one does not reach far.
            let below = sock_filter { jf: 1, ..statement(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, *bound) };
            let jump = statement(libc::BPF_JMP | libc::BPF_JA, low.len() as u32);
            [vec![below, jump], low, halves(high)].concat()
        }
        _ => vec![statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32)],
    }
}

/// Where the filters' input has the call's number (`struct seccomp_data` of linux/seccomp.h).
const CALL_NUMBER: u32 = 0;

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// By the number of each call that is allowed with some arguments only: what must not hold of
/// them, any one of the rules.
fn forbidden() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let condition = |argument, is, value| SeccompCondition::new(argument, Length::Dword, is, value);
    let masked = |argument, mask, value: u64| SeccompRule::new(vec![condition(argument, Is::MaskedEq(mask), value)?]);
    // None of these.
    let but = |argument, values: &[i64]| {
        let differs = values.iter().map(|value| condition(argument, Is::Ne, value.cast_unsigned()));
        SeccompRule::new(differs.collect::<Result<_, _>>()?)
    };
    let executable = masked(2, libc::PROT_EXEC as u64, libc::PROT_EXEC as u64)?;
    let ioctls =
        KVM_IOCTLS.into_iter().map(i64::from).chain(OTHER_IOCTLS.into_iter().map(|number| number.cast_signed()));
    Ok(BTreeMap::from([
        // Memory that is to be executed is mapped before the guest runs.
        (libc::SYS_mmap, vec![executable.clone()]),
        (libc::SYS_mprotect, vec![executable]),
        (libc::SYS_ioctl, vec![but(1, &ioctls.collect::<Vec<_>>())?]),
        (libc::SYS_fcntl, vec![but(1, &FCNTL_COMMANDS.map(i64::from))?]),
        // Threads, but no processes. The filter of clone3 sees to that one.
        (libc::SYS_clone, vec![masked(0, libc::CLONE_THREAD as u64, 0)?]),
        // A thread of its own directory and umask; no namespaces.
        (libc::SYS_unshare, vec![but(0, &[libc::CLONE_FS.into()])?]),
        (libc::SYS_socket, vec![but(0, &[libc::AF_UNIX.into()])?]),
        // Its own threads alone.
        (libc::SYS_tgkill, vec![but(0, &[std::process::id().into()])?]),
        // Its own limits.
        (libc::SYS_prlimit64, vec![but(0, &[0])?]),
        // Its name; and what comes before the next filter, which takes nothing but rights.
        (libc::SYS_prctl, vec![but(0, &[libc::PR_SET_NAME.into(), libc::PR_SET_NO_NEW_PRIVS.into()])?]),
    ]))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::process::Command;
    use std::thread;

    use super::*;

    #[test]
    fn calls_are_found_by_their_number() {
        let run = |program: &BpfProgram, number: u32| {
            let mut at = 1;
            while u32::from(program[at].code) & 7 == libc::BPF_JMP {
                let sock_filter { code, jt, jf, k } = program[at];
                at += 1 + match u32::from(code) & !7 {
                    libc::BPF_JA => k as usize,
                    _ if number >= k => usize::from(jt),
                    _ => usize::from(jf),
                };
            }
            program[at].k == libc::SECCOMP_RET_ALLOW
        };
        let many: BTreeSet<u32> = (0..200).map(|call| call * 3 + call % 2).collect();
        for calls in [BTreeSet::new(), [0].into(), [0, 1, 5].into(), [7, 8, 9, 400].into(), many] {
            let program = by_number(&calls);
            for number in (0..700).chain([u32::MAX, 0x4000_0000, 0x4000_0007]) {
                assert_eq!(run(&program, number), calls.contains(&number), "{number} of {calls:?}");
            }
        }
    }

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
