//! Building a container, up to the start of its process.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Process as ProcessSpec, Spec};
use nacelle_proto::agent::v1::{CreateContainerRequest, PidNamespace};
use rustix::pipe::{PipeFlags, pipe_with};

use super::apparmor;
use super::cgroup::Cgroup;
use super::rootfs::RootFs;
use super::spec::{self, Completion};
use super::{
    Container, Init, Phase, Status, check_id, cwd, device_policy, guest_devices, image_volumes, limits, mount_points,
    user_namespace, volumes,
};
use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::helper::client::Helper;
use crate::helper::{Create, Request};
use crate::paths::container_cgroup;
use crate::pod_init;
use crate::process::{Process, Role};
use crate::stdio::streams::Streams;
use crate::users::{Databases, Identity};

impl Agent {
    /// Builds a container; answers who its process runs as. When it fails, nothing of it is left.
    pub async fn create_container(self: &Arc<Self>, request: CreateContainerRequest) -> Result<Identity> {
        check_id("container_id", &request.container_id)?;
        self.sandbox.check_configured()?;
        let slot = request.rootfs.as_ref().ok_or_else(|| Error::invalid("rootfs", "there is none"))?.slot;
        let slots = [slot].into_iter().chain(volumes::slots(&request)).collect();
        let id = request.container_id.clone();
        let cgroup = Cgroup::at(container_cgroup(&id).1);
        let container = Arc::new(Container::new(id, slots, cgroup));
        let _order = container.order.clone().write_owned().await;
        self.add_container(&container)?;
        let built = self.build_container(&container, request).await;
        if built.is_err() {
            // What could not be torn down stays in the table, for a removal to try again.
            if self.tear_down(&container).await.is_ok() {
                self.forget_container(&container.id);
            }
        }
        built
    }

    async fn build_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        request: CreateContainerRequest,
    ) -> Result<Identity> {
        let (stdin, terminal) = (request.stdin, request.terminal);
        let agent = self.clone();
        let prepared = {
            let container = container.clone();
            self.blocking(move || {
                let mut spec = spec::parse(&request.spec_json)?;
                let identity = agent.prepare(&container, &request, &mut spec)?;
                Ok((spec, identity))
            })
        };
        let (spec, identity) = prepared.await?;
        let process = spec.process().clone().ok_or_else(|| Error::invalid("spec_json", "it has no process"))?;

        let user = self.sandbox.outside_user(identity.uid);
        let (streams, child_stdio) = match terminal {
            true => (None, Vec::new()),
            false => {
                let (streams, child) = Streams::pipes(stdin, user)?;
                (Some(streams), child.into())
            }
        };
        let (status, status_writer) = pipe_with(PipeFlags::CLOEXEC).map_err(Error::system("make a pipe"))?;
        let fds: Vec<OwnedFd> = [status_writer].into_iter().chain(child_stdio).collect();
        let bundle = self.paths.container(&container.id);
        let create = Create { id: container.id.clone(), bundle, state: self.paths.state(), terminal };

        let mut helper = Helper::spawn(&self.paths, &self.reaper, "build the container")?;
        let built = helper.build(&Request::Create(create), &fds).await?;
        drop(fds);
        let streams = match (streams, built.terminal) {
            (Some(streams), _) => streams,
            (None, Some(master)) => terminal_streams(master, stdin, user, &process)?,
            (None, None) => return Err(Error::State("libcontainer gave no terminal".into())),
        };
        let role = Role::Init(container.cgroup.clone());
        let process_handle = Process::follow(built.pid, Arc::new(streams), &role, &self.reaper)?;
        helper.release()?;

        let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
        let seccomp = seccomp.map(|_| self.paths.container(&container.id).join(SECCOMP));
        let mut state = container.lock();
        state.init =
            Some(Arc::new(Init { process: process_handle, status: Mutex::new(Some(status)), spec: process, seccomp }));
        state.phase = Phase::Created;
        Ok(identity)
    }

    /// The PID namespace of a container whose specification lists none; none for the guest's.
    fn pid_namespace(&self, request: &CreateContainerRequest) -> Result<Option<PathBuf>> {
        match request.pid_namespace() {
            PidNamespace::Guest => Ok(None),
            PidNamespace::Pod => match self.sandbox.namespaces() {
                Some(namespaces) => Ok(Some(namespaces.file("pid"))),
                None => self.sandbox.pids.namespace(&self.paths).map(Some),
            },
            PidNamespace::Target => {
                let target = self.container(&request.pid_target)?;
                match (target.process(), target.status()) {
                    (Some(process), Some(Status::Running)) => Ok(Some(pod_init::namespace_of(process.pid))),
                    _ => Err(Error::State(format!("container {} is not running", target.id))),
                }
            }
        }
    }

    /// Everything before the helper: mounts, users, files, the control group. Blocks.
    fn prepare(&self, container: &Container, request: &CreateContainerRequest, spec: &mut Spec) -> Result<Identity> {
        let id = &container.id;
        apparmor::load(spec, &request.apparmor_policy)?;
        let root = RootFs::new(&self.paths, id);
        let slot = container.slots.first().copied().unwrap_or_default();
        let namespaces = self.sandbox.namespaces();
        root.mount(&self.bus.block_device(slot)?, namespaces)?;
        let databases = Databases::read(&root.root())?;
        let with = Completion {
            root: root.root(),
            readonly: request.readonly_rootfs,
            terminal: request.terminal,
            user: &request.user,
            strict_groups: request.strict_groups,
            cgroup: container_cgroup(id).0,
            etc: self.paths.etc(),
            databases: &databases,
        };
        let identity = spec::complete(spec, &with)?;
        self.bind_sources(id, request, spec)?;
        let owner = namespaces.map_or((0, 0), |namespaces| namespaces.ids.root());
        image_volumes::make(&root.root(), request, spec, owner)?;
        if let Some(process) = spec.process() {
            cwd::make(&root.root(), process.cwd(), owner)?;
        }
        if let Some(namespace) = self.pid_namespace(request)? {
            spec::join_namespace(spec, LinuxNamespaceType::Pid, namespace)?;
        }
        if let Some(namespaces) = namespaces {
            namespaces.ids.check(identity.uid, &identity.groups)?;
            user_namespace::join(spec, namespaces)?;
        }
        mount_points::settle(spec, &root.root())?;
        let mut resources = spec::take_resources(spec);
        for (device, allowed) in self.disks(request)? {
            match namespaces {
                None => spec::add_devices(spec, vec![device]),
                Some(namespaces) => self.bind_disk(id, spec, &device, namespaces)?,
            }
            // The last rule that matches decides, and that of a privileged container allows
            // everything already.
            if !device_policy::allows_everything(&resources) {
                resources.devices_mut().get_or_insert_default().push(allowed);
            }
        }
        if device_policy::allows_everything(&resources) {
            spec::add_devices(spec, guest_devices::list(Path::new("/dev")));
        }
        let directory = self.paths.container(id);
        write_json(&directory.join("config.json"), spec)?;
        if let Some(filter) = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()) {
            write_json(&directory.join(SECCOMP), filter)?;
        }
        fs::create_dir_all(self.paths.state()).map_err(Error::path("make the directory", self.paths.state()))?;
        // Made here, so that the policy holds before the first process is in it.
        let cgroup = container.cgroup.create()?;
        device_policy::attach(&cgroup, resources.devices().as_deref().unwrap_or_default())?;
        limits::apply(container.cgroup.path(), &resources)?;
        Ok(identity)
    }
}

/// File in the container's directory with its system call filter.
const SECCOMP: &str = "seccomp.json";

/// Writes a file of the container's directory, which no container sees.
pub(super) fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> Result<()> {
    let failed = |source: std::io::Error| Error::Path { action: "write", path: PathBuf::from(path), source };
    let bytes = serde_json::to_vec(value).map_err(|error| failed(error.into()))?;
    fs::write(path, bytes).map_err(failed)
}

/// Streams by a terminal, of the size that the specification gives.
pub(super) fn terminal_streams(master: OwnedFd, stdin: bool, uid: u32, process: &ProcessSpec) -> Result<Streams> {
    let streams = Streams::terminal(master, stdin, uid)?;
    if let Some(size) = process.console_size() {
        let side = |length: u64| u16::try_from(length).unwrap_or(u16::MAX);
        streams.resize(side(size.height()), side(size.width()))?;
    }
    Ok(streams)
}
