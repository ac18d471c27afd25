//! Further processes in a running container.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use libcontainer::oci_spec::runtime::{Capability, LinuxCapabilities, Process as ProcessSpec};
use nacelle_proto::agent::v1::ExecRequest;
use rustix::pipe::{PipeFlags, pipe_with};

use super::create::{terminal_streams, write_json};
use super::start::execution_failure;
use super::{Container, Init, Phase, check_id, spec};
use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::helper::client::Helper;
use crate::helper::{Inside, Late, Request, Tenant};
use crate::process::Process;
use crate::stdio::streams::Streams;

impl Agent {
    /// Runs a further process; answers its id.
    pub async fn exec(&self, request: ExecRequest) -> Result<i32> {
        let container = self.container(&request.container_id)?;
        check_id("exec_id", &request.exec_id)?;
        let _order = container.order.read().await;
        let exec_id = request.exec_id.clone();
        let init = container.begin_exec(&exec_id)?;
        let directory = self.paths.container(&container.id).join("exec").join(&exec_id);
        let started = self.run_exec(&container, &init, request, &directory).await;
        let _ = fs::remove_dir_all(&directory);
        let mut state = container.lock();
        match started {
            Ok(process) => {
                let pid = process.pid;
                state.execs.insert(exec_id, Some(process));
                Ok(pid)
            }
            Err(error) => {
                state.execs.remove(&exec_id);
                Err(error)
            }
        }
    }

    async fn run_exec(
        &self,
        container: &Container,
        init: &Init,
        request: ExecRequest,
        directory: &Path,
    ) -> Result<Arc<Process>> {
        let mut process = spec::tenant(&init.spec, request.args, &request.env, request.terminal)?;
        let late = init
            .seccomp
            .as_ref()
            .map(|filter| Late { seccomp: filter.clone(), capabilities: process.capabilities().clone() });
        if late.is_some() {
            lend_capabilities(&mut process);
        }
        let user = self.sandbox.outside_user(process.user().uid());
        let inside = self.sandbox.namespaces().map(|namespaces| Inside {
            namespace: namespaces.file("user"),
            root: namespaces.ids.root(),
            cgroup: container.cgroup.path().to_owned(),
            oom_score_adj: process.oom_score_adj(),
        });
        if inside.is_some() {
            process.set_oom_score_adj(None);
        }
        fs::create_dir_all(directory).map_err(Error::path("make the directory", directory))?;
        write_json(&directory.join("process.json"), &process)?;

        let (streams, child_stdio) = match request.terminal {
            true => (None, Vec::new()),
            false => {
                let (streams, child) = Streams::pipes(request.stdin, user)?;
                (Some(streams), child.into())
            }
        };
        let (status, status_writer) = pipe_with(PipeFlags::CLOEXEC).map_err(Error::system("make a pipe"))?;
        let fds: Vec<OwnedFd> = [status_writer].into_iter().chain(child_stdio).collect();
        let tenant = Tenant {
            id: container.id.clone(),
            bundle: self.paths.container(&container.id),
            pid: init.process.pid,
            directory: directory.to_owned(),
            terminal: request.terminal,
            late,
            inside,
        };

        let mut helper = Helper::spawn(&self.paths, &self.reaper, "run a process in the container")?;
        let built = helper.build(&Request::Exec(Box::new(tenant)), &fds).await?;
        drop(fds);
        let streams = match (streams, built.terminal) {
            (Some(streams), _) => streams,
            (None, Some(master)) => terminal_streams(master, request.stdin, user, &process)?,
            (None, None) => return Err(Error::State("libcontainer gave no terminal".into())),
        };
        let running = Process::follow(built.pid, Arc::new(streams), container.cgroup.clone(), false, &self.reaper)?;
        helper.release()?;
        match execution_failure(status).await? {
            Some(failure) => Err(failure),
            None => Ok(running),
        }
    }

    /// Drops what is kept of an exec process, killing it first if it still runs.
    pub async fn forget_exec(&self, id: &str, exec_id: &str) -> Result<()> {
        let container = self.container(id)?;
        let _order = container.order.read().await;
        let process = container.find(exec_id).and_then(|process| match exec_id {
            "" => {
                Err(Error::invalid("exec_id", "the container's own process cannot be forgotten; remove the container"))
            }
            _ => Ok(process),
        })?;
        container.signal_process(&process, libc::SIGKILL)?;
        process.wait().await?;
        container.cgroup.forget_one(process.pid);
        container.lock().execs.remove(exec_id);
        Ok(())
    }
}

impl Container {
    /// Reserves the name, if the container runs.
    fn begin_exec(&self, exec_id: &str) -> Result<Arc<Init>> {
        let mut state = self.lock();
        let not_running = || Error::State(format!("container {} is not running", self.id));
        let init = state.init.clone().ok_or_else(|| Error::NoContainer(self.id.clone()))?;
        if state.phase != Phase::Started || init.process.outcome().is_some() {
            return Err(not_running());
        }
        if state.execs.contains_key(exec_id) {
            return Err(Error::ExecExists { container: self.id.clone(), exec: exec_id.to_owned() });
        }
        state.execs.insert(exec_id.to_owned(), None);
        Ok(init)
    }
}

/// Without no_new_privs the kernel takes a system call filter from a privileged process
/// only. The helper takes these back once the filter is set.
fn lend_capabilities(process: &mut ProcessSpec) {
    if process.no_new_privileges() == Some(true) {
        return;
    }
    let Some(mut capabilities) = process.capabilities().clone() else { return };
    let lent = [Capability::SysAdmin, Capability::Setpcap];
    type Get = fn(&LinuxCapabilities) -> &Option<std::collections::HashSet<Capability>>;
    let with = |get: Get| {
        let mut set = get(&capabilities).clone().unwrap_or_default();
        set.extend(lent);
        Some(set)
    };
    let (bounding, effective, permitted) =
        (with(LinuxCapabilities::bounding), with(LinuxCapabilities::effective), with(LinuxCapabilities::permitted));
    capabilities.set_bounding(bounding);
    capabilities.set_effective(effective);
    capabilities.set_permitted(permitted);
    process.set_capabilities(Some(capabilities));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_lent_only_where_the_filter_needs_them() {
        let json = r#"{"user": {}, "args": ["x"], "cwd": "/", "capabilities": {"bounding": ["CAP_CHOWN"]}}"#;
        let mut process: ProcessSpec = serde_json::from_str(json).unwrap();
        lend_capabilities(&mut process);
        let lent = process.capabilities().clone().unwrap();
        assert_eq!(lent.bounding().as_ref().unwrap().len(), 3);
        assert!(lent.effective().as_ref().unwrap().contains(&Capability::SysAdmin));
        assert_eq!(lent.inheritable(), &None);

        let mut process: ProcessSpec = serde_json::from_str(json).unwrap();
        process.set_no_new_privileges(Some(true));
        lend_capabilities(&mut process);
        assert_eq!(process.capabilities().clone().unwrap().bounding().as_ref().unwrap().len(), 1);
    }
}
