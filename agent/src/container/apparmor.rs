//! AppArmor profiles that containers run under.
//!
//! The host takes the compiled policy from its own kernel. Here it goes into the guest's, and
//! libcontainer has each process of the container, further ones too, change to the
//! profile when it becomes its command.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use libcontainer::oci_spec::runtime::Spec;
use rustix::mount::{MountFlags, mount};

use crate::error::{Error, Result};

const FIELD: &str = "apparmor_policy";
/// Where a policy is written to, which replaces the profiles that it has and are loaded.
const REPLACE: &str = "/sys/kernel/security/apparmor/.replace";
const SECURITYFS: &str = "/sys/kernel/security";

/// Loads the policy with the profile that the specification names, if it names one.
pub fn load(spec: &Spec, policy: &[u8]) -> Result<()> {
    let Some(profile) = profile(spec, policy)? else { return Ok(()) };
    let file = open().map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::State(format!("the guest's kernel has no AppArmor for the profile {profile:?}")),
        _ => Error::path("open", REPLACE)(error),
    })?;
    write_whole(file, policy).map_err(|error| {
        Error::invalid(FIELD, format!("the guest's kernel refuses the profile {profile:?}: {}", why(&error)))
    })
}

/// The profile that the specification names; an error if there is no policy for it, or one for none.
fn profile<'a>(spec: &'a Spec, policy: &[u8]) -> Result<Option<&'a str>> {
    let profile = spec.process().as_ref().and_then(|process| process.apparmor_profile().as_deref());
    match profile.filter(|name| !name.is_empty()) {
        Some(profile) if policy.is_empty() => Err(Error::invalid(
            FIELD,
            format!("spec_json names the profile {profile:?}, and there is no policy with it"),
        )),
        None if !policy.is_empty() => Err(Error::invalid(FIELD, "spec_json names no profile of it")),
        profile => Ok(profile),
    }
}

/// Opens the kernel's file. securityfs is mounted by the first who needs it: a guest's start does
/// not pay for it.
fn open() -> io::Result<File> {
    let write = || File::options().write(true).open(REPLACE);
    match write() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            match mount("securityfs", Path::new(SECURITYFS), "securityfs", flags, None) {
                // Another container's creation was faster.
                Ok(()) | Err(rustix::io::Errno::BUSY) => write(),
                // The kernel does not know it, or has no directory for it.
                Err(rustix::io::Errno::NODEV | rustix::io::Errno::NOENT) => Err(ErrorKind::NotFound.into()),
                Err(error) => Err(error.into()),
            }
        }
        opened => opened,
    }
}

/// The kernel takes each write for a policy of its own.
fn write_whole(mut file: impl Write, policy: &[u8]) -> io::Result<()> {
    match file.write(policy)? {
        written if written == policy.len() => Ok(()),
        written => Err(io::Error::other(format!("it took {written} of {} bytes", policy.len()))),
    }
}

/// What the kernel means by an error.
fn why(error: &io::Error) -> String {
    let meaning = match error.raw_os_error() {
        Some(libc::EPROTONOSUPPORT) => "it was compiled in a form that this kernel does not know",
        Some(libc::EPROTO | libc::EINVAL) => "it is no policy, or damaged",
        Some(libc::ENOENT) => "a profile in it belongs to one that is not in it",
        Some(libc::EACCES | libc::EPERM) => "no policy may be loaded any more",
        Some(libc::ENOMEM | libc::ENOSPC) => "the guest has too little memory for it",
        _ => return error.to_string(),
    };
    format!("{meaning} ({error})")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(profile: Option<&str>) -> Spec {
        let mut spec = json!({"ociVersion": "1.0.2", "process": {"user": {}, "args": ["x"], "cwd": "/"}});
        if let Some(profile) = profile {
            spec["process"]["apparmorProfile"] = profile.into();
        }
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn a_profile_and_its_policy_come_together() {
        assert_eq!(profile(&spec(Some("web")), b"policy").unwrap(), Some("web"));
        assert_eq!(profile(&spec(None), b"").unwrap(), None);
        assert_eq!(profile(&spec(Some("")), b"").unwrap(), None);
        let error = profile(&spec(Some("web")), b"").unwrap_err().to_string();
        assert!(error.starts_with("apparmor_policy: ") && error.contains("\"web\""), "{error}");
        assert!(profile(&spec(None), b"policy").is_err());
        load(&spec(None), b"").unwrap();
    }

    #[test]
    fn a_policy_is_one_write() {
        struct Kernel(Vec<usize>, usize);
        impl Write for &mut Kernel {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.push(bytes.len());
                Ok(bytes.len().min(self.1))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut kernel = Kernel(Vec::new(), usize::MAX);
        write_whole(&mut kernel, &[0; 100_000]).unwrap();
        assert_eq!(kernel.0, [100_000]);
        let mut kernel = Kernel(Vec::new(), 4096);
        let error = write_whole(&mut kernel, &[0; 100_000]).unwrap_err();
        assert_eq!(why(&error), "it took 4096 of 100000 bytes");
        assert_eq!(kernel.0, [100_000], "a second write would be another policy");
    }

    #[test]
    fn the_kernel_s_errors_are_told_in_words() {
        let told = why(&io::Error::from_raw_os_error(libc::EPROTONOSUPPORT));
        assert!(told.contains("form that this kernel does not know") && told.contains("os error 93"), "{told}");
    }
}
