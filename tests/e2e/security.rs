//! Who a container runs as, what it may do, what it sees of others.

use std::path::Path;

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, pod_config};
use tonic::Code;

use crate::contexts::{Context, Pod, of_pod};

impl Pod {
    /// One that may hold privileged containers.
    async fn privileged(change: impl FnOnce(&mut cri::PodSandboxConfig)) -> Self {
        Self::run(|config| {
            of_pod(config).privileged = true;
            change(config);
        })
        .await
    }

    /// What a shell says in a container; both streams.
    async fn shell(&self, id: &str, script: &str) -> String {
        let answer = self.client.exec(id, &["sh", "-c", script]).await.unwrap();
        String::from_utf8_lossy(&[answer.stdout, answer.stderr].concat()).trim().to_owned()
    }

    /// The same in a container made for it and removed after.
    async fn once(&self, context: Context, script: &str) -> String {
        let id = self.sleeper(context).await.unwrap();
        let said = self.shell(&id, script).await;
        self.client.remove(&id).await.unwrap();
        said
    }
}

fn number(value: i64) -> Option<cri::Int64Value> {
    Some(cri::Int64Value { value })
}

fn capabilities(add: &[&str], drop: &[&str], ambient: &[&str]) -> Option<cri::Capability> {
    let list = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    let (add_capabilities, drop_capabilities) = (list(add), list(drop));
    Some(cri::Capability { add_capabilities, drop_capabilities, add_ambient_capabilities: list(ambient) })
}

fn seccomp(profile_type: cri::security_profile::ProfileType, file: &Path) -> Option<cri::SecurityProfile> {
    let localhost_ref = file.to_string_lossy().into_owned();
    Some(cri::SecurityProfile { profile_type: profile_type.into(), localhost_ref })
}

fn processes(mode: cri::NamespaceMode, target_id: &str) -> Option<cri::NamespaceOption> {
    Some(cri::NamespaceOption { pid: mode.into(), target_id: target_id.into(), ..Default::default() })
}

#[tokio::test]
async fn the_process_runs_as_whom_it_was_asked_to_and_the_status_says_so() {
    let pod = Pod::privileged(|_| ()).await;
    let strict = cri::SupplementalGroupsPolicy::Strict.into();
    let app = || Context { run_as_user: number(1234), ..Context::default() };
    for (context, uid, gid, groups) in [
        (Context::default(), 0, 0, vec![0]),
        (app(), 1234, 2345, vec![29, 50, 2345]),
        (Context { run_as_username: "app".into(), ..Context::default() }, 1234, 2345, vec![29, 50, 2345]),
        (Context { supplemental_groups: vec![7], ..app() }, 1234, 2345, vec![7, 29, 50, 2345]),
        (
            Context { supplemental_groups: vec![7], supplemental_groups_policy: strict, ..app() },
            1234,
            2345,
            vec![7, 2345],
        ),
        (Context { run_as_group: number(5), supplemental_groups_policy: strict, ..app() }, 1234, 5, vec![5]),
        (Context { run_as_user: number(4711), ..Context::default() }, 4711, 0, vec![0]),
    ] {
        let id = pod.sleeper(context.clone()).await.unwrap();
        let said = pod.shell(&id, "echo $(id -u) $(id -g) $(id -G | tr ' ' '\\n' | sort -n)").await;
        let expected: Vec<_> = [uid, gid].iter().chain(&groups).map(ToString::to_string).collect();
        assert_eq!(said, expected.join(" "), "{context:?}");
        let user = pod.client.status(&id).await.unwrap().user.unwrap().linux.unwrap();
        assert_eq!((user.uid, user.gid, user.supplemental_groups), (uid, gid, groups), "{context:?}");
        pod.client.remove(&id).await.unwrap();
    }
    let error = pod.sleeper(Context { run_as_username: "nemo".into(), ..Context::default() }).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("nemo"), "{}", error.message());
    pod.remove().await;
}

#[tokio::test]
async fn a_container_has_the_capabilities_it_was_given_and_no_others() {
    let pod = Pod::privileged(|_| ()).await;
    let sets = async |context: Context| {
        let said = pod.once(context, "grep ^Cap /proc/1/status | cut -f2 | tr '\\n' ' '").await;
        let [inheritable, permitted, effective, bounding, ambient] =
            said.split(' ').map(|set| u64::from_str_radix(set, 16).unwrap()).collect::<Vec<_>>()[..]
        else {
            panic!("{said}")
        };
        (inheritable, permitted, effective, bounding, ambient)
    };
    let default = 0xa804_25fb;
    assert_eq!(sets(Context::default()).await, (0, default, default, default, 0));
    let with = |capabilities| Context { capabilities, ..Context::default() };
    let net_admin = 1 << 12;
    assert_eq!(sets(with(capabilities(&["NET_ADMIN"], &["ALL"], &[]))).await, (0, net_admin, net_admin, net_admin, 0));
    assert_eq!(sets(with(capabilities(&[], &["ALL"], &[]))).await, (0, 0, 0, 0, 0));
    let all = (1 << 41) - 1;
    assert_eq!(sets(with(capabilities(&["ALL"], &[], &[]))).await.1, all);
    assert_eq!(sets(Context { privileged: true, ..Context::default() }).await.1, all);
    // An ordinary user keeps over an exec what is ambient, and nothing else.
    let bind = 1 << 10;
    let user = Context { run_as_user: number(1234), ..Context::default() };
    let ambient = capabilities(&["NET_BIND_SERVICE"], &["ALL"], &["NET_BIND_SERVICE"]);
    assert_eq!(sets(Context { capabilities: ambient, ..user.clone() }).await, (bind, bind, bind, bind, bind));
    let kept = sets(user).await;
    assert_eq!((kept.1, kept.2, kept.4), (0, 0, 0));
    let error = pod.sleeper(with(capabilities(&["FLY"], &[], &[]))).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    pod.remove().await;
}

#[tokio::test]
async fn each_kind_of_seccomp_profile_filters_what_it_says() {
    use cri::security_profile::ProfileType;
    let pod = Pod::privileged(|_| ()).await;
    let with = |seccomp| Context { seccomp, ..Context::default() };
    let filtered =
        "grep -w Seccomp: /proc/self/status | cut -f2; hostname x 2>&1; unshare -m true 2>&1; chmod 700 /tmp";
    let none = Path::new("");
    let default = pod.once(with(seccomp(ProfileType::RuntimeDefault, none)), filtered).await;
    assert!(default.starts_with("2\n") && default.matches("not permitted").count() == 2, "{default}");
    let unconfined = pod.once(with(seccomp(ProfileType::Unconfined, none)), filtered).await;
    assert!(unconfined.starts_with('0'), "{unconfined}");
    // As the CRI's conformance suite wants it; a kubelet always names a profile.
    assert!(pod.once(Context::default(), filtered).await.starts_with('0'));
    // What a capability is for is let through by the default filter.
    let admin = Context {
        capabilities: capabilities(&["SYS_ADMIN"], &[], &[]),
        ..with(seccomp(ProfileType::RuntimeDefault, none))
    };
    let said = pod.once(admin, filtered).await;
    assert_eq!(said, "2", "{said}");

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("no-chmod.json");
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(&file, text).unwrap();
    let localhost = seccomp(ProfileType::Localhost, &file);
    let said = pod.once(with(localhost.clone()), filtered).await;
    assert!(said.starts_with("2\n") && said.contains("chmod: /tmp: Operation not permitted"), "{said}");
    let privileged = Context { privileged: true, ..with(localhost) };
    assert!(pod.once(privileged, filtered).await.starts_with('0'), "a privileged container is not filtered");
    #[allow(deprecated)]
    let older = Context { seccomp_profile_path: format!("localhost/{}", file.display()), ..Context::default() };
    assert!(pod.once(older, filtered).await.starts_with("2\n"));
    std::fs::remove_file(&file).unwrap();
    let error = pod.sleeper(with(seccomp(ProfileType::Localhost, &file))).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("no-chmod.json"), "{}", error.message());
    pod.remove().await;
}

#[tokio::test]
async fn what_is_hidden_read_only_or_without_new_privileges_is_so() {
    let pod = Pod::privileged(|_| ()).await;
    let paths = |paths: &[&str]| paths.iter().map(ToString::to_string).collect::<Vec<_>>();
    let context = Context {
        masked_paths: paths(&["/bin/ls", "/etc", "/no/such/path"]),
        readonly_paths: paths(&["/tmp"]),
        no_new_privs: true,
        ..Context::default()
    };
    let script =
        "/bin/ls; echo /etc/*; touch /tmp/x; grep NoNewPrivs /proc/self/status | cut -f2; touch /srv/x && echo fine";
    let said = pod.once(context, script).await;
    let expected = ["sh: /bin/ls: Permission denied", "/etc/*", "touch: /tmp/x: Read-only file system", "1", "fine"];
    for line in expected {
        assert!(said.lines().any(|said| said == line), "no {line:?} in {said}");
    }
    // No list means no paths: that is how procMount Unmasked comes.
    let said =
        pod.once(Context::default(), "cat /proc/sys/kernel/hostname > /proc/sys/kernel/hostname && echo open").await;
    assert!(said.ends_with("open"), "{said}");
    let readonly = Context { readonly_rootfs: true, ..Context::default() };
    let said = pod.once(readonly, "touch /x; touch /dev/shm/y && echo shared memory").await;
    assert!(said.contains("touch: /x: Read-only file system") && said.contains("shared memory"), "{said}");
    pod.remove().await;
}

#[tokio::test]
async fn privileged_is_the_guest_s_and_needs_the_pod_s_leave() {
    let pod = Pod::privileged(|_| ()).await;
    let script = "mount -t tmpfs none /mnt && echo mounted; ls /dev/vda /dev/vsock; echo 1 > /proc/sys/vm/compact_memory && echo written";
    let said = pod.once(Context { privileged: true, ..Context::default() }, script).await;
    for part in ["mounted", "/dev/vda\n", "/dev/vsock\n", "written"] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    let said = pod.once(Context::default(), script).await;
    assert!(!said.contains("mounted") && said.contains("/dev/vda: No such file"), "{said}");
    pod.remove().await;
    let pod = Pod::run(|_| ()).await;
    let error = pod.sleeper(Context { privileged: true, ..Context::default() }).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("privileged"), "{}", error.message());
    pod.remove().await;
}

#[tokio::test]
async fn containers_see_the_processes_they_are_to_see() {
    use cri::NamespaceMode as Mode;
    let pod = Pod::privileged(|_| ()).await;
    let with = |mode, target: &str| Context { namespace_options: processes(mode, target), ..Context::default() };
    let (ps, first) = ("ps -o pid,args", "tr '\\0' ' ' < /proc/1/cmdline");
    let own = pod.sleeper(with(Mode::Container, "")).await.unwrap();
    assert_eq!(pod.shell(&own, first).await, "sleep 1000");

    let shared = pod.sleeper(with(Mode::Pod, "")).await.unwrap();
    let sharing = pod.sleeper(with(Mode::Pod, "")).await.unwrap();
    let seen = pod.shell(&shared, ps).await;
    assert_eq!(seen.matches("sleep 1000").count(), 2, "{seen}");
    assert!(pod.shell(&shared, first).await.contains("pod-init"), "process 1 is nobody's container");
    // Its agent is not among them, and nothing of the guest's files can be reached by way of process 1.
    assert_eq!(seen.lines().filter(|line| line.contains("/init")).count(), 1, "{seen}");
    assert!(pod.shell(&shared, "ls /proc/1/root/").await.contains("denied"));
    // Orphans are reaped, and a container's end takes none of the other's along.
    pod.shell(&shared, "sh -c 'sleep 0.1 & exit 0'; sleep 1").await;
    pod.client.remove(&sharing).await.unwrap();
    let seen = pod.shell(&shared, ps).await;
    assert!(!seen.contains("[sleep]") && seen.matches("sleep 1000").count() == 1, "{seen}");

    let debug = pod.sleeper(with(Mode::Target, &own[..20])).await.unwrap();
    let seen = pod.shell(&debug, ps).await;
    assert_eq!(seen.matches("sleep 1000").count(), 2, "{seen}");
    assert_eq!(pod.shell(&own, "ps | grep -c '[s]leep 1000'").await, "2");
    let error = pod.sleeper(with(Mode::Target, "0123")).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");

    let node = pod.sleeper(with(Mode::Node, "")).await.unwrap();
    let seen = pod.shell(&node, ps).await;
    assert!(seen.matches("sleep 1000").count() >= 4 && seen.contains("/init"), "{seen}");
    let status = pod.client.status(&node).await.unwrap();
    assert_eq!(status.state(), cri::ContainerState::ContainerRunning);
    pod.remove().await;
}

#[tokio::test]
async fn the_pod_s_kernel_parameters_are_set_and_an_unknown_one_is_named() {
    let pod = Pod::privileged(|config| {
        let sysctls = &mut config.linux.as_mut().unwrap().sysctls;
        sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
        sysctls.insert("fs.mqueue.msg_max".into(), "100".into());
        sysctls.insert("net.ipv4.ip_local_port_range".into(), "2000 3000".into());
    })
    .await;
    let files =
        "cd /proc/sys; cat kernel/shm_rmid_forced fs/mqueue/msg_max net/ipv4/ip_local_port_range | tr '\\t\\n' '  '";
    assert_eq!(pod.once(Context::default(), files).await, "1 100 2000 3000");
    let client = pod.client.clone();
    pod.remove().await;
    let logs = tempfile::tempdir().unwrap();
    let mut config = pod_config(logs.path());
    config.linux.as_mut().unwrap().sysctls.insert("kernel.no_such_thing".into(), "1".into());
    let error = client.run_pod_as(config).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("no_such_thing"), "{}", error.message());
}

#[tokio::test]
async fn what_a_guest_cannot_give_is_refused_before_there_is_one() {
    let client = Client::node().await;
    let logs = tempfile::tempdir().unwrap();
    let node: i32 = cri::NamespaceMode::Node.into();
    for (options, field) in [
        (cri::NamespaceOption { network: node, ..Default::default() }, "namespace_options.network"),
        (cri::NamespaceOption { ipc: node, ..Default::default() }, "namespace_options.ipc"),
    ] {
        let mut config = pod_config(logs.path());
        of_pod(&mut config).namespace_options = Some(options);
        let error = client.run_pod_as(config).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(field), "{}", error.message());
    }
    let status = client.runtime.clone().status(cri::StatusRequest::default()).await.unwrap().into_inner();
    assert!(status.features.unwrap().supplemental_groups_policy);
    assert!(status.runtime_handlers[0].features.unwrap().recursive_read_only_mounts);
}
