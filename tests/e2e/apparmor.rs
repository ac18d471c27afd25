//! Containers under an AppArmor profile of the host. The profiles are loaded into the kernel of the
//! node, which needs AppArmor and Debian's package `apparmor`.

use std::fs;
use std::process::Command;

use nacelle_proto::runtime::v1 as cri;
use nacelle_proto::runtime::v1::security_profile::ProfileType;
use nacelle_tests::host::run;
use tempfile::TempDir;
use tonic::Code;

use crate::contexts::{Context, Pod, of_pod};

/// Everything but to write to files, which is reported: a plain `deny` is silent.
const DENY_WRITE: &str = "file, capability, network, unix, ptrace, signal, mount, audit deny /** w,";
/// The profile of the process that looks, and that of the container's own process.
const PROFILES: &str = "cat /proc/self/attr/current /proc/1/attr/apparmor/current";

/// A profile in the host's kernel until it is dropped.
struct Profile {
    name: String,
    directory: TempDir,
}

impl Profile {
    fn load(name: &str, rules: &str) -> Self {
        let profile = Self { name: name.into(), directory: tempfile::tempdir().unwrap() };
        profile.replace(rules);
        profile
    }

    fn replace(&self, rules: &str) {
        let text = format!("profile \"{}\" flags=(attach_disconnected) {{ {rules} }}\n", self.name);
        fs::write(self.file(), text).unwrap();
        run("apparmor_parser", &["--replace", "--skip-cache", &self.file()]);
    }

    fn file(&self) -> String {
        self.directory.path().join("profile").to_string_lossy().into_owned()
    }

    /// What both lines of [`PROFILES`] are under it.
    fn twice(&self) -> String {
        format!("{0} (enforce)\n{0} (enforce)", self.name)
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        let _ = Command::new("apparmor_parser").args(["--remove", &self.file()]).status();
    }
}

impl Pod {
    async fn cannot_write(&self, id: &str) {
        let answer = self.client.exec(id, &["touch", "/tmp/written"]).await.unwrap();
        let said = String::from_utf8_lossy(&answer.stderr);
        assert!(answer.exit_code != 0 && said.contains("Permission denied"), "{} {said}", answer.exit_code);
    }
}

fn localhost(name: &str) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile { profile_type: ProfileType::Localhost.into(), localhost_ref: name.into() })
}

fn under(name: &str) -> Context {
    Context { apparmor: localhost(name), ..Context::default() }
}

#[tokio::test]
async fn a_container_s_processes_run_under_the_host_s_profile_and_cannot_do_what_it_denies() {
    let profile = Profile::load("nacelle-e2e-deny-write", DENY_WRITE);
    // Nothing of the pod's own runs, so that this holds nothing up.
    let pod = Pod::run(|config| {
        let context = of_pod(config);
        context.privileged = true;
        context.apparmor = localhost("nacelle-e2e-none-of-this-name");
    })
    .await;
    // The container's own process is denied it as well as one that is executed in it.
    let script = "touch /tmp/first; exec sleep 1000";
    let id = pod.container(under(&profile.name), &["sh", "-c", script]).await.unwrap();
    assert_eq!(pod.client.shell(&id, PROFILES).await, profile.twice());
    pod.cannot_write(&id).await;
    assert_eq!(pod.client.shell(&id, "ls /tmp").await, "");

    // The new field wins over the old one, which wins over nothing; what is not named is not there.
    #[allow(deprecated)]
    let old = |name: &str| Context { apparmor_profile: name.into(), ..Context::default() };
    #[allow(deprecated)]
    let both =
        Context { apparmor_profile: "localhost/no-such-profile".into(), ..under("localhost/nacelle-e2e-deny-write") };
    for context in [old("localhost/nacelle-e2e-deny-write"), both] {
        let id = pod.sleeper(context).await.unwrap();
        assert_eq!(pod.client.shell(&id, PROFILES).await, profile.twice());
        pod.client.remove(&id).await.unwrap();
    }
    for context in [Context::default(), old("runtime/default"), old("unconfined")] {
        let id = pod.sleeper(context).await.unwrap();
        assert_eq!(pod.client.shell(&id, PROFILES).await, "unconfined\nunconfined");
        pod.client.shell(&id, "touch /tmp/written").await;
        pod.client.remove(&id).await.unwrap();
    }

    let privileged = pod.sleeper(Context { privileged: true, ..under(&profile.name) }).await.unwrap();
    assert_eq!(pod.client.shell(&privileged, PROFILES).await, profile.twice());
    pod.cannot_write(&privileged).await;
    // What was denied is in the guest's log, which a privileged container may read.
    let denied = pod.client.shell(&privileged, "dmesg | grep DENIED").await;
    assert!(denied.contains("nacelle-e2e-deny-write") && denied.contains("/tmp/written"), "{denied}");

    // Whatever else a container is held by.
    let held = Context {
        no_new_privs: true,
        run_as_user: Some(cri::Int64Value { value: 1234 }),
        masked_paths: vec!["/proc/kcore".into(), "/sys/firmware".into()],
        readonly_paths: vec!["/proc/sys".into(), "/proc/bus".into()],
        readonly_rootfs: true,
        seccomp: Some(cri::SecurityProfile { profile_type: ProfileType::RuntimeDefault.into(), ..Default::default() }),
        capabilities: Some(cri::Capability { drop_capabilities: vec!["ALL".into()], ..Default::default() }),
        ..under(&profile.name)
    };
    let holding = Context { no_new_privs: false, ..held.clone() };
    for context in [held, holding] {
        let id = pod.sleeper(context).await.unwrap();
        assert_eq!(pod.client.shell(&id, PROFILES).await, profile.twice());
        pod.client.remove(&id).await.unwrap();
    }

    // What is loaded on the host when a container is made is what it gets.
    profile.replace("file, signal, ptrace, deny /etc/** r,");
    let later = pod.sleeper(under(&profile.name)).await.unwrap();
    pod.client.shell(&later, "touch /tmp/written").await;
    assert_ne!(pod.client.exec(&later, &["cat", "/etc/passwd"]).await.unwrap().exit_code, 0);
    pod.remove().await;
}

#[tokio::test]
async fn a_profile_s_name_may_be_odd_and_a_child_has_its_parent_s() {
    let profile = Profile::load(
        "/nacelle e2e/odd@name",
        "file, signal, ptrace, profile inner { file, signal, ptrace, deny /** w, }",
    );
    let pod = Pod::run(|_| ()).await;
    let id = pod.sleeper(under(&profile.name)).await.unwrap();
    assert_eq!(pod.client.shell(&id, PROFILES).await, profile.twice());
    pod.client.shell(&id, "touch /tmp/written").await;
    let inner = format!("{}//inner", profile.name);
    let id = pod.sleeper(under(&inner)).await.unwrap();
    assert_eq!(pod.client.shell(&id, "cat /proc/self/attr/current").await, format!("{inner} (enforce)"));
    pod.cannot_write(&id).await;
    pod.remove().await;
}

#[tokio::test]
async fn a_profile_holds_in_a_user_namespace_too() {
    let profile = Profile::load("nacelle-e2e-mapped", DENY_WRITE);
    let ids = || vec![cri::IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
    let namespace = || Some(cri::UserNamespace { mode: cri::NamespaceMode::Pod.into(), uids: ids(), gids: ids() });
    let pod = Pod::run(|config| of_pod(config).namespace_options.as_mut().unwrap().userns_options = namespace()).await;
    let options = cri::NamespaceOption {
        pid: cri::NamespaceMode::Container.into(),
        userns_options: namespace(),
        ..Default::default()
    };
    // The second finds the guest as the first left it.
    for _ in 0..2 {
        let id =
            pod.sleeper(Context { namespace_options: Some(options.clone()), ..under(&profile.name) }).await.unwrap();
        assert_eq!(pod.client.shell(&id, "tr -s ' ' < /proc/self/uid_map").await, "0 100000 65536");
        assert_eq!(pod.client.shell(&id, PROFILES).await, profile.twice());
        pod.cannot_write(&id).await;
    }
    pod.remove().await;
}

#[tokio::test]
async fn a_profile_that_is_not_loaded_is_refused_by_its_name() {
    let profile = Profile::load("nacelle-e2e-gone", DENY_WRITE);
    let name = profile.name.clone();
    drop(profile);
    let pod = Pod::run(|_| ()).await;
    #[allow(deprecated)]
    let old = Context { apparmor_profile: format!("localhost/{name}"), ..Context::default() };
    for context in [under(&name), old] {
        let error = pod.container(context, &["true"]).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        for part in ["config.linux.security_context.apparmor", &name, "apparmor_parser -r"] {
            assert!(error.message().contains(part), "{part}: {}", error.message());
        }
    }
    pod.remove().await;
}

#[tokio::test]
async fn what_a_profile_lets_nobody_signal_is_ended_all_the_same() {
    let profile = Profile::load("nacelle-e2e-no-signals", "file,");
    let pod = Pod::run(|_| ()).await;
    let id = pod.sleeper(under(&profile.name)).await.unwrap();
    let error = pod.client.exec_for(&id, &["sleep", "1001"], 1).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    // It is killed after the answer.
    let processes =
        "until ! grep -qs '[1]001' /proc/[0-9]*/cmdline; do usleep 100000; done; cat /proc/self/attr/current";
    assert_eq!(pod.client.shell(&id, processes).await, format!("{} (enforce)", profile.name));
    pod.client.stop(&id, 1000).await.unwrap();
    assert_eq!(pod.client.status(&id).await.unwrap().exit_code, 137);
    pod.remove().await;
}
