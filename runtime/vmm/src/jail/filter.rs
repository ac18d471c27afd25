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
use seccompiler::{BpfProgram, sock_filter};

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
    seccompiler::apply_filter(&whole()).map_err(io::Error::other).map_err(failed("filter its system calls"))
}

/// All of it.
fn whole() -> BpfProgram {
    let plain = [PROCESS, DESCRIPTORS, FILES].into_iter().flatten().map(|call| (*call, vec![answer(ALLOW)]));
    let calls = plain.chain(by_arguments()).filter_map(|(call, piece)| Some((call.try_into().ok()?, piece)));
    program(&calls.collect())
}

/// A program that deals with each of `calls` by its piece, and allows no others. A caller of another architecture, whose
/// numbers mean something else, does not survive.
///
/// It is the only one, and finds a call by halves, in at most eleven steps: the kernel runs it for each of its calls when it
/// is installed, and for each call of the VMM then. Three, one of which went through a list, took 0.6 ms more of a guest's start.
fn program(calls: &BTreeMap<u32, BpfProgram>) -> BpfProgram {
    let denied = vec![answer(DENY)];
    // From which number on it is which piece, up to the next.
    let mut bounds = vec![(0, &denied)];
    for (call, piece) in calls {
        bounds.pop_if(|(from, _)| from == call);
        bounds.extend([(*call, piece), (call + 1, &denied)]);
    }
    bounds.dedup_by_key(|(_, piece)| *piece);
    let check = [load(ARCHITECTURE), branch(libc::BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0), answer(KILL), load(CALL_NUMBER)];
    [check.into(), halves(&bounds)].concat()
}

/// The part of such a program for numbers from the first bound on.
fn halves(bounds: &[(u32, &BpfProgram)]) -> BpfProgram {
    let (low, high) = bounds.split_at(bounds.len() / 2);
    match (low, high) {
        ([_, ..], [(bound, _), ..]) => {
            let low = halves(low);
            // A conditional jump does not reach far.
            let over = match u8::try_from(low.len()) {
                Ok(length) => vec![branch(libc::BPF_JGE, *bound, length, 0)],
                Err(_) => {
                    vec![branch(libc::BPF_JGE, *bound, 0, 1), statement(libc::BPF_JMP | libc::BPF_JA, low.len() as u32)]
                }
            };
            [over, low, halves(high)].concat()
        }
        (_, [(_, piece), ..]) => piece.to_vec(),
        _ => vec![answer(DENY)],
    }
}

/// The pieces of the calls that are allowed with some arguments only, by their numbers. Of an argument they see the lower
/// half; those that are looked at have no more.
fn by_arguments() -> [(i64, BpfProgram); 11] {
    let ioctls = [KVM_IOCTLS.as_slice(), OTHER_IOCTLS.map(|number| number as Opcode).as_slice()].concat();
    [
        // Memory that is to be executed is mapped before the guest runs.
        (libc::SYS_mmap, without(2, libc::PROT_EXEC)),
        (libc::SYS_mprotect, without(2, libc::PROT_EXEC)),
        (libc::SYS_ioctl, one_of(1, ioctls)),
        (libc::SYS_fcntl, one_of(1, FCNTL_COMMANDS.map(libc::c_int::cast_unsigned))),
        // Threads, but no processes. glibc starts threads by clone3, whose arguments no filter can see, and by clone
        // where there is none.
        (libc::SYS_clone, with(0, libc::CLONE_THREAD)),
        (libc::SYS_clone3, vec![answer(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32)]),
        // A thread of its own directory and umask; no namespaces.
        (libc::SYS_unshare, one_of(0, [libc::CLONE_FS.cast_unsigned()])),
        (libc::SYS_socket, one_of(0, [libc::AF_UNIX.cast_unsigned()])),
        // Its own threads alone.
        (libc::SYS_tgkill, one_of(0, [std::process::id()])),
        // Its own limits.
        (libc::SYS_prlimit64, one_of(0, [0])),
        // Its name.
        (libc::SYS_prctl, one_of(0, [libc::PR_SET_NAME.cast_unsigned()])),
    ]
}

/// Allows calls whose argument is one of `values`.
fn one_of(argument: u32, values: impl IntoIterator<Item = u32>) -> BpfProgram {
    let mut piece = vec![load(argument_at(argument))];
    for value in values {
        piece.extend([branch(libc::BPF_JEQ, value, 0, 1), answer(ALLOW)]);
    }
    piece.push(answer(DENY));
    piece
}

/// Allows calls whose argument has none of `bits`.
fn without(argument: u32, bits: libc::c_int) -> BpfProgram {
    let has = branch(libc::BPF_JSET, bits.cast_unsigned(), 1, 0);
    vec![load(argument_at(argument)), has, answer(ALLOW), answer(DENY)]
}

/// Allows calls whose argument has any of `bits`.
fn with(argument: u32, bits: libc::c_int) -> BpfProgram {
    let has = branch(libc::BPF_JSET, bits.cast_unsigned(), 0, 1);
    vec![load(argument_at(argument)), has, answer(ALLOW), answer(DENY)]
}

/// Where the program's input has what (`struct seccomp_data` of linux/seccomp.h).
const CALL_NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// `AUDIT_ARCH_X86_64` of linux/audit.h.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const DENY: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

/// Where the lower half of an argument is.
fn argument_at(argument: u32) -> u32 {
    ARGUMENTS + 8 * argument
}

fn load(offset: u32) -> sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn answer(what: u32) -> sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, what)
}

/// Skips `jt` statements if what was loaded compares with `k` as `test` says, else `jf`.
fn branch(test: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { jt, jf, ..statement(libc::BPF_JMP | test | libc::BPF_K, k) }
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::process::Command;
    use std::thread;

    use super::*;

    /// What `program` says to a call, and the steps that it takes.
    fn run(program: &BpfProgram, architecture: u32, number: u32, arguments: [u32; 6]) -> (u32, usize) {
        let (mut at, mut steps, mut loaded) = (0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            steps += 1;
            let mut branch = |holds: bool| at += usize::from(if holds { jt } else { jf });
            match u32::from(code) {
                0x20 if k == 0 => loaded = number,
                0x20 if k == 4 => loaded = architecture,
                0x20 => loaded = arguments[(k as usize - 16) / 8],
                0x05 => at += k as usize,
                0x15 => branch(loaded == k),
                0x35 => branch(loaded >= k),
                0x45 => branch(loaded & k != 0),
                0x06 => return (k, steps),
                other => panic!("statement {other:#x}"),
            }
        }
    }

    #[test]
    fn calls_are_found_by_their_number() {
        let many = (0..200).map(|call| call * 3 + call % 2).collect();
        for calls in [vec![], vec![0], vec![0, 1, 5], vec![7, 8, 9, 400], many] {
            let program = program(&calls.iter().map(|call| (*call, vec![answer(ALLOW)])).collect());
            for number in (0..700).chain([u32::MAX, 0x4000_0000, 0x4000_0007]) {
                let expected = if calls.contains(&number) { ALLOW } else { DENY };
                assert_eq!(run(&program, AUDIT_ARCH_X86_64, number, [0; 6]).0, expected, "{number} of {calls:?}");
                assert_eq!(run(&program, 0x4000_0003, number, [0; 6]).0, KILL);
            }
        }
    }

    #[test]
    fn some_calls_are_allowed_with_some_arguments_only() {
        let program = whole();
        let says = |call: i64, argument: usize, value: u32| {
            // Whatever the other arguments are.
            let [first, second] = [0, u32::MAX].map(|others| {
                let mut arguments = [others; 6];
                arguments[argument] = value;
                run(&program, AUDIT_ARCH_X86_64, call as u32, arguments).0
            });
            assert_eq!(first, second);
            first
        };
        for (call, argument, allowed, denied) in [
            (libc::SYS_mmap, 2, libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC),
            (libc::SYS_mprotect, 2, libc::PROT_NONE, libc::PROT_EXEC),
            (libc::SYS_fcntl, 1, libc::F_GETFL, libc::F_SETOWN),
            (libc::SYS_clone, 0, libc::CLONE_THREAD | libc::CLONE_VM, libc::CLONE_VM | libc::SIGCHLD),
            (libc::SYS_unshare, 0, libc::CLONE_FS, libc::CLONE_FS | libc::CLONE_NEWNS),
            (libc::SYS_socket, 0, libc::AF_UNIX, libc::AF_NETLINK),
            (libc::SYS_tgkill, 0, std::process::id().cast_signed(), 1),
            (libc::SYS_prlimit64, 0, 0, 1),
            (libc::SYS_prctl, 0, libc::PR_SET_NAME, libc::PR_SET_SECCOMP),
        ] {
            assert_eq!(says(call, argument, allowed.cast_unsigned()), ALLOW, "{call}");
            assert_eq!(says(call, argument, denied.cast_unsigned()), DENY, "{call}");
        }
        let ioctls: Vec<u32> = KVM_IOCTLS.into_iter().chain(OTHER_IOCTLS.map(|number| number as u32)).collect();
        for number in &ioctls {
            assert_eq!(says(libc::SYS_ioctl, 1, *number), ALLOW);
            assert_eq!(says(libc::SYS_ioctl, 1, number ^ 1 << 31), DENY);
        }
        // KVM_CREATE_VM and KVM_SET_USER_MEMORY_REGION.
        assert_eq!([0xae01, 0x4020_ae46].map(|number| says(libc::SYS_ioctl, 1, number)), [DENY; 2]);
        assert_eq!(says(libc::SYS_clone3, 0, 0), libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32);
    }

    #[test]
    fn it_takes_few_steps_to_tell_of_any_call() {
        let program = whole();
        assert!(program.len() < 400, "{}", program.len());
        let limited: Vec<i64> = by_arguments().into_iter().map(|(call, _)| call).collect();
        for number in (0..600).filter(|number| !limited.contains(number)) {
            let (said, steps) = run(&program, AUDIT_ARCH_X86_64, number as u32, [0; 6]);
            assert!(steps <= 11, "{number}: {steps} steps");
            let listed = [PROCESS, DESCRIPTORS, FILES].iter().any(|list| list.contains(&number));
            assert_eq!(said, if listed { ALLOW } else { DENY }, "{number}");
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
