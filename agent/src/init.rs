//! PID 1: from the kernel's hands to a guest that containers can run in.
//!
//! Time counts before the host hears "ready": until then, only what a call needs to be
//! accepted. What it needs to be answered follows, before the first is.

use std::ffi::CStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::mount::{MountFlags, mount, mount_bind, mount_move, mount_remount};
use rustix::process::{Resource, Rlimit, chdir, chroot, setrlimit};
use rustix::system::{RebootCommand, reboot};

use crate::error::{Error, Result};
use crate::paths::{CGROUPS, POD_CGROUP};

const NONE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// File systems after /proc: source and type, target, flags, options.
const MOUNTS: [(&str, &str, MountFlags, &CStr); 8] = [
    ("sysfs", "/sys", NONE, c""),
    ("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=755"),
    ("devpts", "/dev/pts", MountFlags::NOSUID.union(MountFlags::NOEXEC), c"gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", NONE, c"mode=1777"),
    ("mqueue", "/dev/mqueue", NONE, c""),
    // Programs run from upper layers in it where the pod has no scratch disk.
    ("tmpfs", "/run", MountFlags::NOSUID.union(MountFlags::NODEV), c"mode=755"),
    ("tmpfs", "/tmp", MountFlags::NOSUID.union(MountFlags::NODEV), c"mode=1777"),
    ("cgroup2", CGROUPS, NONE, c"nsdelegate,memory_recursiveprot"),
];

/// Device files that a container finds by name where it asks for them, with the modes that they have on a node.
const DEVICES: [(&str, u32); 2] = [("/dev/net/tun", 0o666), ("/dev/fuse", 0o666)];

/// Kernel parameters that a node has, too. The second half the kernel would derive from the memory that the guest starts
/// with, which is little and not what the pod is limited by: threads count for its pids.max, and what a file, a watch or a
/// waiting signal takes counts for its memory.
const SYSCTLS: [(&str, &str); 8] = [
    ("vm/overcommit_memory", "1"),
    ("vm/max_map_count", "262144"),
    ("kernel/pid_max", "4194304"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_user_watches", "1048576"),
    ("fs/epoll/max_user_watches", "4194304"),
    ("fs/file-max", "9223372036854775807"),
    ("kernel/threads-max", "4194304"),
];

/// What containers find of the pod's network: what containerd 2 gives them, and a node's own namespace would hand down. Nobody
/// else is in it whom a port below 1024 would have to be kept for.
const NETWORK_SYSCTLS: [(&str, &str); 3] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    // All that the kernel takes, which are the guest's groups, whosever namespace it is.
    ("net/ipv4/ping_group_range", "0 2147483647"),
];

/// Signals, timers of POSIX among them, that may wait for a user's processes: as many as a host of 32 GiB lets wait.
const PENDING_SIGNALS: u64 = 128 << 10;

/// What comes before the ports are bound: a root that containers can be pivoted away
/// from, and /proc.
pub fn prepare() -> Result<()> {
    for directory in ["/proc", "/sys", "/dev", "/run", "/tmp", NEW_ROOT] {
        make_directory(directory)?;
    }
    leave_rootfs().map_err(Error::system("leave the initial root file system"))?;
    mount_one("proc", "/proc", NONE, c"")
}

const NEW_ROOT: &str = "/.root";

/// The kernel's first root cannot be pivoted away from, and is writable: put a read-only
/// view of it on top, and live there.
fn leave_rootfs() -> rustix::io::Result<()> {
    mount_bind("/", NEW_ROOT)?;
    chdir(NEW_ROOT)?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")?;
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, c"")
}

/// Whether the kernel's command line has this word.
pub fn command_line_has(word: &str) -> bool {
    fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.split_ascii_whitespace().any(|found| found == word))
}

/// Announces the agent on the console, for a guest without vsock.
pub fn announce_on_console() -> Result<()> {
    // Mounted again, harmlessly, by finish().
    mount_one("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=755")?;
    let mut console =
        OpenOptions::new().write(true).open("/dev/console").map_err(Error::path("open", "/dev/console"))?;
    console.write_all(b"nacelle-agent: ready\n").map_err(Error::path("write to", "/dev/console"))
}

/// Everything else, before the first call is answered.
pub fn finish() -> Result<()> {
    for (kind, target, flags, options) in MOUNTS {
        if target.starts_with("/dev/") {
            make_directory(target)?;
        }
        mount_one(kind, target, flags, options)?;
    }
    prepare_cgroups()?;
    bring_up_loopback().map_err(Error::system("bring up the loopback interface"))?;
    set_limits().map_err(Error::system("raise the resource limits"))?;
    for (name, value) in SYSCTLS {
        set_sysctl(name, value);
    }
    for (path, mode) in DEVICES {
        // A kernel without one of them serves all the same.
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(mode));
    }
    open_network();
    // Ctrl-Alt-Del is for machines with keyboards.
    let _ = reboot(RebootCommand::CadOff);
    Ok(())
}

fn set_sysctl(name: &str, value: &str) {
    // A kernel without one of them serves all the same.
    let _ = fs::write(Path::new("/proc/sys").join(name), value);
}

/// Lets everybody in the calling thread's network namespace bind any port, forward and ping. The thread is in the guest's own
/// user namespace.
pub fn open_network() {
    for (name, value) in NETWORK_SYSCTLS {
        set_sysctl(name, value);
    }
}

fn make_directory(path: &str) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::path("make the directory", path)(error))
        }
        _ => Ok(()),
    }
}

fn mount_one(kind: &str, target: &str, flags: MountFlags, options: &CStr) -> Result<()> {
    mount(kind, target, kind, flags, options).map_err(|error| Error::path("mount", target)(error.into()))
}

/// Makes the containers' group, with every controller the kernel has.
fn prepare_cgroups() -> Result<()> {
    let root = Path::new(CGROUPS);
    let pod = root.join(POD_CGROUP);
    let list = root.join("cgroup.controllers");
    let controllers = fs::read_to_string(&list).map_err(Error::path("read", list))?;
    let enable: Vec<String> = controllers.split_ascii_whitespace().map(|name| format!("+{name}")).collect();
    fs::create_dir_all(&pod).map_err(Error::path("make the control group", &pod))?;
    for directory in [root, &pod] {
        let file = directory.join("cgroup.subtree_control");
        fs::write(&file, enable.join(" ")).map_err(Error::path("enable controllers by", file))?;
    }
    Ok(())
}

/// Brings up the loopback interface of the calling thread's network namespace.
pub fn bring_up_loopback() -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: an interface request of zeros is a valid one, of no name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *target = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request reads one interface request, which outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Containers inherit these where their specification says nothing.
fn set_limits() -> rustix::io::Result<()> {
    let files = Some(1 << 20);
    setrlimit(Resource::Nofile, Rlimit { current: files, maximum: files })?;
    // The kernel derives both from the guest's memory; a pod's limit is its pids controller.
    let pending = Some(PENDING_SIGNALS);
    setrlimit(Resource::Sigpending, Rlimit { current: pending, maximum: pending })?;
    setrlimit(Resource::Nproc, Rlimit { current: None, maximum: None })
}
