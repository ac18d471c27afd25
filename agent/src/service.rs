//! `agent.v1` as gRPC: words in, words out, nothing else.
//!
//! Every call that changes something runs on a task of its own: a host that goes away in
//! the middle cancels its wait, not the work, so nothing is left half made.

use std::future::Future;
use std::sync::Arc;

use nacelle_proto::agent::v1 as api;
use nacelle_proto::agent::v1::agent_server;
use nacelle_proto::features;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::agent::Agent;
use crate::clock;
use crate::container::{self, Container};
use crate::error::{Error, Result};
use crate::process::Outcome;
use crate::users::Identity;

type Answer<T> = std::result::Result<Response<T>, Status>;

/// The gRPC service of an agent.
#[derive(Debug)]
pub struct Service {
    agent: Arc<Agent>,
    power_off: watch::Sender<bool>,
}

impl Service {
    /// A service that sets `power_off` when it is asked to shut down.
    pub fn new(agent: Arc<Agent>, power_off: watch::Sender<bool>) -> Self {
        Self { agent, power_off }
    }

    /// Runs `work` to its end, whether or not the caller waits for it.
    async fn finish<T, F, W>(&self, work: F) -> std::result::Result<T, Status>
    where
        T: Send + 'static,
        F: FnOnce(Arc<Agent>) -> W,
        W: Future<Output = Result<T>> + Send + 'static,
    {
        Ok(tokio::spawn(work(self.agent.clone())).await.map_err(Error::Lost)??)
    }
}

#[tonic::async_trait]
impl agent_server::Agent for Service {
    async fn info(&self, _: Request<api::InfoRequest>) -> Answer<api::InfoResponse> {
        let kernel = rustix::system::uname();
        Ok(Response::new(api::InfoResponse {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: kernel.release().to_string_lossy().into_owned(),
            features: features::ALL.map(str::to_owned).into(),
        }))
    }

    async fn configure_sandbox(
        &self,
        request: Request<api::ConfigureSandboxRequest>,
    ) -> Answer<api::ConfigureSandboxResponse> {
        let request = request.into_inner();
        self.finish(|agent| async move { agent.configure_sandbox(request).await }).await?;
        Ok(Response::new(api::ConfigureSandboxResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<api::CreateContainerRequest>,
    ) -> Answer<api::CreateContainerResponse> {
        let request = request.into_inner();
        let identity = self.finish(|agent| async move { agent.create_container(request).await }).await?;
        let Identity { uid, gid, groups, .. } = identity;
        Ok(Response::new(api::CreateContainerResponse { uid, gid, groups }))
    }

    async fn start_container(
        &self,
        request: Request<api::StartContainerRequest>,
    ) -> Answer<api::StartContainerResponse> {
        let id = request.into_inner().container_id;
        let pid = self.finish(|agent| async move { agent.start_container(&id).await }).await?;
        Ok(Response::new(api::StartContainerResponse { pid: unsigned(pid) }))
    }

    async fn exec(&self, request: Request<api::ExecRequest>) -> Answer<api::ExecResponse> {
        let request = request.into_inner();
        let pid = self.finish(|agent| async move { agent.exec(request).await }).await?;
        Ok(Response::new(api::ExecResponse { pid: unsigned(pid) }))
    }

    async fn signal(&self, request: Request<api::SignalRequest>) -> Answer<api::SignalResponse> {
        let request = request.into_inner();
        let container = self.agent.container(&request.container_id)?;
        self.agent.blocking(move || container.signal(&request)).await?;
        Ok(Response::new(api::SignalResponse {}))
    }

    async fn wait(&self, request: Request<api::WaitRequest>) -> Answer<api::WaitResponse> {
        let request = request.into_inner();
        let process = self.agent.container(&request.container_id)?.find(&request.exec_id)?;
        Ok(Response::new(exit(process.wait().await?)))
    }

    async fn forget_exec(&self, request: Request<api::ForgetExecRequest>) -> Answer<api::ForgetExecResponse> {
        let request = request.into_inner();
        self.finish(|agent| async move { agent.forget_exec(&request.container_id, &request.exec_id).await }).await?;
        Ok(Response::new(api::ForgetExecResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<api::RemoveContainerRequest>,
    ) -> Answer<api::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        let slots = self.finish(|agent| async move { agent.remove_container(&id).await }).await?;
        Ok(Response::new(api::RemoveContainerResponse { released: devices(&slots) }))
    }

    async fn list_containers(&self, _: Request<api::ListContainersRequest>) -> Answer<api::ListContainersResponse> {
        let containers = self.agent.containers();
        let containers = containers.iter().map(|container| describe(container)).collect();
        Ok(Response::new(api::ListContainersResponse { containers }))
    }

    async fn update_container(
        &self,
        request: Request<api::UpdateContainerRequest>,
    ) -> Answer<api::UpdateContainerResponse> {
        let request = request.into_inner();
        self.finish(|agent| async move { agent.update_container(request).await }).await?;
        Ok(Response::new(api::UpdateContainerResponse {}))
    }

    async fn set_clock(&self, request: Request<api::SetClockRequest>) -> Answer<api::SetClockResponse> {
        Ok(Response::new(clock::set(request.get_ref())?))
    }

    async fn resize_terminal(
        &self,
        request: Request<api::ResizeTerminalRequest>,
    ) -> Answer<api::ResizeTerminalResponse> {
        let request = request.into_inner();
        let side = |field, length: u32| {
            u16::try_from(length).map_err(|_| Error::invalid(field, format!("{length} is more than 65535")))
        };
        let (rows, columns) = (side("rows", request.rows)?, side("columns", request.columns)?);
        let process = self.agent.container(&request.container_id)?.find(&request.exec_id)?;
        process.streams.resize(rows, columns)?;
        Ok(Response::new(api::ResizeTerminalResponse {}))
    }

    async fn stats(&self, request: Request<api::StatsRequest>) -> Answer<api::StatsResponse> {
        Ok(Response::new(self.agent.stats(request.into_inner()).await?))
    }

    async fn shutdown(&self, _: Request<api::ShutdownRequest>) -> Answer<api::ShutdownResponse> {
        let power_off = self.power_off.clone();
        self.finish(|agent| async move {
            let ending = agent.clone();
            agent
                .blocking(move || {
                    ending.end_everything();
                    Ok(())
                })
                .await?;
            power_off.send_replace(true);
            Ok(())
        })
        .await?;
        Ok(Response::new(api::ShutdownResponse {}))
    }
}

fn describe(container: &Container) -> api::ContainerInfo {
    let (state, exit) = match container.status() {
        None => (api::container_info::State::Creating, None),
        Some(container::Status::Created) => (api::container_info::State::Created, None),
        Some(container::Status::Running) => (api::container_info::State::Running, None),
        Some(container::Status::Exited(outcome)) => (api::container_info::State::Exited, Some(exit(outcome))),
    };
    api::ContainerInfo {
        container_id: container.id.clone(),
        state: state.into(),
        exit,
        pid: container.process().map_or(0, |process| unsigned(process.pid)),
        exec_ids: container.exec_ids(),
        devices: devices(container.slots()),
        starting: container.starting(),
    }
}

fn exit(outcome: Outcome) -> api::WaitResponse {
    api::WaitResponse {
        exit_code: outcome.exit.code,
        oom_killed: outcome.oom_killed,
        finished_at: outcome.exit.finished_at,
    }
}

fn devices(slots: &[u32]) -> Vec<api::Device> {
    slots.iter().map(|slot| api::Device { slot: *slot }).collect()
}

fn unsigned(pid: i32) -> u32 {
    u32::try_from(pid).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::cgroup::Cgroup;

    #[test]
    fn a_container_that_is_being_created_is_listed_with_what_it_holds() {
        let container = Container::new("c".into(), vec![3, 4], Cgroup::at("/no/such/group".into()));
        let info = describe(&container);
        assert_eq!((info.state(), info.container_id.as_str()), (api::container_info::State::Creating, "c"));
        assert_eq!(info.devices, devices(&[3, 4]));
        assert!(!info.starting && info.exit.is_none() && info.pid == 0);
    }
}
