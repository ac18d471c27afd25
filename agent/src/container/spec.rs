//! The container's specification: the host's, completed with what only the guest knows.

use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{
    LinuxDevice, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, Mount, MountBuilder,
    Process as ProcessSpec, Root, RootBuilder, Spec,
};

use crate::error::{Error, Result};
use crate::json;
use crate::users::{Databases, Identity};

/// Where commands are searched if nobody says otherwise.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The terminal of a process that has one, where nothing else is set.
const TERM: &str = "TERM=xterm";

/// What the guest adds to a specification.
#[derive(Debug)]
pub struct Completion<'a> {
    /// The mounted root file system.
    pub root: PathBuf,
    /// Whether the container cannot write to it.
    pub readonly: bool,
    /// Whether its process has a terminal.
    pub terminal: bool,
    /// USER as the request has it.
    pub user: &'a str,
    /// Whether the image adds no supplementary groups.
    pub strict_groups: bool,
    /// cgroupsPath.
    pub cgroup: PathBuf,
    /// Directory with the pod's files for /etc.
    pub etc: PathBuf,
    /// The image's users.
    pub databases: &'a Databases,
}

/// Reads the host's specification and checks what the agent relies on.
pub fn parse(json: &[u8]) -> Result<Spec> {
    let invalid = |reason: String| Error::invalid("spec_json", reason);
    let spec: Spec = json::read(json).map_err(|error| invalid(error.to_string()))?;
    if spec.hooks().is_some() {
        return Err(invalid("hooks cannot run in the guest".into()));
    }
    let process = spec.process().as_ref().ok_or_else(|| invalid("it has no process".into()))?;
    check_args("spec_json: process.args", process.args().as_deref().unwrap_or_default())?;
    check_env("spec_json: process.env", process.env().as_deref().unwrap_or_default())?;
    let linux = spec.linux().as_ref().ok_or_else(|| invalid("it has no linux section".into()))?;
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    if !namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Mount) {
        return Err(invalid("it has no mount namespace".into()));
    }
    Ok(spec)
}

/// A command is some arguments, of which the first names it.
pub fn check_args(field: &'static str, args: &[String]) -> Result<()> {
    match args.first() {
        None => Err(Error::invalid(field, "there is no command")),
        Some(command) if command.is_empty() => Err(Error::invalid(field, "the command is empty")),
        Some(_) if args.iter().any(|arg| arg.contains('\0')) => {
            Err(Error::invalid(field, "an argument contains a NUL byte"))
        }
        Some(_) => Ok(()),
    }
}

/// What a process cannot be given as its environment.
pub fn check_env(field: &'static str, env: &[String]) -> Result<()> {
    match env.iter().find(|entry| entry.contains('\0') || entry.starts_with('=') || entry.is_empty()) {
        Some(entry) => Err(Error::invalid(field, format!("{entry:?} is not a NAME=VALUE"))),
        None => Ok(()),
    }
}

/// Completes the specification in place; answers who the process runs as.
pub fn complete(spec: &mut Spec, with: &Completion<'_>) -> Result<Identity> {
    let readonly = with.readonly || spec.root().as_ref().and_then(Root::readonly).unwrap_or(false);
    let root = RootBuilder::default().path(&with.root).readonly(readonly).build();
    spec.set_root(Some(root.map_err(|error| Error::invalid("spec_json: root", error.to_string()))?));

    let own_uts = {
        let Some(linux) = spec.linux_mut() else { return Err(Error::invalid("spec_json", "it has no linux section")) };
        linux.set_cgroups_path(Some(with.cgroup.clone()));
        let namespaces = linux.namespaces().as_deref().unwrap_or_default();
        namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Uts && namespace.path().is_none())
    };
    if !own_uts {
        // The pod's own name is the guest's, and set already.
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    add_etc(spec, &with.etc, readonly);

    let Some(process) = spec.process_mut() else { return Err(Error::invalid("spec_json", "it has no process")) };
    process.set_terminal(Some(with.terminal));
    if process.no_new_privileges() == Some(false) {
        // libcontainer takes "false" as a reason to set the filter after it has dropped
        // the capabilities to do so.
        process.set_no_new_privileges(None);
    }
    let identity = identity(process, with)?;
    let user = process.user_mut();
    user.set_uid(identity.uid).set_gid(identity.gid).set_additional_gids(Some(identity.groups.clone()));
    let env = process.env_mut().get_or_insert_default();
    complete_env(env, &identity.home);
    Ok(identity)
}

/// Has the container join a namespace.
pub fn join_namespace(spec: &mut Spec, kind: LinuxNamespaceType, path: PathBuf) -> Result<()> {
    let namespace = LinuxNamespaceBuilder::default().typ(kind).path(path).build();
    let namespace = namespace.map_err(|error| Error::invalid("spec_json: linux.namespaces", error.to_string()))?;
    if let Some(linux) = spec.linux_mut() {
        let namespaces = linux.namespaces_mut().get_or_insert_default();
        namespaces.retain(|namespace| namespace.typ() != kind);
        namespaces.push(namespace);
    }
    Ok(())
}

/// The limits, which the agent itself applies.
pub fn take_resources(spec: &mut Spec) -> LinuxResources {
    let Some(linux) = spec.linux_mut() else { return LinuxResources::default() };
    let resources = linux.resources().clone().unwrap_or_default();
    linux.set_resources(None);
    resources
}

/// Has the container find these devices in its /dev.
pub fn add_devices(spec: &mut Spec, devices: Vec<LinuxDevice>) {
    if let Some(linux) = spec.linux_mut() {
        linux.devices_mut().get_or_insert_default().extend(devices);
    }
}

/// Gives an environment the HOME and PATH it lacks.
fn complete_env(env: &mut Vec<String>, home: &str) {
    // libcontainer would ask the C library for a missing home, which may load code from
    // the image to answer.
    if !env.iter().any(|entry| entry.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        env.retain(|entry| entry != "HOME=" && entry != "HOME");
        env.push(format!("HOME={home}"));
    }
    if !env.iter().any(|entry| entry.starts_with("PATH=")) {
        env.push(DEFAULT_PATH.to_owned());
    }
}

fn identity(process: &ProcessSpec, with: &Completion<'_>) -> Result<Identity> {
    let user = process.user();
    let mut identity = if with.user.is_empty() {
        let home = with.databases.home(user.uid());
        Identity { uid: user.uid(), gid: user.gid(), groups: Vec::new(), home }
    } else {
        with.databases.resolve(with.user)?
    };
    if with.strict_groups {
        identity.groups.clear();
    }
    // The primary group is a supplementary one too, so that giving it up by a set-group-id
    // program does not evade a group that is denied access.
    identity.groups.push(identity.gid);
    identity.groups.extend(user.additional_gids().iter().flatten());
    identity.groups.sort_unstable();
    identity.groups.dedup();
    Ok(identity)
}

/// Mounts the pod's files where the host mounts nothing of its own.
fn add_etc(spec: &mut Spec, etc: &Path, readonly: bool) {
    let mounts = spec.mounts_mut().get_or_insert_default();
    for name in ["resolv.conf", "hosts", "hostname"] {
        let (source, destination) = (etc.join(name), Path::new("/etc").join(name));
        let taken = mounts.iter().any(|mount| *mount.destination() == destination);
        if !taken && source.exists() {
            mounts.push(bind(source, destination, readonly));
        }
    }
}

fn bind(source: PathBuf, destination: PathBuf, readonly: bool) -> Mount {
    let options = ["bind", "rprivate", "nosuid", "nodev", "noexec", if readonly { "ro" } else { "rw" }];
    // Every field of it has a default, so it cannot fail.
    MountBuilder::default()
        .source(source)
        .destination(destination)
        .typ("bind")
        .options(options.map(str::to_owned).to_vec())
        .build()
        .unwrap_or_default()
}

/// The specification of a further process, after the container's own.
pub fn tenant(pattern: &ProcessSpec, args: Vec<String>, env: &[String], terminal: bool) -> Result<ProcessSpec> {
    check_args("args", &args)?;
    check_env("env", env)?;
    let mut process = pattern.clone();
    process.set_args(Some(args)).set_terminal(Some(terminal)).set_console_size(None);
    let merged = process.env_mut().get_or_insert_default();
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let added: Vec<String> = env.iter().map(|entry| name(entry)).collect();
    merged.retain(|entry| !added.contains(&name(entry)));
    merged.extend_from_slice(env);
    if terminal && !merged.iter().any(|entry| entry.starts_with("TERM=")) {
        merged.push(TERM.to_owned());
    }
    Ok(process)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn json() -> Value {
        json!({
            "ociVersion": "1.1.0",
            "hostname": "pod",
            "root": {"path": "rootfs"},
            "process": {"user": {"uid": 5, "gid": 6, "additionalGids": [9]}, "args": ["sh"], "cwd": "/",
                        "env": ["A=1", "HOME="], "noNewPrivileges": false},
            "mounts": [{"destination": "/etc/hosts", "source": "/somewhere", "type": "bind"}],
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]}
        })
    }

    fn completed(json: &Value, user: &str, strict_groups: bool) -> (Spec, Identity) {
        let image = tempfile::tempdir().unwrap();
        std::fs::create_dir(image.path().join("etc")).unwrap();
        std::fs::write(image.path().join("etc/passwd"), "www:x:33:34::/srv:\nfive:x:5:5::/five:\n").unwrap();
        std::fs::write(image.path().join("etc/group"), "adm:x:4:www\n").unwrap();
        let etc = tempfile::tempdir().unwrap();
        for name in ["hosts", "hostname"] {
            std::fs::write(etc.path().join(name), "").unwrap();
        }
        let databases = Databases::read(image.path()).unwrap();
        let mut spec = parse(json.to_string().as_bytes()).unwrap();
        let with = Completion {
            root: "/root/fs".into(),
            readonly: false,
            terminal: true,
            user,
            strict_groups,
            cgroup: "/pod/c".into(),
            etc: etc.path().into(),
            databases: &databases,
        };
        let identity = complete(&mut spec, &with).unwrap();
        (spec, identity)
    }

    #[test]
    fn fills_in_what_only_the_guest_knows() {
        let (spec, _) = completed(&json(), "www", false);
        let process = spec.process().as_ref().unwrap();
        assert_eq!(spec.root().as_ref().unwrap().path(), Path::new("/root/fs"));
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(process.no_new_privileges(), None);
        assert_eq!(process.env().as_ref().unwrap(), &["A=1", "HOME=/srv", DEFAULT_PATH]);
        assert_eq!(spec.linux().as_ref().unwrap().cgroups_path().as_deref(), Some(Path::new("/pod/c")));
        assert_eq!(spec.hostname(), &None, "libcontainer refuses a name without a namespace for it");
        let destinations: Vec<_> = spec.mounts().iter().flatten().map(Mount::destination).collect();
        assert_eq!(destinations, [Path::new("/etc/hosts"), Path::new("/etc/hostname")], "the host's mount stays");
    }

    #[test]
    fn the_user_is_the_image_s_or_the_specification_s() {
        let groups = |user, strict| {
            let (spec, identity) = completed(&json(), user, strict);
            let user = spec.process().as_ref().unwrap().user().clone();
            assert_eq!((user.uid(), user.gid()), (identity.uid, identity.gid));
            (identity.uid, identity.gid, user.additional_gids().clone().unwrap())
        };
        assert_eq!(groups("www", false), (33, 34, vec![4, 9, 34]));
        assert_eq!(groups("www", true), (33, 34, vec![9, 34]));
        assert_eq!(groups("", false), (5, 6, vec![6, 9]));
        assert_eq!(completed(&json(), "", false).1.home, "/five");
    }

    #[test]
    fn a_namespace_of_its_own_keeps_its_name() {
        let mut json = json();
        json["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "uts"}));
        assert_eq!(completed(&json, "", false).0.hostname().as_deref(), Some("pod"));
    }

    #[test]
    fn what_cannot_run_is_refused_by_its_field() {
        let refused = |pointer: &str, value: Value| {
            let mut json = json();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            json.pointer_mut(parent).unwrap()[key] = value;
            match parse(json.to_string().as_bytes()) {
                Err(Error::Invalid { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(refused("/process/args", json!([])), "spec_json: process.args");
        assert_eq!(refused("/process/args", json!([""])), "spec_json: process.args");
        assert_eq!(refused("/process/args", json!(["a\0b"])), "spec_json: process.args");
        assert_eq!(refused("/process/env", json!(["=x"])), "spec_json: process.env");
        assert_eq!(refused("/process", Value::Null), "spec_json");
        assert_eq!(refused("/linux", Value::Null), "spec_json");
        assert_eq!(refused("/linux/namespaces", json!([])), "spec_json");
        assert_eq!(refused("/hooks", json!({"prestart": []})), "spec_json");
        assert!(parse(b"{").is_err());
    }

    #[test]
    fn a_further_process_replaces_variables_and_keeps_the_rest() {
        let (spec, _) = completed(&json(), "www", false);
        let pattern = spec.process().as_ref().unwrap();
        let env = ["A=2".to_owned(), "B=3".to_owned()];
        let process = tenant(pattern, vec!["ls".into()], &env, false).unwrap();
        assert_eq!(process.env().as_ref().unwrap(), &["HOME=/srv", DEFAULT_PATH, "A=2", "B=3"]);
        assert_eq!(process.user(), pattern.user());
        assert_eq!(process.terminal(), Some(false));
        assert!(tenant(pattern, vec![], &[], false).is_err());
        assert!(tenant(pattern, vec!["ls".into()], &["=".into()], false).is_err());
    }

    #[test]
    fn a_further_process_with_a_terminal_knows_its_kind() {
        let (spec, _) = completed(&json(), "www", false);
        let pattern = spec.process().as_ref().unwrap();
        let term = |env: &[&str], terminal| {
            let env: Vec<String> = env.iter().map(ToString::to_string).collect();
            let process = tenant(pattern, vec!["top".into()], &env, terminal).unwrap();
            let terms = process.env().iter().flatten().filter(|entry| entry.starts_with("TERM=")).cloned();
            terms.collect::<Vec<_>>()
        };
        assert_eq!(term(&[], true), ["TERM=xterm"]);
        assert_eq!(term(&["TERM=vt100"], true), ["TERM=vt100"]);
        assert!(term(&[], false).is_empty());
    }
}
