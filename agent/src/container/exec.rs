//! Further processes in a running container.
//!
//! Each has a control group of its own below the container's, which all that it starts is in: so it can be killed as a
//! whole. An exec that ends leaves alone what it has started, as on any node: it may be meant to stay.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use libcontainer::oci_spec::runtime::{Capability, LinuxCapabilities, Process as ProcessSpec};
use nacelle_proto::agent::v1::ExecRequest;
use rustix::pipe::{PipeFlags, pipe_with};

use super::cgroup::Cgroup;
use super::create::{terminal_streams, write_json};
use super::start::execution_failure;
use super::{Container, Exec, ExecState, Init, Phase, check_id, spec};
use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::helper::client::Helper;
use crate::helper::{Inside, Late, Request, Tenant};
use crate::process::{Process, Role};
use crate::stdio::streams::Streams;

/// Numbers the groups of execs: an id may come again while something is left of its first process.
static GROUPS: AtomicU64 = AtomicU64::new(1);

impl Agent {
    /// Runs a further process; answers its id.
    pub async fn exec(&self, request: ExecRequest) -> Result<i32> {
        let container = self.container(&request.container_id)?;
        check_id("exec_id", &request.exec_id)?;
        let _order = container.order.read().await;
        let exec_id = request.exec_id.clone();
        let init = container.begin_exec(&exec_id)?;
        let directory = self.paths.container(&container.id).join("exec").join(&exec_id);
        let name = format!("exec-{}", GROUPS.fetch_add(1, Ordering::Relaxed));
        let group = Cgroup::at(container.cgroup.path().join(&name));
        let started = self.run_exec(&container, &init, request, &directory, &name).await;
        let tidied = {
            let (container, failed) = (container.clone(), started.is_err());
            self.blocking(move || {
                let _ = fs::remove_dir_all(&directory);
                if failed {
                    container.leave(group);
                }
                Ok(())
            })
        };
        let _ = tidied.await;
        let exec = match started {
            Ok(exec) => Arc::new(exec),
            Err(error) => {
                container.lock().execs.remove(&exec_id);
                return Err(error);
            }
        };
        let pid = exec.process.pid;
        if container.end_exec(&exec_id, &exec) {
            return Ok(pid);
        }
        self.end_forgotten(&container, &exec_id, exec).await?;
        Err(Error::State(format!("exec process {exec_id} was forgotten while it was started")))
    }

    async fn run_exec(
        &self,
        container: &Arc<Container>,
        init: &Init,
        request: ExecRequest,
        directory: &Path,
        name: &str,
    ) -> Result<Exec> {
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
            cgroup: container.cgroup.path().join(name),
            oom_score_adj: process.oom_score_adj(),
        });
        if inside.is_some() {
            process.set_oom_score_adj(None);
        }
        let made = {
            let (container, name) = (container.clone(), name.to_owned());
            let (directory, process) = (directory.to_owned(), process.clone());
            self.blocking(move || {
                fs::create_dir_all(&directory).map_err(Error::path("make the directory", &directory))?;
                write_json(&directory.join("process.json"), &process)?;
                container.cgroup.create_below(&name)
            })
        };
        let group = made.await?;

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
            group: name.to_owned(),
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
        let role = Role::Exec(container.cgroup.clone());
        let running = Process::follow(built.pid, Arc::new(streams), &role, &self.reaper)?;
        helper.release()?;
        match execution_failure(status).await? {
            Some(failure) => Err(failure),
            None => Ok(Exec { process: running, group }),
        }
    }

    /// Drops what is kept of an exec process, killing it first, with all that it has started,
    /// if it still runs.
    pub async fn forget_exec(&self, id: &str, exec_id: &str) -> Result<()> {
        let container = self.container(id)?;
        let _order = container.order.read().await;
        if exec_id.is_empty() {
            let reason = "the container's own process cannot be forgotten; remove the container";
            return Err(Error::invalid("exec_id", reason));
        }
        if container.abandon_exec(exec_id) {
            return Ok(());
        }
        let exec = container.find_exec(exec_id)?;
        self.end_forgotten(&container, exec_id, exec).await
    }

    /// Kills an exec that still runs, and forgets it.
    async fn end_forgotten(&self, container: &Arc<Container>, exec_id: &str, exec: Arc<Exec>) -> Result<()> {
        if exec.process.outcome().is_none() {
            let exec = exec.clone();
            self.blocking(move || exec.kill()).await?;
        }
        exec.process.wait().await?;
        container.lock().execs.remove(exec_id);
        let container = container.clone();
        self.blocking(move || {
            container.cgroup.forget_one(exec.process.pid);
            container.leave(exec.group.clone());
            Ok(())
        })
        .await
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
        state.execs.insert(exec_id.to_owned(), ExecState::Starting);
        Ok(init)
    }

    /// Has an exec that is being started end as soon as it is there; answers whether it is such a one.
    fn abandon_exec(&self, exec_id: &str) -> bool {
        match self.lock().execs.get_mut(exec_id) {
            Some(state @ (ExecState::Starting | ExecState::Abandoned)) => {
                *state = ExecState::Abandoned;
                true
            }
            _ => false,
        }
    }

    /// Enters an exec that was started; answers whether somebody still wants it.
    fn end_exec(&self, exec_id: &str, exec: &Arc<Exec>) -> bool {
        let before = self.lock().execs.insert(exec_id.to_owned(), ExecState::Started(exec.clone()));
        !matches!(before, Some(ExecState::Abandoned))
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
