//! Capabilities of the process.

use std::collections::HashSet;
use std::str::FromStr;

use oci_spec::runtime::{Capability, LinuxCapabilities, LinuxCapabilitiesBuilder};

use super::internal;
use crate::model::Capabilities;
use crate::{Error, Result};

/// What a container has when nothing is asked for.
const DEFAULT: &[Capability] = &[
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// Everything a guest's kernel knows.
const ALL: &[Capability] = &[
    Capability::AuditControl,
    Capability::AuditRead,
    Capability::AuditWrite,
    Capability::BlockSuspend,
    Capability::Bpf,
    Capability::CheckpointRestore,
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::Kill,
    Capability::Lease,
    Capability::LinuxImmutable,
    Capability::MacAdmin,
    Capability::MacOverride,
    Capability::Mknod,
    Capability::NetAdmin,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetRaw,
    Capability::Perfmon,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysChroot,
    Capability::SysModule,
    Capability::SysNice,
    Capability::SysPacct,
    Capability::SysPtrace,
    Capability::SysRawio,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Syslog,
    Capability::WakeAlarm,
];

/// Builds the five sets.
pub fn build(asked: &Capabilities, privileged: bool) -> Result<LinuxCapabilities> {
    let set = set(asked, privileged)?;
    let ambient = parse(&asked.ambient)?;
    if let Some(missing) = ambient.difference(&set).next() {
        return Err(Error::Invalid(format!(
            "ambient capability {missing:?} is not among the container's capabilities: add it there too"
        )));
    }
    LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .effective(set.clone())
        .permitted(set)
        .inheritable(ambient.clone())
        .ambient(ambient)
        .build()
        .map_err(internal)
}

/// The container's capabilities: `ALL` first, then the single names, as Kubernetes does.
pub fn set(asked: &Capabilities, privileged: bool) -> Result<HashSet<Capability>> {
    let all = |names: &[String]| names.iter().any(|name| name.eq_ignore_ascii_case("ALL"));
    if privileged {
        return Ok(ALL.iter().copied().collect());
    }
    let mut set: HashSet<_> = if all(&asked.add) {
        ALL.iter().copied().collect()
    } else if all(&asked.drop) {
        HashSet::new()
    } else {
        DEFAULT.iter().copied().collect()
    };
    set.extend(parse(&asked.add)?);
    for capability in parse(&asked.drop)? {
        set.remove(&capability);
    }
    Ok(set)
}

fn parse(names: &[String]) -> Result<HashSet<Capability>> {
    names
        .iter()
        .filter(|name| !name.eq_ignore_ascii_case("ALL"))
        .map(|name| {
            let name = name.to_ascii_uppercase();
            Capability::from_str(name.strip_prefix("CAP_").unwrap_or(&name))
                .map_err(|_| Error::Invalid(format!("unknown capability {name:?}")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(add: &[&str], drop: &[&str]) -> Capabilities {
        let list = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        Capabilities { add: list(add), drop: list(drop), ambient: Vec::new() }
    }

    #[test]
    fn single_names_apply_after_all() {
        let only = set(&asked(&["NET_ADMIN"], &["ALL"]), false).unwrap();
        assert_eq!(only, HashSet::from([Capability::NetAdmin]));
        let most = set(&asked(&["ALL"], &["SYS_ADMIN"]), false).unwrap();
        assert_eq!(most.len(), ALL.len() - 1);
        assert_eq!(set(&asked(&[], &["CAP_CHOWN"]), false).unwrap().len(), DEFAULT.len() - 1);
    }

    #[test]
    fn unknown_names_are_refused_by_name() {
        let error = set(&asked(&["FLY"], &[]), false).unwrap_err().to_string();
        assert!(error.contains("FLY"), "{error}");
    }
}
