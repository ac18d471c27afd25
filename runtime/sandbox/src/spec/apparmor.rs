//! AppArmor profiles of the host, for the guest's kernel.
//!
//! A profile is asked for by its name, as it is loaded in the host's kernel. Its source need not
//! be on the node any more, but the kernel keeps what it was loaded from, the compiled
//! policy, and shows it in securityfs since 4.17 (with `CONFIG_SECURITY_APPARMOR_EXPORT_BINARY`):
//!
//! ```text
//! policy/profiles/web.3/name                the name, "web"
//! policy/profiles/web.3/raw_data         -> ../../raw_data/5/raw_data
//! policy/profiles/web.3/profiles/hat.7/…    the same of "web//hat"
//! ```
//!
//! Such a policy has all profiles of one load, and is what the guest's agent loads there.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The names of the CRI for where a profile is asked for begin with it.
const FIELD: &str = "config.linux.security_context.apparmor";
/// Where securityfs shows AppArmor's policy.
const POLICY: &str = "/sys/kernel/security/apparmor/policy";
/// Largest policy that is taken over, in bytes. A profile takes 1 to some tens of KiB. An
/// agent accepts messages of 4 MiB, of which a specification with the largest system call
/// filter takes less than two.
const LIMIT: u64 = 1 << 20;
/// Largest name, in bytes.
const NAME_LIMIT: u64 = 4096;

/// The compiled policy with the profile of this name in the host's kernel.
///
/// # Errors
/// [`Error::Invalid`], with the name and the remedy, if there is none or it cannot be had.
pub fn policy(name: &str) -> Result<Vec<u8>> {
    policy_in(Path::new(POLICY), name)
}

/// The same with securityfs's directory at another place.
fn policy_in(directory: &Path, name: &str) -> Result<Vec<u8>> {
    let failed = |problem: String| Error::Invalid(format!("{FIELD}: AppArmor profile {name:?}: {problem}"));
    let profile = match find(&directory.join("profiles"), name) {
        Ok(Some(profile)) => profile,
        Ok(None) => {
            return Err(failed("it is not loaded on this node: load it with apparmor_parser -r FILE".into()));
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(failed(format!(
                "there is no {}: the node's kernel needs AppArmor, and securityfs mounted on /sys/kernel/security",
                directory.display()
            )));
        }
        Err(error) => return Err(failed(format!("cannot look for it in {}: {error}", directory.display()))),
    };
    let file = profile.join("raw_data");
    match read(&file, LIMIT) {
        Ok(policy) if policy.is_empty() => Err(failed(format!("{} is empty", file.display()))),
        Ok(policy) => Ok(policy),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(failed(format!(
            "the node's kernel does not show its policy in {}: it needs Linux 4.17 with \
             CONFIG_SECURITY_APPARMOR_EXPORT_BINARY",
            file.display()
        ))),
        Err(error) if error.kind() == ErrorKind::FileTooLarge => Err(failed(format!(
            "it was loaded with others in a policy of more than {LIMIT} bytes: load it from a file of its own"
        ))),
        Err(error) => Err(failed(format!("cannot read {}: {error}", file.display()))),
    }
}

/// The directory of the profile, if there is one of this name.
fn find(profiles: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    // A child is below its parent, and its own name is the last part.
    let mut parts = name.split("//");
    let mut found = find_in(profiles, parts.next().unwrap_or_default())?;
    for part in parts {
        let Some(parent) = found else { return Ok(None) };
        found = match find_in(&parent.join("profiles"), part) {
            // It has no children.
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            found => found?,
        };
    }
    Ok(found)
}

/// The same among the entries of one directory. Their own names are cut and altered ones of the
/// profiles.
fn find_in(profiles: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir(profiles)? {
        let profile = entry?.path();
        match read(&profile.join("name"), NAME_LIMIT) {
            Ok(found) if found.strip_suffix(b"\n").unwrap_or(&found) == name.as_bytes() => return Ok(Some(profile)),
            Ok(_) => {}
            // One that is being removed, or that cannot be asked for by its name.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::FileTooLarge) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// All of a file; an error of kind `FileTooLarge` if there is more. The sizes that securityfs
/// gives say nothing.
fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut content)?;
    match u64::try_from(content.len()) {
        Ok(length) if length <= limit => Ok(content),
        _ => Err(ErrorKind::FileTooLarge.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A directory as the kernel's, with the profiles `web`, `web//hat`, one with an odd name and
    /// one whose policy the kernel has not kept.
    fn node() -> tempfile::TempDir {
        let node = tempfile::tempdir().unwrap();
        let policy = |number: &str, content: &[u8]| {
            let directory = node.path().join("raw_data").join(number);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("raw_data"), content).unwrap();
        };
        policy("0", b"policy of others");
        policy("1", b"policy of web");
        let profile = |directory: &str, name: &str, policy: &str| {
            let directory = node.path().join("profiles").join(directory);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("name"), format!("{name}\n")).unwrap();
            if !policy.is_empty() {
                symlink(node.path().join("raw_data").join(policy).join("raw_data"), directory.join("raw_data"))
                    .unwrap();
            }
        };
        // The kernel gives each a number, so a name is no prefix of its own directory's only.
        profile("web.1", "web.1", "0");
        profile("web.12", "web", "1");
        profile("web.12/profiles/hat.13", "hat", "1");
        profile("usr.bin.a_b.2", "/usr/bin/a b*{c,ü}", "0");
        profile("old.3", "old", "");
        fs::create_dir(node.path().join("profiles/going.4")).unwrap();
        node
    }

    #[test]
    fn a_profile_is_found_by_its_name_and_not_by_its_directory() {
        let node = node();
        for (name, expected) in [
            ("web", &b"policy of web"[..]),
            ("web//hat", b"policy of web"),
            ("web.1", b"policy of others"),
            ("/usr/bin/a b*{c,ü}", b"policy of others"),
        ] {
            assert_eq!(policy_in(node.path(), name).unwrap(), expected, "{name}");
        }
        for name in ["", "we", "web.12", "hat", "web//hat//x", "web//", "going.4", "usr.bin.a_b.2", "../profiles/web.1"]
        {
            let error = policy_in(node.path(), name).unwrap_err().to_string();
            assert!(error.starts_with("config.linux.security_context.apparmor: "), "{error}");
            assert!(error.contains(&format!("{name:?}")) && error.contains("apparmor_parser -r"), "{error}");
        }
    }

    #[test]
    fn a_policy_that_cannot_be_had_is_named_with_the_reason() {
        let node = node();
        let error = |name: &str| policy_in(node.path(), name).unwrap_err().to_string();
        assert!(error("old").contains("EXPORT_BINARY"), "{}", error("old"));
        let file = node.path().join("raw_data/1/raw_data");
        let largest = vec![1; usize::try_from(LIMIT).unwrap()];
        fs::write(&file, &largest).unwrap();
        assert_eq!(policy_in(node.path(), "web").unwrap(), largest);
        fs::write(&file, [&largest[..], &[1]].concat()).unwrap();
        assert!(error("web").contains("1048576 bytes"), "{}", error("web"));
        fs::write(&file, "").unwrap();
        assert!(error("web").contains("is empty"), "{}", error("web"));
    }

    #[test]
    fn a_node_without_apparmor_says_so() {
        let node = tempfile::tempdir().unwrap();
        let error = policy_in(&node.path().join("policy"), "web").unwrap_err().to_string();
        assert!(error.contains("\"web\"") && error.contains("securityfs"), "{error}");
    }
}
