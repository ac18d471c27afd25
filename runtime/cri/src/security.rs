//! What a container may do: the CRI's security context to ours.

use std::path::PathBuf;

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{Capabilities, Seccomp, Security, User};
use tonic::Status;

use crate::namespaces;
use crate::status::invalid;

const FIELD: &str = "config.linux.security_context";
/// Before a profile of the host in the older form of both kinds of profiles.
const LOCALHOST: &str = "localhost/";

/// Translates a container's security context. `unset_seccomp` filters the system calls of
/// one that names no profile.
pub fn security(context: cri::LinuxContainerSecurityContext, unset_seccomp: &Seccomp) -> Result<Security, Status> {
    let namespaces::Options { pid, pid_target, user_namespace } =
        namespaces::options(&format!("{FIELD}.namespace_options"), context.namespace_options.as_ref())?;
    refuse_selinux(FIELD, context.selinux_options.as_ref())?;
    let seccomp = seccomp(&context, unset_seccomp)?;
    let apparmor = apparmor(&context)?;
    let user = user(&context)?;
    for (name, paths) in [("masked_paths", &context.masked_paths), ("readonly_paths", &context.readonly_paths)] {
        if let Some(index) = paths.iter().position(|path| !path.starts_with('/') || path.contains('\0')) {
            return Err(invalid(&format!("{FIELD}.{name}[{index}]"), "must be an absolute path"));
        }
    }
    let capabilities = context.capabilities.unwrap_or_default();
    Ok(Security {
        privileged: context.privileged,
        capabilities: Capabilities {
            add: capabilities.add_capabilities,
            drop: capabilities.drop_capabilities,
            ambient: capabilities.add_ambient_capabilities,
        },
        user,
        readonly_rootfs: context.readonly_rootfs,
        no_new_privileges: context.no_new_privs,
        // The CRI's lists are complete: who wants the usual paths hidden sends them, who
        // wants none (procMount: Unmasked) sends none.
        masked_paths: Some(context.masked_paths),
        readonly_paths: Some(context.readonly_paths),
        seccomp,
        apparmor,
        pid,
        pid_target,
        user_namespace,
    })
}

/// A pod's context: of what concerns containers nothing is taken from it, but what cannot
/// be is refused here, before there is a guest.
pub fn pod(field: &str, context: &cri::LinuxSandboxSecurityContext) -> Result<(), Status> {
    refuse_selinux(field, context.selinux_options.as_ref())?;
    if let Some(profile) = &context.apparmor {
        // There is no process of the pod's own that could run under it.
        apparmor_profile(&format!("{field}.apparmor"), profile)?;
    }
    for (name, value) in [("run_as_user", context.run_as_user), ("run_as_group", context.run_as_group)] {
        value.map(|value| id(&format!("{field}.{name}"), value.value)).transpose()?;
    }
    if context.run_as_group.is_some() && context.run_as_user.is_none() {
        return Err(invalid(&format!("{field}.run_as_group"), "needs run_as_user"));
    }
    groups(field, &context.supplemental_groups).map(drop)
}

fn seccomp(context: &cri::LinuxContainerSecurityContext, unset: &Seccomp) -> Result<Seccomp, Status> {
    use cri::security_profile::ProfileType;
    let field = format!("{FIELD}.seccomp");
    let Some(profile) = &context.seccomp else {
        #[allow(deprecated, reason = "older clients know no other field")]
        return seccomp_path(&context.seccomp_profile_path, unset);
    };
    match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::RuntimeDefault) => Ok(Seccomp::RuntimeDefault),
        Ok(ProfileType::Unconfined) => Ok(Seccomp::Unconfined),
        Ok(ProfileType::Localhost) => localhost(&format!("{field}.localhost_ref"), &profile.localhost_ref),
        Err(_) => Err(invalid(&format!("{field}.profile_type"), format!("{} is not one", profile.profile_type))),
    }
}

/// The older form of a profile: one string.
fn seccomp_path(path: &str, unset: &Seccomp) -> Result<Seccomp, Status> {
    let field = format!("{FIELD}.seccomp_profile_path");
    match path {
        "" => Ok(unset.clone()),
        "unconfined" => Ok(Seccomp::Unconfined),
        "runtime/default" | "docker/default" => Ok(Seccomp::RuntimeDefault),
        path if path.starts_with(LOCALHOST) => localhost(&field, path),
        path => {
            let problem = format!("{path:?} is not unconfined, runtime/default or localhost/ and a path");
            Err(invalid(&field, problem))
        }
    }
}

fn localhost(field: &str, reference: &str) -> Result<Seccomp, Status> {
    let path = reference.strip_prefix(LOCALHOST).unwrap_or(reference);
    if !path.starts_with('/') || path.contains('\0') {
        return Err(invalid(field, format!("{reference:?} is not the absolute path of a profile on the host")));
    }
    Ok(Seccomp::Localhost(PathBuf::from(path)))
}

/// The AppArmor profile to run under, by its name in the host's kernel; none for the default,
/// for the guest is the fence then: a node has no profile of Nacelle's that would add to it.
fn apparmor(context: &cri::LinuxContainerSecurityContext) -> Result<Option<String>, Status> {
    if let Some(profile) = &context.apparmor {
        return apparmor_profile(&format!("{FIELD}.apparmor"), profile);
    }
    let field = format!("{FIELD}.apparmor_profile");
    #[allow(deprecated, reason = "older clients know no other field")]
    match context.apparmor_profile.as_str() {
        "" | "unconfined" | "runtime/default" => Ok(None),
        profile if profile.starts_with(LOCALHOST) => loaded_profile(&field, profile).map(Some),
        profile => {
            let problem = format!("{profile:?} is not unconfined, runtime/default or localhost/ and a name");
            Err(invalid(&field, problem))
        }
    }
}

fn apparmor_profile(field: &str, profile: &cri::SecurityProfile) -> Result<Option<String>, Status> {
    use cri::security_profile::ProfileType;
    match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::RuntimeDefault | ProfileType::Unconfined) => Ok(None),
        Ok(ProfileType::Localhost) => {
            loaded_profile(&format!("{field}.localhost_ref"), &profile.localhost_ref).map(Some)
        }
        Err(_) => Err(invalid(&format!("{field}.profile_type"), format!("{} is not one", profile.profile_type))),
    }
}

/// The name in a reference. The kernel cuts white space off the ends of a name and ends its
/// lists of them by line, so that no profile can be asked for by a name that has such.
fn loaded_profile(field: &str, reference: &str) -> Result<String, Status> {
    let name = reference.strip_prefix(LOCALHOST).unwrap_or(reference);
    if name.is_empty() || name.trim() != name || name.contains(['\0', '\n']) {
        return Err(invalid(field, format!("{reference:?} is not the name of a profile that is loaded on the host")));
    }
    Ok(name.to_owned())
}

fn refuse_selinux(field: &str, options: Option<&cri::SeLinuxOption>) -> Result<(), Status> {
    match options {
        Some(options) if *options != cri::SeLinuxOption::default() => {
            Err(invalid(&format!("{field}.selinux_options"), "the guest has no SELinux: leave them out"))
        }
        _ => Ok(()),
    }
}

fn user(context: &cri::LinuxContainerSecurityContext) -> Result<User, Status> {
    let uid = context.run_as_user.map(|user| id(&format!("{FIELD}.run_as_user"), user.value)).transpose()?;
    let gid = context.run_as_group.map(|group| id(&format!("{FIELD}.run_as_group"), group.value)).transpose()?;
    let name = context.run_as_username.clone();
    if uid.is_some() && !name.is_empty() {
        return Err(invalid(&format!("{FIELD}.run_as_username"), "must be empty where run_as_user is given"));
    }
    if name.contains([':', '\0', '\n']) {
        return Err(invalid(&format!("{FIELD}.run_as_username"), format!("{name:?} is not a user's name")));
    }
    if gid.is_some() && uid.is_none() && name.is_empty() {
        return Err(invalid(&format!("{FIELD}.run_as_group"), "needs run_as_user or run_as_username"));
    }
    let policy = context.supplemental_groups_policy;
    let strict_groups = match cri::SupplementalGroupsPolicy::try_from(policy) {
        Ok(policy) => policy == cri::SupplementalGroupsPolicy::Strict,
        Err(_) => {
            return Err(invalid(&format!("{FIELD}.supplemental_groups_policy"), format!("{policy} is not a policy")));
        }
    };
    Ok(User { uid, gid, name, supplementary: groups(FIELD, &context.supplemental_groups)?, strict_groups })
}

fn groups(field: &str, groups: &[i64]) -> Result<Vec<u32>, Status> {
    let groups = groups.iter().enumerate();
    groups.map(|(index, group)| id(&format!("{field}.supplemental_groups[{index}]"), *group)).collect()
}

/// A user's or group's number. The largest means "no change" to the kernel.
fn id(field: &str, value: i64) -> Result<u32, Status> {
    let found = u32::try_from(value).ok().filter(|id| *id != u32::MAX);
    found.ok_or_else(|| invalid(field, format!("{value} is not 0 to {}", u32::MAX - 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Context = cri::LinuxContainerSecurityContext;

    fn translated(context: Context) -> Result<Security, Status> {
        security(context, &Seccomp::Unconfined)
    }

    fn profile(profile_type: i32, localhost_ref: &str) -> Option<cri::SecurityProfile> {
        Some(cri::SecurityProfile { profile_type, localhost_ref: localhost_ref.into() })
    }

    #[test]
    fn both_forms_of_a_seccomp_profile_mean_the_same() {
        let new = |kind, path: &str| translated(Context { seccomp: profile(kind, path), ..Context::default() });
        #[allow(deprecated)]
        let old = |path: &str| translated(Context { seccomp_profile_path: path.into(), ..Context::default() });
        let file = Seccomp::Localhost("/var/lib/kubelet/seccomp/a.json".into());
        for (new, old, expected) in [
            (new(0, ""), old("runtime/default"), Seccomp::RuntimeDefault),
            (new(1, ""), old("unconfined"), Seccomp::Unconfined),
            (new(2, "/var/lib/kubelet/seccomp/a.json"), old("localhost//var/lib/kubelet/seccomp/a.json"), file),
        ] {
            assert_eq!((&new.unwrap().seccomp, &old.unwrap().seccomp), (&expected, &expected));
        }
        assert_eq!(security(Context::default(), &Seccomp::RuntimeDefault).unwrap().seccomp, Seccomp::RuntimeDefault);
    }

    #[test]
    fn the_lists_of_paths_are_taken_as_they_are() {
        let none = translated(Context::default()).unwrap();
        assert_eq!((none.masked_paths, none.readonly_paths), (Some(vec![]), Some(vec![])));
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_field() {
        let number = |value| Some(cri::Int64Value { value });
        let base = Context::default;
        let selinux = cri::SeLinuxOption { r#type: "spc_t".into(), ..Default::default() };
        #[allow(deprecated)]
        let cases = [
            (Context { seccomp: profile(2, "a.json"), ..base() }, "seccomp.localhost_ref"),
            (Context { seccomp: profile(2, ""), ..base() }, "seccomp.localhost_ref"),
            (Context { seccomp: profile(7, ""), ..base() }, "seccomp.profile_type"),
            (Context { seccomp_profile_path: "a.json".into(), ..base() }, "seccomp_profile_path"),
            (Context { seccomp_profile_path: "localhost/a.json".into(), ..base() }, "seccomp_profile_path"),
            (Context { apparmor: profile(2, ""), ..base() }, "apparmor.localhost_ref"),
            (Context { apparmor: profile(2, "localhost/"), ..base() }, "apparmor.localhost_ref"),
            (Context { apparmor: profile(2, " p"), ..base() }, "apparmor.localhost_ref"),
            (Context { apparmor: profile(2, "p\nq"), ..base() }, "apparmor.localhost_ref"),
            (Context { apparmor: profile(5, ""), ..base() }, "apparmor.profile_type"),
            (Context { apparmor_profile: "p".into(), ..base() }, "apparmor_profile"),
            (Context { apparmor_profile: "localhost/".into(), ..base() }, "apparmor_profile"),
            (Context { selinux_options: Some(selinux), ..base() }, "selinux_options"),
            (Context { run_as_user: number(-1), ..base() }, "run_as_user"),
            (Context { run_as_user: number(1 << 32), ..base() }, "run_as_user"),
            (Context { run_as_user: number(u32::MAX.into()), ..base() }, "run_as_user"),
            (Context { run_as_group: number(5), ..base() }, "run_as_group"),
            (Context { run_as_user: number(5), run_as_group: number(-5), ..base() }, "run_as_group"),
            (Context { run_as_user: number(5), run_as_username: "x".into(), ..base() }, "run_as_username"),
            (Context { run_as_username: "root:0".into(), ..base() }, "run_as_username"),
            (Context { supplemental_groups: vec![1, -1], ..base() }, "supplemental_groups[1]"),
            (Context { supplemental_groups_policy: 4, ..base() }, "supplemental_groups_policy"),
            (Context { masked_paths: vec!["proc".into()], ..base() }, "masked_paths[0]"),
            (Context { readonly_paths: vec!["/a".into(), String::new()], ..base() }, "readonly_paths[1]"),
        ];
        for (context, field) in cases {
            let status = translated(context).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().starts_with(&format!("{FIELD}.{field}: ")), "{} {field}", status.message());
        }
    }

    #[test]
    fn an_apparmor_profile_is_one_that_is_named_and_the_new_field_wins() {
        let both = |apparmor, old: &str| {
            #[allow(deprecated)]
            let context = Context { apparmor, apparmor_profile: old.into(), ..Context::default() };
            translated(context).unwrap().apparmor
        };
        for old in ["", "unconfined", "runtime/default"] {
            assert_eq!(both(None, old), None, "{old}");
        }
        assert_eq!(both(None, "localhost/p").as_deref(), Some("p"));
        for kind in [0, 1] {
            assert_eq!(both(profile(kind, ""), "localhost/p"), None);
        }
        for (reference, name) in
            [("q", "q"), ("localhost/q", "q"), ("/usr/bin/q r", "/usr/bin/q r"), ("q//hat", "q//hat")]
        {
            assert_eq!(both(profile(2, reference), "localhost/p").as_deref(), Some(name));
            assert_eq!(both(profile(2, reference), "runtime/default").as_deref(), Some(name));
        }
        let privileged = Context { privileged: true, apparmor: profile(2, "p"), ..Context::default() };
        assert_eq!(translated(privileged).unwrap().apparmor.as_deref(), Some("p"));
    }

    #[test]
    fn a_pod_may_name_an_apparmor_profile() {
        let context = |apparmor| cri::LinuxSandboxSecurityContext { apparmor, ..Default::default() };
        pod("x", &context(profile(2, "localhost/p"))).unwrap();
        let refused = pod("x", &context(profile(2, ""))).unwrap_err();
        assert!(refused.message().starts_with("x.apparmor.localhost_ref: "), "{}", refused.message());
    }
}
