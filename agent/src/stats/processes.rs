//! What a container's processes have open.

use std::fs;

use nacelle_proto::agent::v1::ProcessUsage;

use crate::container::Container;

/// Most open files that are looked at one by one, for whether they are sockets.
const LIMIT: u64 = 65_536;

/// Looks at every process of the container.
pub fn usage(container: &Container) -> ProcessUsage {
    let processes = container.processes();
    let mut usage = ProcessUsage {
        processes: u64::try_from(processes.len()).unwrap_or(u64::MAX),
        open_files_limit: container.process().and_then(|process| open_files_limit(process.pid)),
        ..ProcessUsage::default()
    };
    for pid in processes {
        // A process that has ended has none.
        for file in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            usage.open_files = usage.open_files.saturating_add(1);
            let looked_at = usage.open_files <= LIMIT;
            let is_socket = || {
                fs::read_link(file.path())
                    .is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
            };
            if looked_at && is_socket() {
                usage.sockets = usage.sockets.saturating_add(1);
            }
        }
    }
    usage
}

/// A line like `Max open files            1024                 524288               files`.
fn open_files_limit(pid: i32) -> Option<u64> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_the_soft_one() {
        let own = i32::try_from(std::process::id()).unwrap();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        assert_eq!(open_files_limit(own), limit);
        assert_eq!(open_files_limit(-1), None);
    }
}
